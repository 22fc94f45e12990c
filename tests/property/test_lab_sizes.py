"""Properties of sizes on the command line and the screen.

1. parse_size() either returns a number of bytes that a file can have, or raises UsageError; nothing else, for any text.
2. parse_size() of human() is the size within the rounding of human(): half of the last digit shown, 5 % at most.
3. A whole number with a unit is exact.
4. A larger size is never parsed as a smaller one, once both have been shown.
"""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from balloonlab.errors import UsageError
from balloonlab.sizes import human, parse_size

SIZES = st.integers(0, 1 << 50)
# Text that looks like a size but for a detail is what finds defects; text of any kind beside it.
ALMOST = st.from_regex(r"\A\s?\d{1,30}(\.\d{0,30})?\s?[kmgtpKMGTP]?i?b?\Z")


@given(st.one_of(st.text(), ALMOST))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert 0 <= parse_size(text) < 1 << 63


@given(SIZES)
def test_what_is_shown_can_be_given_back(size: int) -> None:
    assert abs(parse_size(human(size)) - size) <= size * 0.05


@given(st.integers(0, 1 << 20), st.sampled_from(["", "k", "M", "G", "T"]))
def test_whole_numbers_are_exact(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number << 10 * ["", "k", "M", "G", "T"].index(unit)


@given(SIZES, SIZES)
def test_order_is_kept(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert parse_size(human(small)) <= parse_size(human(large))
