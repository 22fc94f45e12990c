"""The page allocator of a modelled guest: one zone of Linux's buddy allocator, exact in what page reporting can see.

Exact: orders, migrate types, the order of every free list, splitting, merging, fallback to other migrate types, the
watermarks that stop an isolation, and the Reported mark, which is lost with a block's place on its list. Left out: the
per-CPU lists in front of the buddy lists, reclaim, compaction and NUMA.

It knows page frame numbers only, no bytes. page_reporting.py takes blocks off its lists, modelled_guest.py fills them.
Rules are those of mm/page_alloc.c, read at 00cb34b034a5 (2026); where v5.7 differs it is a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from guest_images.free_lists import (
    MAX_PAGE_ORDER,
    MERGEABLE_TYPES,
    PAGEBLOCK_ORDER,
    PAGEBLOCK_PAGES,
    TYPES,
    Block,
    FreeList,
    MigrateType,
    ModelError,
    Watermarks,
    aligned_blocks,
)

_FALLBACKS = {
    MigrateType.UNMOVABLE: (MigrateType.RECLAIMABLE, MigrateType.MOVABLE),
    MigrateType.MOVABLE: (MigrateType.RECLAIMABLE, MigrateType.UNMOVABLE),
    MigrateType.RECLAIMABLE: (MigrateType.UNMOVABLE, MigrateType.MOVABLE),
}


class Zone:
    """A range of page frames with its free lists. New, all of it is free and movable.

    put_back_to_tail: where an isolated block returns on its list. At the tail since 47b6a24a2382 (v5.10); before that
    at the head, unless the block is likely to merge soon.
    """

    def __init__(
        self,
        name: str,
        start_pfn: int,
        end_pfn: int,
        watermarks: Watermarks,
        *,
        put_back_to_tail: bool = True,
    ) -> None:
        """start_pfn, end_pfn: the pages, end not included. Raises ModelError unless both are at a pageblock."""
        if not 0 <= start_pfn < end_pfn or start_pfn % PAGEBLOCK_PAGES or end_pfn % PAGEBLOCK_PAGES:
            raise ModelError(
                f"zone {name} cannot go from page {start_pfn} to {end_pfn}: give multiples of {PAGEBLOCK_PAGES}"
            )
        self.name = name
        self.start_pfn = start_pfn
        self.end_pfn = end_pfn
        self.watermarks = watermarks
        self.put_back_to_tail = put_back_to_tail
        # Pages on the free lists but those of ISOLATE, which the kernel does not count either.
        self.free_pages = 0
        self.isolated: dict[int, int] = {}
        self.on_free: Callable[[int], None] | None = None
        self._reported: set[int] = set()
        self._lists = [FreeList() for _ in range((MAX_PAGE_ORDER + 1) * TYPES)]
        # First page of a block to order * TYPES + migrate type: of the free list it is on, or of its allocation.
        self._free: dict[int, int] = {}
        self._used: dict[int, int] = {}
        self._block_types = bytearray([MigrateType.MOVABLE]) * ((end_pfn - start_pfn) >> PAGEBLOCK_ORDER)
        self._has_highatomic = False
        for block in aligned_blocks(start_pfn, end_pfn):
            self._add(block.pfn, block.order, MigrateType.MOVABLE, to_tail=True)
            self.free_pages += block.pages

    def arrange(self, free: Iterable[tuple[Block, MigrateType]]) -> None:
        """Begin anew with these free blocks, each last on its list, and all else used. Nobody is notified.

        free: by ascending address, no two of them to be merged, each block's type the one of its pageblocks.
        """
        self._lists = [FreeList() for _ in self._lists]
        self._free.clear()
        self._used.clear()
        self._reported.clear()
        self.free_pages, end = 0, self.start_pfn
        for block, migrate_type in free:
            self._use(end, block.pfn)
            self._set_type(block.pfn, block.order, migrate_type)
            self._add(block.pfn, block.order, migrate_type, to_tail=True)
            self.free_pages += block.pages if migrate_type != MigrateType.ISOLATE else 0
            end = block.pfn + block.pages
        self._use(end, self.end_pfn)

    def mark_reported(self, pfn: int) -> None:
        """Mark a free block as reported before. Raises ModelError if none begins at pfn."""
        if pfn not in self._free:
            raise ModelError(f"page {pfn} of zone {self.name} begins no free block: mark what is on a list")
        self._reported.add(pfn)

    def _use(self, start_pfn: int, end_pfn: int) -> None:
        for block in aligned_blocks(start_pfn, end_pfn):
            self._used[block.pfn] = block.order * TYPES + MigrateType.MOVABLE

    # What is where

    @property
    def pages(self) -> int:
        """Number of pages in the zone."""
        return self.end_pfn - self.start_pfn

    def list_of(self, order: int, migrate_type: int) -> FreeList:
        """One free list. To be read; its blocks move through the methods below."""
        return self._lists[order * TYPES + migrate_type]

    def free_blocks(self, order: int) -> int:
        """Number of free blocks of an order, of all migrate types (nr_free)."""
        return sum(len(self._lists[order * TYPES + migrate_type]) for migrate_type in range(TYPES))

    def used_blocks(self) -> Iterator[Block]:
        """The allocated blocks, oldest first."""
        return (Block(pfn, key // TYPES) for pfn, key in self._used.items())

    def is_reported(self, pfn: int) -> bool:
        """Return whether the free block that begins at pfn carries the Reported mark."""
        return pfn in self._reported

    def reported_blocks(self) -> set[int]:
        """First pages of all blocks that carry the Reported mark."""
        return set(self._reported)

    def order_of(self, pfn: int) -> int | None:
        """The order of the free block that begins at pfn; None if none does."""
        key = self._free.get(pfn)
        return None if key is None else key // TYPES

    def migrate_type_of(self, pfn: int) -> int:
        """The migrate type of the pageblock that pfn is in."""
        return self._block_types[(pfn - self.start_pfn) >> PAGEBLOCK_ORDER]

    def watermark_ok(self, order: int, mark: int) -> bool:
        """Tell whether the free pages stay above mark, as zone_watermark_ok() does for an order and no reserves.

        mark: pages. Pages set aside for high-order atomic allocations do not count as free.
        """
        return self.free_pages - ((1 << order) - 1) - self._highatomic_pages() > mark

    def _highatomic_pages(self) -> int:
        if not self._has_highatomic:
            return 0
        lists = self._lists[MigrateType.HIGHATOMIC :: TYPES]
        return sum(len(blocks) << order for order, blocks in enumerate(lists))

    # Allocating and freeing

    def allocate(
        self, order: int, migrate_type: MigrateType = MigrateType.MOVABLE, mark: int | None = None
    ) -> int | None:
        """Allocate a block and return its first page; None where the watermark or fragmentation forbids.

        mark: pages that must stay free, the zone's min watermark unless given.
        """
        if not self.watermark_ok(order, self.watermarks.min if mark is None else mark):
            return None
        pfn = self._take_smallest(order, migrate_type)
        if pfn is None and migrate_type in _FALLBACKS:
            pfn = self._claim(order, migrate_type)
            if pfn is None:
                pfn = self._steal(order, migrate_type)
        if pfn is not None:
            self._used[pfn] = order * TYPES + migrate_type
        return pfn

    def free(self, pfn: int) -> None:
        """Free an allocated block. Raises ModelError if no allocation begins at pfn."""
        key = self._used.pop(pfn, None)
        if key is None:
            raise ModelError(
                f"page {pfn} of zone {self.name} is freed but not allocated: free each block once"
            )
        order = self._release(pfn, key // TYPES, self.migrate_type_of(pfn), to_tail=False)
        if self.on_free is not None:
            self.on_free(order)

    def _release(self, pfn: int, order: int, migrate_type: int, *, to_tail: bool) -> int:
        """__free_one_page(): merge with free buddies, then on to a list. Returns the order it became."""
        if migrate_type != MigrateType.ISOLATE:
            self.free_pages += 1 << order
        free = self._free
        while order < MAX_PAGE_ORDER:
            buddy = pfn ^ (1 << order)
            key = free.get(buddy)
            if key is None or key // TYPES != order:
                break
            if order >= PAGEBLOCK_ORDER and key % TYPES != migrate_type:
                if max(key % TYPES, migrate_type) >= MERGEABLE_TYPES:
                    break
                self._set_type(buddy, order, migrate_type)
            self._remove(buddy)
            pfn &= buddy
            order += 1
        self._add(pfn, order, migrate_type, to_tail=to_tail or self._merge_is_likely(pfn, order))
        return order

    def _merge_is_likely(self, pfn: int, order: int) -> bool:
        """buddy_merge_likely(): is the buddy of the block that this one and its buddy would make free?"""
        if order >= MAX_PAGE_ORDER - 1:
            return False
        parent = pfn & ~(1 << order)
        key = self._free.get(parent ^ (2 << order))
        return key is not None and key // TYPES == order + 1

    def _add(self, pfn: int, order: int, migrate_type: int, *, to_tail: bool) -> None:
        key = order * TYPES + migrate_type
        self._free[pfn] = key
        self._lists[key].add(pfn, to_tail=to_tail)

    def _remove(self, pfn: int) -> int:
        """Take a block off its list, and its Reported mark with it. Returns the list's key."""
        key = self._free.pop(pfn)
        self._lists[key].remove(pfn)
        self._reported.discard(pfn)
        return key

    def _take(self, pfn: int, order: int, migrate_type: int) -> int:
        """Take 2**order pages from the front of a free block; the rest goes on the lists of migrate_type (expand())."""
        high = self._remove(pfn) // TYPES
        while high > order:
            high -= 1
            self._add(pfn + (1 << high), high, migrate_type, to_tail=False)
        self.free_pages -= 1 << order
        return pfn

    # Choosing a block: __rmqueue()

    def _take_smallest(self, order: int, migrate_type: int) -> int | None:
        for key in range(order * TYPES + migrate_type, len(self._lists), TYPES):
            pfn = self._lists[key].following(FreeList.HEAD)
            if pfn >= 0:
                return self._take(pfn, order, migrate_type)
        return None

    def _fallback(self, order: int, migrate_type: MigrateType) -> tuple[int, MigrateType] | None:
        for other in _FALLBACKS[migrate_type]:
            pfn = self.list_of(order, other).following(FreeList.HEAD)
            if pfn >= 0:
                return pfn, other
        return None

    def _claim(self, order: int, migrate_type: MigrateType) -> int | None:
        """__rmqueue_claim(): make a whole pageblock of another type ours, from the largest free block down."""
        for current in range(MAX_PAGE_ORDER, order - 1, -1):
            if current < PAGEBLOCK_ORDER // 2 and migrate_type == MigrateType.MOVABLE:
                return None
            found = self._fallback(current, migrate_type)
            if found is None:
                continue
            if current >= PAGEBLOCK_ORDER:
                self._set_type(found[0], current, migrate_type)
                return self._take(found[0], order, migrate_type)
            if self._claim_pageblock(*found, migrate_type):
                return self._take_smallest(order, migrate_type)
        return None

    def _claim_pageblock(self, pfn: int, old: MigrateType, new: MigrateType) -> bool:
        """try_to_claim_block(): turn a pageblock if at least half of it is free or alike."""
        free, movable = self._census(pfn)
        if new == MigrateType.MOVABLE:
            alike = movable
        else:
            alike = PAGEBLOCK_PAGES - free - movable if old == MigrateType.MOVABLE else 0
        if free + alike < PAGEBLOCK_PAGES // 2:
            return False
        self._move_pageblock(pfn, new)
        return True

    def _census(self, pfn: int) -> tuple[int, int]:
        """Count free pages, and pages of movable allocations, in the pageblock of pfn."""
        free = movable = 0
        start = pfn & -PAGEBLOCK_PAGES
        for page in range(start, start + PAGEBLOCK_PAGES):
            if page in self._free:
                free += 1 << self._free[page] // TYPES
            elif self._used.get(page, 0) % TYPES == MigrateType.MOVABLE:
                movable += 1 << self._used[page] // TYPES
        return free, movable

    def _steal(self, order: int, migrate_type: MigrateType) -> int | None:
        """__rmqueue_steal(): one block of another type, which stays of that type."""
        for current in range(order, MAX_PAGE_ORDER + 1):
            found = self._fallback(current, migrate_type)
            if found is not None:
                return self._take(found[0], order, found[1])
        return None

    def _set_type(self, pfn: int, order: int, migrate_type: int) -> None:
        """Set the migrate type of the pageblocks that a block touches."""
        self._has_highatomic |= migrate_type == MigrateType.HIGHATOMIC
        first = (pfn - self.start_pfn) >> PAGEBLOCK_ORDER
        for index in range(first, first + max(1, 1 << order >> PAGEBLOCK_ORDER)):
            self._block_types[index] = migrate_type

    def _move_pageblock(self, pfn: int, migrate_type: int) -> None:
        """Move the free blocks of a pageblock to another type's lists; their Reported marks stay (move_to_free_list)."""
        start = pfn & -PAGEBLOCK_PAGES
        self._set_type(start, PAGEBLOCK_ORDER, migrate_type)
        for page in range(start, start + PAGEBLOCK_PAGES):
            key = self._free.get(page)
            if key is not None and key // TYPES <= PAGEBLOCK_ORDER:
                self._lists[key].remove(page)
                self._add(page, key // TYPES, migrate_type, to_tail=True)

    # Isolation: what page reporting does

    def isolate(self, pfn: int) -> bool:
        """__isolate_free_page(): pull a free block off its list. False where the min watermark forbids.

        A block of half a pageblock or more makes its pageblocks movable, so that it returns to another list.
        """
        key = self._free[pfn]
        order = key // TYPES
        if key % TYPES != MigrateType.ISOLATE:
            if not self.watermark_ok(0, self.watermarks.min + (1 << order)):
                return False
            self.free_pages -= 1 << order
        self._remove(pfn)
        self.isolated[pfn] = order
        if order >= PAGEBLOCK_ORDER - 1:
            self._make_movable(pfn, order)
        return True

    def _make_movable(self, pfn: int, order: int) -> None:
        for page in range(pfn, pfn + (1 << order), PAGEBLOCK_PAGES):
            if self.migrate_type_of(page) >= MERGEABLE_TYPES:
                continue
            if order < PAGEBLOCK_ORDER:
                self._move_pageblock(page, MigrateType.MOVABLE)
            else:
                self._set_type(page, PAGEBLOCK_ORDER, MigrateType.MOVABLE)

    def put_back(self, pfn: int, *, reported: bool) -> bool:
        """Return an isolated block, marked as reported if it is and did not merge. Returns whether it was marked.

        Nobody is notified (FPI_SKIP_REPORT_NOTIFY). Raises ModelError if the block is not isolated.
        """
        order = self.isolated.pop(pfn, None)
        if order is None:
            raise ModelError(f"page {pfn} is put back but not isolated: drain each block once")
        self._release(pfn, order, self.migrate_type_of(pfn), to_tail=self.put_back_to_tail)
        if reported and self.order_of(pfn) == order:
            self._reported.add(pfn)
            return True
        return False

    def check(self) -> None:
        """Prove that each page is free, used or isolated, in one place. Raises ModelError. For tests: it is slow."""
        self._check_cover()
        for pfn, key in self._free.items():
            order, migrate_type = divmod(key, TYPES)
            if self.migrate_type_of(pfn) != migrate_type:
                raise ModelError(f"block {pfn} is on a list of type {migrate_type}, unlike its pageblock")
            buddy = self._free.get(pfn ^ (1 << order))
            if order < PAGEBLOCK_ORDER and buddy is not None and buddy // TYPES == order:
                raise ModelError(
                    f"free blocks {pfn} and {pfn ^ (1 << order)} of order {order} are not merged"
                )
        if not self._reported <= self._free.keys():
            raise ModelError("a block that is not free is marked as reported")

    def _check_cover(self) -> None:
        listed = [Block(pfn, n // TYPES) for n, blocks in enumerate(self._lists) for pfn in blocks]
        counted = sum(1 << key // TYPES for key in self._free.values() if key % TYPES != MigrateType.ISOLATE)
        if sorted(listed) != sorted(Block(pfn, key // TYPES) for pfn, key in self._free.items()):
            raise ModelError(f"zone {self.name}: the free lists do not hold the free blocks")
        if counted != self.free_pages:
            raise ModelError(f"zone {self.name}: {self.free_pages} pages counted free, {counted} listed")
        page = self.start_pfn
        for block in sorted(
            [*listed, *self.used_blocks(), *(Block(*item) for item in self.isolated.items())]
        ):
            if block.pfn != page or block.pfn % block.pages:
                raise ModelError(f"zone {self.name}: pages lost or doubled between {page} and {block.pfn}")
            page += block.pages
        if page != self.end_pfn:
            raise ModelError(f"zone {self.name}: pages lost from {page} on")
