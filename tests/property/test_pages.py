"""Properties of the page arithmetic.

1. merge() returns sorted spans with a gap between any two, none of them empty.
2. merge() loses no byte and adds none.
3. spans_of_pfns() is merge() of one page for each frame number.
4. align_inward() lies inside its argument, begins and ends on page boundaries, and leaves out less than a page at
   each end if it leaves anything.
5. slices() are not empty, at most limit long, in order, and put together they are the span; every inner boundary is a
   multiple of limit, so that page-aligned spans give page-aligned slices.
"""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hostdev.pages import Span, align_inward, merge, slices, spans_of_pfns

PAGE = 4096
SMALL = st.builds(Span, st.integers(0, 200), st.integers(0, 40))
ANY = st.builds(Span, st.integers(0, 2**64), st.integers(0, 2**33))
PAGE_SIZES = st.sampled_from([4096, 65536, 2 << 20, 1 << 30])


def _bytes(spans: list[Span]) -> set[int]:
    return {byte for span in spans for byte in range(span.start, span.end)}


@given(st.lists(SMALL))
def test_merge_loses_and_adds_no_byte(spans: list[Span]) -> None:
    merged = merge(spans)
    assert _bytes(merged) == _bytes(spans)
    assert sum(span.length for span in merged) == len(_bytes(spans))


@given(st.lists(st.one_of(SMALL, ANY)))
def test_merged_spans_are_sorted_and_apart(spans: list[Span]) -> None:
    merged = merge(spans)
    assert all(span.length > 0 for span in merged)
    assert all(first.end < second.start for first, second in pairwise(merged))
    assert merge(merged) == merged


@given(st.lists(st.integers(0, 300)))
def test_frame_numbers_are_pages(pfns: list[int]) -> None:
    assert list(spans_of_pfns(pfns)) == merge(Span(pfn * PAGE, PAGE) for pfn in pfns)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_frame_numbers_of_any_size(pfns: list[int]) -> None:
    spans = list(spans_of_pfns(pfns))
    assert sum(span.length for span in spans) == len(set(pfns)) * PAGE
    assert all(any(span.start <= pfn * PAGE < span.end for span in spans) for pfn in pfns)


@given(ANY, PAGE_SIZES)
def test_alignment_goes_inward(span: Span, page_size: int) -> None:
    inside = align_inward(span, page_size)
    if inside.length == 0:
        first_boundary = -(-span.start // page_size) * page_size
        assert first_boundary + page_size > span.end
        return
    assert inside.start % page_size == inside.length % page_size == 0
    assert span.start <= inside.start < span.start + page_size
    assert span.end - page_size < inside.end <= span.end


@given(
    st.builds(Span, st.integers(0, 2**63), st.integers(0, 2**20)), st.sampled_from([4096, 1 << 16, 32 << 20])
)
def test_slices_partition(span: Span, limit: int) -> None:
    pieces = list(slices(span, limit))
    assert all(0 < piece.length <= limit for piece in pieces)
    assert sum(piece.length for piece in pieces) == span.length
    assert not pieces or (pieces[0].start, pieces[-1].end) == (span.start, span.end)
    for first, second in pairwise(pieces):
        assert first.end == second.start
        assert first.end % limit == 0
