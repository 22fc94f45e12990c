"""Properties of the proof that no hole is a page in use.

Of any flags, holes and releases, page by page:

1. Lost are exactly the pages that both readings call written, that were no data at the pause and not released before it.
2. Judged and churn are separate: churn is what the readings call differently, and what was released.
3. A page that is free, in the balloon, or of a kind that says nothing is never lost, whatever else is set.
4. With init_on_free nothing is judged that is not judged without.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from balloonlab.measure import verify_pages as pages
from balloonlab.measure.ranges import PAGE, Places
from balloonlab.measure.verify_pages import Flags, Use, check_pages, judge_pages, survey, use_of
from hostdev.pages import Span, merge
from qmp_glue.ram import Section

ANONYMOUS = pages.UPTODATE | pages.LRU | pages.ANON
CACHE = pages.UPTODATE | pages.LRU
BITS = (
    pages.LRU, pages.UPTODATE, pages.SLAB, pages.BUDDY, pages.ANON, pages.HUGE, pages.HWPOISON,
    pages.NOPAGE, pages.THP, pages.OFFLINE, pages.ZERO_PAGE, pages.PGTABLE, pages.RESERVED,
)  # fmt: skip
ANY_FLAGS = st.lists(st.sampled_from(BITS), max_size=4).map(sum)
FLAGS = st.one_of(
    st.sampled_from([0, ANONYMOUS, CACHE, pages.BUDDY, pages.PGTABLE, pages.THP | pages.ANON]), ANY_FLAGS
)
COUNT, FIRST = 16, 100
PLACES = Places([Section(FIRST * PAGE, COUNT * PAGE, 1, 7 * PAGE)])
NUMBERS = st.sets(st.integers(0, COUNT - 1))


def addresses(numbers: set[int]) -> list[Span]:
    return merge(Span((FIRST + number) * PAGE, PAGE) for number in numbers)


@st.composite
def readings(draw: st.DrawFn) -> Flags:
    before = draw(st.lists(FLAGS, min_size=COUNT, max_size=COUNT))
    after = [draw(FLAGS) if draw(st.integers(0, 3)) == 0 else flags for flags in before]
    return Flags(FIRST, before, after)


@given(readings(), NUMBERS, NUMBERS, st.booleans())
def test_pages_are_judged_one_by_one(
    reading: Flags, held: set[int], released: set[int], init_on_free: bool
) -> None:
    found = judge_pages(
        survey([reading], init_on_free=init_on_free), PLACES.of(addresses(held)), addresses(released), PLACES
    )
    uses = [
        (use_of(one, init_on_free=init_on_free), use_of(other, init_on_free=init_on_free))
        for one, other in zip(reading.before, reading.after, strict=True)
    ]
    changed = {number for number, (one, other) in enumerate(uses) if one is not other}
    written = {number for number, pair in enumerate(uses) if pair == (Use.WRITTEN, Use.WRITTEN)}
    lost = written - released - held
    assert found.lost == tuple(PLACES.of(addresses(lost)))
    assert found.judged == len(written - released) * PAGE
    assert found.churn == len(changed | written & released) * PAGE
    for use in Use:
        mine = {number for number, pair in enumerate(uses) if pair == (use, use)} - held
        assert found.holes[use] == len(mine) * PAGE
    check = check_pages(found, PLACES)
    if lost:
        assert check.outcome == "fail"
        assert f"guest address {(FIRST + min(lost)) * PAGE:#x}" in check.message
    else:
        assert check.outcome == ("skip" if found.is_restless or not found.judged else "pass")


@given(ANY_FLAGS, st.booleans())
def test_what_says_nothing_is_not_judged(flags: int, init_on_free: bool) -> None:
    for bit in (
        pages.BUDDY,
        pages.OFFLINE,
        pages.SLAB,
        pages.HUGE,
        pages.NOPAGE,
        pages.ZERO_PAGE,
        pages.RESERVED,
    ):
        assert use_of(flags | bit, init_on_free=init_on_free) is not Use.WRITTEN


@given(ANY_FLAGS)
def test_with_init_on_free_less_is_judged(flags: int) -> None:
    if use_of(flags, init_on_free=True) is Use.WRITTEN:
        assert use_of(flags) is Use.WRITTEN


def test_the_kinds_that_were_written() -> None:
    written = [ANONYMOUS, CACHE, pages.PGTABLE, pages.THP | pages.ANON, ANONYMOUS | pages.THP]
    assert {use_of(flags) for flags in written} == {Use.WRITTEN}
    assert [flags for flags in written if use_of(flags, init_on_free=True) is Use.WRITTEN] == [CACHE]
    assert use_of(0) is use_of(pages.UPTODATE) is use_of(pages.LRU) is use_of(pages.ANON) is Use.OTHER
    assert use_of(pages.BUDDY | pages.UPTODATE) is Use.FREE  # PG_reported is PG_uptodate's bit
    assert use_of(pages.OFFLINE) is Use.BALLOON
