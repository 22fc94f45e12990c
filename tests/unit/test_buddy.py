"""The modelled zone: splitting and merging, the order of free lists, migrate types, watermarks, isolation."""

from __future__ import annotations

import pytest

from guest_images.buddy import Zone
from guest_images.free_lists import (
    MAX_PAGE_ORDER,
    PAGEBLOCK_PAGES,
    Block,
    FreeList,
    MigrateType,
    ModelError,
    Watermarks,
    aligned_blocks,
)

LARGEST = 1 << MAX_PAGE_ORDER
NONE = Watermarks(0, 0, 0)
MOVABLE, UNMOVABLE = MigrateType.MOVABLE, MigrateType.UNMOVABLE


def zone(blocks: int = 2, watermarks: Watermarks = NONE, *, put_back_to_tail: bool = True) -> Zone:
    return Zone("Normal", LARGEST, (1 + blocks) * LARGEST, watermarks, put_back_to_tail=put_back_to_tail)


def shape(zone: Zone, migrate_type: int = MOVABLE) -> dict[int, list[int]]:
    """Free lists that hold something: order to blocks, first to last, counted from the zone's start."""
    lists = {order: list(zone.list_of(order, migrate_type)) for order in range(MAX_PAGE_ORDER + 1)}
    return {order: [pfn - zone.start_pfn for pfn in pfns] for order, pfns in lists.items() if pfns}


def take(zone: Zone, order: int, migrate_type: MigrateType = MOVABLE) -> int:
    pfn = zone.allocate(order, migrate_type)
    assert pfn is not None
    return pfn


def test_a_free_list_is_a_ring() -> None:
    blocks = FreeList()
    for pfn in (2, 3, 4):
        blocks.add(pfn, to_tail=True)
    blocks.add(1, to_tail=False)
    assert list(blocks) == [1, 2, 3, 4]
    blocks.rotate_to_front(3)
    assert list(blocks) == [3, 4, 1, 2]
    blocks.rotate_to_front(3)
    assert list(blocks) == [3, 4, 1, 2]
    blocks.remove(4)
    blocks.add(9, to_tail=True)
    assert (list(blocks), len(blocks), blocks.following(2)) == ([3, 1, 2, 9], 4, 9)


def test_a_new_zone_is_free() -> None:
    assert shape(zone()) == {10: [0, LARGEST]}
    assert zone().free_pages == 2 * LARGEST


def test_a_zone_that_does_not_begin_at_a_largest_block() -> None:
    odd = Zone("odd", 512, 4096, NONE)
    odd.check()
    assert (odd.free_blocks(9), odd.free_blocks(10)) == (1, 3)
    assert [block.order for block in aligned_blocks(512, 2560)] == [9, 10, 9]


@pytest.mark.parametrize(("start", "end"), [(1, 512), (0, 0), (512, 513), (-512, 512), (1024, 512)])
def test_impossible_zones(start: int, end: int) -> None:
    with pytest.raises(ModelError, match="multiples of 512"):
        Zone("bad", start, end, NONE)


def test_splitting_leaves_the_upper_halves() -> None:
    normal = zone(1)
    assert take(normal, 7) == normal.start_pfn
    assert shape(normal) == {7: [128], 8: [256], 9: [512]}
    normal.check()


def test_merging_goes_all_the_way_up() -> None:
    normal = zone(1)
    orders: list[int] = []
    normal.on_free = orders.append
    pages = [take(normal, 0) for _ in range(4)]
    assert [page - normal.start_pfn for page in pages] == [0, 1, 2, 3]
    for page in (pages[0], pages[2], pages[1], pages[3]):
        normal.free(page)
        normal.check()
    assert orders == [0, 0, 1, 10]
    assert shape(normal) == {10: [0]}


