"""Properties of the sets of bytes that --verify reckons with.

1. intersect() and subtract() are what Python's sets make of the same bytes, sorted and with a gap between any two.
2. What is subtracted and what is left over are the whole again, and have nothing in common.
3. of() and addresses() undo each other for guest RAM, byte by byte; what is no RAM has no place.
4. No byte of one file has the place of a byte of another.
"""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from balloonlab.measure.ranges import FILE_SHIFT, Places, in_file, intersect, subtract, total
from hostdev.pages import Span, merge
from qmp_glue.ram import Section

SPANS = st.lists(st.builds(Span, st.integers(0, 120), st.integers(0, 30)), max_size=8).map(merge)


@st.composite
def sections(draw: st.DrawFn) -> list[Section]:
    """Some RAM in two files, in any order and with gaps, as a machine has it: no address and no byte of a file twice."""
    address, offsets, found = 0, [0, 0], []
    for _ in range(draw(st.integers(1, 4))):
        address += draw(st.integers(0, 20))
        file, length = draw(st.integers(0, 1)), draw(st.integers(1, 30))
        offsets[file] += draw(st.integers(0, 5))
        found.append(Section(address, length, file, offsets[file]))
        address += length
        offsets[file] += length
    return draw(st.permutations(found))


def bytes_of(spans: list[Span]) -> set[int]:
    return {byte for span in spans for byte in range(span.start, span.end)}


def assert_separate(spans: list[Span]) -> None:
    assert all(span.length > 0 for span in spans)
    assert all(first.end < second.start for first, second in pairwise(spans))


@given(SPANS, SPANS)
def test_they_are_the_operations_on_sets(spans: list[Span], others: list[Span]) -> None:
    assert bytes_of(intersect(spans, others)) == bytes_of(spans) & bytes_of(others)
    assert bytes_of(subtract(spans, others)) == bytes_of(spans) - bytes_of(others)
    assert_separate(intersect(spans, others))
    assert_separate(subtract(spans, others))


@given(SPANS, SPANS)
def test_parts_make_the_whole(spans: list[Span], others: list[Span]) -> None:
    inside, outside = intersect(spans, others), subtract(spans, others)
    assert merge(inside + outside) == spans
    assert total(inside) + total(outside) == total(spans)


@given(sections(), SPANS)
def test_addresses_and_places_undo_each_other(ram: list[Section], spans: list[Span]) -> None:
    places = Places(ram)
    known = merge(Span(one.address, one.length) for one in ram)
    assert places.addresses(places.of(spans)) == intersect(spans, known)
    assert total(places.of(spans)) == total(intersect(spans, known))
    assert places.of(places.addresses(places.all)) == places.all


@given(sections())
def test_each_byte_has_the_place_that_its_section_says(ram: list[Section]) -> None:
    places = Places(ram)
    for one in ram:
        for at in range(one.length):
            expected = Span((one.file << FILE_SHIFT) + one.offset + at, 1)
            assert places.of([Span(one.address + at, 1)]) == [expected]


@given(st.integers(0, 2**40), st.integers(1, 2**40))
def test_files_lie_apart(offset: int, length: int) -> None:
    (first,), (second,) = in_file(0, [(offset, length)]), in_file(1, [(offset, length)])
    assert first.end < second.start
