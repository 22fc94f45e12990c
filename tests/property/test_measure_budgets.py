"""Properties of budgets.

1. Any text is a budget with one end, or a UsageError.
2. What a --budget says is what its number and unit say.
3. A budget passes exactly if the figure is within its ends, both included; a broken one says so, and what was not measured
   is broken.
"""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from balloonlab.errors import UsageError
from balloonlab.measure.budgets import judge, parse_budget
from balloonlab.measure.figures import FIGURES
from balloonlab.measure.scenario import Budget

MIB = 1 << 20


@given(st.text())
def test_any_text_is_a_budget_or_a_usage_error(text: str) -> None:
    for written in (text, f"residual={text}", f"t90>={text}", f"reports<={text}"):
        with contextlib.suppress(UsageError):
            assert (parse_budget(written).most is None) != (parse_budget(written).least is None)


@given(st.integers(0, 1 << 20), st.sampled_from(["", " ", "  "]))
def test_a_budget_says_what_is_written(number: int, space: str) -> None:
    assert parse_budget(f"peak{space}={space}{number}M") == Budget(
        figure="peak_bytes", most=float(number * MIB)
    )
    assert parse_budget(f"t50{space}>={space}{number}ms").least == number * 0.001
    assert parse_budget(f"reports{space}<={space}{number}").most == number


VALUES = st.floats(-1e12, 1e12) | st.integers(-100, 100).map(float)
NAMES = st.sampled_from([figure.name for figure in FIGURES] + ["fill.peak_bytes"])


@given(NAMES, VALUES | st.none(), VALUES | st.none(), VALUES | st.none())
def test_a_budget_passes_within_its_ends(
    name: str, most: float | None, least: float | None, value: float | None
) -> None:
    (check,) = judge([Budget(figure=name, most=most, least=least)], {name: value, "other": 5.0})
    within = value is not None and (most is None or value <= most) and (least is None or value >= least)
    assert (check.outcome == "pass") is within
    assert bool(check.message) is not within
    assert check.name == f"budget {name}"
