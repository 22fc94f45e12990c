"""Properties of the modelled allocator, and of zones that are made from counts.

1. Whatever is allocated and freed in whatever order, each page is free or used, in one place, and buddies are merged.
2. When all is freed again, the zone is as one that was never used: largest blocks only, all pages free.
3. Allocations do not overlap, and are aligned to their size.
4. A zone made from counts has exactly these counts, whatever they are, as long as they fit; and the counts of any zone
   that came about by allocating and freeing can be used to make another.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from guest_images.buddy import Zone
from guest_images.free_lists import MAX_PAGE_ORDER, MigrateType, Watermarks
from guest_images.zone_layout import zone_from_counts

PAGES = 4 << MAX_PAGE_ORDER
NONE = Watermarks(0, 0, 0)
TYPES = (MigrateType.UNMOVABLE, MigrateType.MOVABLE, MigrateType.RECLAIMABLE)
ACTS = st.lists(
    st.one_of(
        st.tuples(st.integers(0, MAX_PAGE_ORDER), st.sampled_from(TYPES)),
        st.integers(0, 1 << 16),
    ),
    max_size=60,
)


def live(zone: Zone, acts: list[tuple[int, MigrateType] | int]) -> dict[int, int]:
    """Allocate for each pair, free for each number. Returns what is allocated at the end: first page to order."""
    used: dict[int, int] = {}
    for act in acts:
        if isinstance(act, tuple):
            pfn = zone.allocate(*act)
            if pfn is not None:
                assert pfn % (1 << act[0]) == 0
                used[pfn] = act[0]
        elif used:
            pfn = list(used)[act % len(used)]
            del used[pfn]
            zone.free(pfn)
    return used


def counts_of(zone: Zone) -> dict[MigrateType, tuple[int, ...]]:
    return {
        kind: tuple(len(zone.list_of(order, kind)) for order in range(MAX_PAGE_ORDER + 1))
        for kind in MigrateType
    }


@given(ACTS)
def test_no_page_is_lost_or_doubled(acts: list[tuple[int, MigrateType] | int]) -> None:
    zone = Zone("Normal", 0, PAGES, NONE)
    used = live(zone, acts)
    zone.check()
    pages = [page for pfn, order in used.items() for page in range(pfn, pfn + (1 << order))]
    assert len(pages) == len(set(pages)) == PAGES - zone.free_pages


@given(ACTS, st.randoms(use_true_random=False))
def test_everything_freed_is_everything_merged(
    acts: list[tuple[int, MigrateType] | int], dice: object
) -> None:
    zone = Zone("Normal", 512, PAGES, NONE)
    left = list(live(zone, acts))
    dice.shuffle(left)  # type: ignore[attr-defined]
    for pfn in left:
        zone.free(pfn)
    zone.check()
    assert zone.free_pages == PAGES - 512
    assert [zone.free_blocks(order) for order in range(MAX_PAGE_ORDER + 1)] == [0] * 9 + [1, 3]


@given(ACTS)
def test_counts_of_a_zone_make_another(acts: list[tuple[int, MigrateType] | int]) -> None:
    """Twice the size: the placement is greedy, and does not promise the tightest packing."""
    zone = Zone("Normal", 0, PAGES, NONE)
    live(zone, acts)
    copy = zone_from_counts("Normal", 0, 2 * PAGES, NONE, counts_of(zone))
    copy.check()
    assert counts_of(copy) == counts_of(zone)
    assert copy.free_pages == zone.free_pages


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.sampled_from(MigrateType),
        st.lists(st.integers(0, 3), min_size=MAX_PAGE_ORDER + 1, max_size=MAX_PAGE_ORDER + 1),
        max_size=3,
    )
)
def test_a_zone_has_the_counts_it_was_made_from(counts: dict[MigrateType, list[int]]) -> None:
    zone = zone_from_counts("Normal", 0, 64 << MAX_PAGE_ORDER, NONE, counts)
    zone.check()
    for kind, orders in counts.items():
        assert list(counts_of(zone)[kind]) == orders