def test_a_block_likely_to_merge_goes_to_the_tail() -> None:
    """buddy_merge_likely(): the pair above is free, so this one had better not be used soon."""
    normal = zone(1)
    pages = [take(normal, 0) for _ in range(512)]
    for index in (8, 16, 2, 3, 0):
        normal.free(pages[index])
    # 2 and 3 became the pair beside 0, so 0 waits at the tail; 16 came after 8 and is before it.
    assert shape(normal)[0] == [16, 8, 0]


def test_freeing_twice_is_an_error() -> None:
    normal = zone()
    page = take(normal, 3)
    normal.free(page)
    with pytest.raises(ModelError, match="free each block once"):
        normal.free(page)
    with pytest.raises(ModelError, match="free each block once"):
        normal.free(normal.start_pfn + 5)


def test_the_min_watermark_stops_allocation() -> None:
    normal = zone(1, Watermarks(1001, 1010, 1020))
    assert normal.allocate(4) == normal.start_pfn
    assert normal.allocate(3) is None  # 1008 - 7 must be more than 1001
    assert normal.allocate(2) is not None
    assert normal.allocate(0, mark=1010) is None


def test_pages_set_aside_for_high_orders_do_not_count() -> None:
    """__zone_watermark_unusable_free(): free, but not for those who ask with watermarks."""
    normal = zone(2, Watermarks(1000, 1000, 1000))
    normal.arrange([(Block(LARGEST, 10), MOVABLE), (Block(2 * LARGEST, 10), MigrateType.HIGHATOMIC)])
    normal.check()
    assert normal.free_pages == 2 * LARGEST
    assert normal.watermark_ok(0, 1023)
    assert not normal.watermark_ok(0, 1024)
    assert not normal.isolate(2 * LARGEST)


def test_watermarks_as_linux_sets_them() -> None:
    """sqrt(16 * KiB) KiB at the least, a thousandth of the zone between the marks."""
    assert Watermarks.of_linux(65536, 65536) == Watermarks(512, 640, 768)
    small = Watermarks.of_linux(4096, 1 << 20)
    assert small == Watermarks(8, 12, 16)


def test_an_unmovable_allocation_claims_the_largest_movable_block() -> None:
    normal = zone(2)
    page = take(normal, 0, UNMOVABLE)
    assert page == normal.start_pfn
    assert normal.migrate_type_of(page + 512) == UNMOVABLE
    assert shape(normal) == {10: [LARGEST]}
    assert shape(normal, UNMOVABLE)[9] == [512]
    normal.check()
    assert take(normal, 0, UNMOVABLE) == page + 1


def test_a_half_free_pageblock_is_claimed_whole() -> None:
    normal = Zone("Normal", 0, 1024, NONE)
    half = take(normal, 8)
    take(normal, 9)
    assert take(normal, 0, UNMOVABLE) == 256
    assert normal.migrate_type_of(half) == UNMOVABLE
    assert shape(normal) == {}
    normal.free(half)
    assert 8 in shape(normal, UNMOVABLE)
    normal.check()


def test_a_crowded_pageblock_is_stolen_from() -> None:
    """Less than half free and the rest movable: one page is taken, the pageblock stays movable."""
    normal = Zone("Normal", 0, PAGEBLOCK_PAGES, NONE)
    take(normal, 8)
    take(normal, 7)
    assert take(normal, 0, UNMOVABLE) == 384
    assert normal.migrate_type_of(384) == MOVABLE
    assert shape(normal)[6] == [448]
    normal.check()


def test_movable_allocations_steal_small_blocks() -> None:
    normal = Zone("Normal", 0, PAGEBLOCK_PAGES, NONE)
    pages = [take(normal, 0, UNMOVABLE) for _ in range(512)]
    normal.free(pages[7])
    assert take(normal, 0, MOVABLE) == 7
    assert normal.migrate_type_of(7) == UNMOVABLE


