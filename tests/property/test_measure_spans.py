"""Sets of bytes as spans, judged by sets of numbers.

Properties, for sorted and disjoint spans A and B:
- common(A, B) has the bytes that are in both, without(A, B) those of A that are not in B; both are sorted and disjoint;
- together they are A again, and their totals add up to A's;
- in_file() keeps every byte that some section shows, once, at the offset that the section gives it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from balloonlab.measure.spans import common, in_file, total, without
from hostdev.pages import Span, merge
from qmp_glue.ram import Section

spans = st.lists(st.builds(Span, st.integers(0, 60), st.integers(0, 12)), max_size=8).map(merge)


def bytes_of(found: Iterable[Span]) -> set[int]:
    return {byte for span in found for byte in range(span.start, span.end)}


def is_a_set(found: list[Span]) -> bool:
    ends = [(span.start, span.end) for span in found]
    return all(start < end for start, end in ends) and all(
        before[1] <= after[0] for before, after in itertools.pairwise(ends)
    )


@given(spans, spans)
def test_common_and_without_share_a_set_out(one: list[Span], other: list[Span]) -> None:
    both, only = common(one, other), without(one, other)
    assert bytes_of(both) == bytes_of(one) & bytes_of(other)
    assert bytes_of(only) == bytes_of(one) - bytes_of(other)
    assert is_a_set(both)
    assert is_a_set(only)
    assert merge([*both, *only]) == merge(one)
    assert total(both) + total(only) == total(one)


@given(st.builds(Span, st.integers(0, 60), st.integers(0, 30)), spans, st.integers(0, 1000))
def test_each_byte_that_a_section_shows_is_found_once(span: Span, shown: list[Span], base: int) -> None:
    sections = [Section(one.start, one.length, number, base + number) for number, one in enumerate(shown)]
    found = [
        (file, byte)
        for file, offsets in in_file(span, sections)
        for byte in range(offsets.start, offsets.end)
    ]
    expected = {
        (section.file, section.offset + byte - section.address)
        for section in sections
        for byte in range(max(span.start, section.address), min(span.end, section.end))
    }
    assert set(found) == expected
    assert len(found) == len(expected)