def test_isolating_and_putting_back() -> None:
    normal = zone(3)
    first = normal.start_pfn
    assert normal.isolate(first)
    assert normal.free_pages == 2 * LARGEST
    normal.check()
    assert normal.put_back(first, reported=True)
    assert normal.is_reported(first)
    assert shape(normal) == {10: [LARGEST, 2 * LARGEST, 0]}
    with pytest.raises(ModelError, match="drain each block once"):
        normal.put_back(first, reported=True)


def test_before_5_10_a_block_is_put_back_at_the_head() -> None:
    normal = zone(3, put_back_to_tail=False)
    second = normal.start_pfn + LARGEST
    normal.isolate(second)
    normal.put_back(second, reported=False)
    assert shape(normal) == {10: [LARGEST, 0, 2 * LARGEST]}
    assert not normal.is_reported(second)


def test_the_watermark_stops_isolation() -> None:
    """__isolate_free_page() wants min + the block above it, and a page more."""
    normal = zone(2, Watermarks(LARGEST - 1, 2000, 2000))
    assert normal.isolate(normal.start_pfn)
    assert not normal.isolate(normal.start_pfn + LARGEST)
    assert not zone(2, Watermarks(LARGEST, 2000, 2000)).isolate(LARGEST)


def test_the_mark_is_lost_with_the_place_on_the_list() -> None:
    normal = zone(2)
    halves = [take(normal, 9), take(normal, 9)]
    normal.free(halves[0])
    normal.isolate(halves[0])
    assert normal.put_back(halves[0], reported=True)
    page = take(normal, 0)
    assert page == halves[0]
    assert not normal.reported_blocks()
    normal.free(page)
    assert not normal.is_reported(halves[0])
    normal.isolate(halves[0])
    assert normal.put_back(halves[0], reported=True)
    normal.free(halves[1])  # merges: the larger block is news
    assert shape(normal) == {10: [0, LARGEST]}
    assert not normal.reported_blocks()


def test_a_block_that_merged_on_its_way_back_is_not_marked() -> None:
    normal = zone(2)
    halves = [take(normal, 9), take(normal, 9)]
    normal.free(halves[0])
    normal.isolate(halves[0])
    normal.free(halves[1])
    assert not normal.put_back(halves[0], reported=True)
    assert shape(normal) == {10: [LARGEST, 0]}
    normal.check()


def test_isolating_makes_a_pageblock_movable() -> None:
    """__isolate_free_page() of half a pageblock or more; the block returns to the movable list."""
    normal = zone(1)
    page = take(normal, 0, UNMOVABLE)
    other = normal.start_pfn + 512
    assert shape(normal, UNMOVABLE)[9] == [512]
    normal.isolate(other)
    normal.put_back(other, reported=True)
    assert (normal.migrate_type_of(other), normal.migrate_type_of(page)) == (MOVABLE, UNMOVABLE)
    assert shape(normal) == {9: [512]}
    normal.check()
    normal.free(page)  # order 9 and 9 merge, mergeable types both; the type is that of the page freed
    assert shape(normal, UNMOVABLE) == {10: [0]}
    normal.check()


def test_half_a_pageblock_takes_the_other_half_along() -> None:
    normal = Zone("Normal", 0, PAGEBLOCK_PAGES, NONE)
    take(normal, 0, UNMOVABLE)
    normal.isolate(256)
    assert shape(normal, UNMOVABLE) == {}
    assert sorted(shape(normal)) == list(range(8))
    normal.check()


def test_a_broken_zone_is_noticed() -> None:
    normal = zone()
    normal.free_pages += 1
    with pytest.raises(ModelError, match="counted free"):
        normal.check()
    normal = zone()
    normal._used[normal.start_pfn] = 0
    with pytest.raises(ModelError, match="lost or doubled"):
        normal.check()
    normal = zone()
    normal._block_types[0] = UNMOVABLE
    with pytest.raises(ModelError, match="unlike its pageblock"):
        normal.check()
    normal = zone()
    normal._reported.add(normal.start_pfn + 1)
    with pytest.raises(ModelError, match="marked as reported"):
        normal.check()
