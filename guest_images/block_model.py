"""The modelled guest by pageblocks instead of pages: for fleets that no page-exact model would finish. Counted only.

Zones, watermarks, merging, the Reported mark and page reporting are the page-exact ones: here they hold pageblocks of
2 MiB and larger blocks. What is new is what a program holds in smaller pieces. A pageblock that serves such pieces is
one allocation of its zone, of which only is known how many pages are in use, and how many were ever since it was last
reported: it counts, where buddy.py knows each page. So it can be cheap by the number of pages, and differs in this:

    a smaller piece fits where enough pages are free, whether they lie together or not; which pageblock of those serves
    it is random, where a kernel goes by what was freed last
    a pageblock's pages are used again before those that nobody has touched yet

What that costs in exactness is measured in tests/unit/test_block_model.py. Reports of less than a pageblock
cannot be told: the reporting order must be 9 or 10.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guest_images.buddy import Zone
from guest_images.event_loop import EventLoop
from guest_images.free_lists import (
    PAGE_SIZE,
    PAGEBLOCK_ORDER,
    PAGEBLOCK_PAGES,
    Block,
    ModelError,
)
from guest_images.guest_pages import AccountedPages
from guest_images.modelled_guest import ModelledGuest, zones_of
from guest_images.page_reporting import Parameters
from guest_images.workloads import HUGE, Holding, hold

# Draws for a pageblock with room before all are searched: most have room for most pieces.
_DRAWS = 8


class TouchedBlocks(AccountedPages):
    """How many pages of each pageblock the host holds."""

    def __init__(self, memory_bytes: int) -> None:
        super().__init__(0)
        self._memory_bytes = memory_bytes
        self._touched = array("H", bytes(2 * (memory_bytes // (PAGEBLOCK_PAGES * PAGE_SIZE))))

    @property
    def memory_bytes(self) -> int:
        """Size of the guest's memory."""
        return self._memory_bytes

    def touch(self, pfn: int, pages: int) -> None:
        """So many pages of the pageblock at pfn are in use: the host holds as many at least."""
        index = pfn >> PAGEBLOCK_ORDER
        if pages > self._touched[index]:
            self._count += pages - self._touched[index]
            self._touched[index] = pages

    def _flag(self, block: Block, value: int) -> None:
        for index in range(block.pfn >> PAGEBLOCK_ORDER, (block.pfn + block.pages) >> PAGEBLOCK_ORDER):
            self._count += PAGEBLOCK_PAGES * value - self._touched[index]
            self._touched[index] = PAGEBLOCK_PAGES * value


@dataclass(slots=True)
class Shared:
    """A pageblock that serves pieces smaller than it.

    free: its pages that no piece has. place: its index in the list of those with free pages, None if it has none.
    """

    pfn: int
    zone: Zone
    free: int = PAGEBLOCK_PAGES
    place: int | None = None


class BlockGuest(ModelledGuest):
    """A guest whose pieces of less than a pageblock are counted by the pageblock they are in.

    free_bytes includes what is free in shared pageblocks, as a kernel's count does, watermarks too.
    """

    def __init__(
        self, memory_bytes: int, parameters: Parameters, *, loop: EventLoop | None = None, seed: int = 0
    ) -> None:
        """Raises ModelError for a reporting order below the pageblock's, or a size that cannot be."""
        if parameters.order < PAGEBLOCK_ORDER:
            raise ModelError(
                f"pageblocks cannot tell reports of order {parameters.order}: give order {PAGEBLOCK_ORDER} or more, "
                "or model pages"
            )
        zones = zones_of(memory_bytes, parameters.variant)
        touched = TouchedBlocks(memory_bytes)
        super().__init__(zones, parameters, touched, loop=loop, seed=seed)
        self._touched = touched
        self._shared: dict[int, Shared] = {}
        # For each zone, the shared pageblocks with free pages, in no order.
        self._partial: dict[str, list[Shared]] = {zone.name: [] for zone in zones}

    def take_pieces(self, order: int, count: int) -> Iterator[tuple[int, int]]:
        """Take up to count pieces of an order below the pageblock's; yields a pageblock's pfn and how many in it.

        As allocate(): from the highest zone down to the low watermarks, then to the min ones, then by reclaim.
        """
        while count:
            found = self._find_shared(order)
            if found is None and any(reclaimer(1 << order) for reclaimer in self.reclaimers):
                found = self._find_shared(order)
            if found is None:
                self.failed_allocations += 1
                return
            shared, room = found
            taken = min(count, room)
            self._resize(shared, -(taken << order))
            count -= taken
            yield shared.pfn, taken

    def free_pieces(self, pfn: int, order: int, count: int) -> None:
        """Free pieces of an order below the pageblock's; a pageblock without pieces returns to its zone."""
        self._resize(self._shared[pfn], count << order)

    def _find_shared(self, order: int) -> tuple[Shared, int] | None:
        """A shared pageblock with room, and for how many pieces, by the watermarks as well."""
        for low in (True, False):
            for zone in reversed(self.zones):
                mark = zone.watermarks.low if low else zone.watermarks.min
                spare = (zone.free_pages - mark) >> order
                shared = self._with_room(zone, order) or self._share_another(zone) if spare > 0 else None
                if shared is not None:
                    return shared, min(spare, shared.free >> order)
        return None

    def _with_room(self, zone: Zone, order: int) -> Shared | None:
        """Any with room: the first of some random draws, or by a search from the last draw on."""
        partial, drawn = self._partial[zone.name], 0
        for _ in range(_DRAWS if partial else 0):
            drawn = int(self.random.random() * len(partial))
            if partial[drawn].free >> order:
                return partial[drawn]
        return next((one for one in partial[drawn:] + partial[:drawn] if one.free >> order), None)

    def _share_another(self, zone: Zone) -> Shared | None:
        # No mark: to share a pageblock uses none of its pages, and whoever takes pieces has looked at the watermark.
        pfn = zone.allocate(PAGEBLOCK_ORDER, mark=0)
        if pfn is None:
            return None
        shared = self._shared[pfn] = Shared(pfn, zone)
        zone.free_pages += PAGEBLOCK_PAGES
        self._list(shared)
        return shared

    def _resize(self, shared: Shared, pages: int) -> None:
        """So many pages of a shared pageblock become free, or are taken if less than 0."""
        shared.free += pages
        shared.zone.free_pages += pages
        self._touched.touch(shared.pfn, PAGEBLOCK_PAGES - shared.free)
        if shared.free in (0, PAGEBLOCK_PAGES):
            self._unlist(shared)
        elif shared.place is None:
            self._list(shared)
        if shared.free == PAGEBLOCK_PAGES:
            del self._shared[shared.pfn]
            shared.zone.free_pages -= PAGEBLOCK_PAGES
            shared.zone.free(shared.pfn)

    def _list(self, shared: Shared) -> None:
        partial = self._partial[shared.zone.name]
        shared.place = len(partial)
        partial.append(shared)

    def _unlist(self, shared: Shared) -> None:
        """Take one out of its list; the last takes its place."""
        if shared.place is None:
            return
        partial = self._partial[shared.zone.name]
        last = partial.pop()
        if last is not shared:
            partial[shared.place], last.place = last, shared.place
        shared.place = None


class BlockHolding(Holding):
    """Memory that a program of a BlockGuest holds: numbers of pieces by pageblock and order."""

    def __init__(self, guest: BlockGuest) -> None:
        super().__init__(guest)
        self._blocks_of = guest
        # By first page of the pageblock and order.
        self.pieces: Counter[tuple[int, int]] = Counter()

    def grow(self, size: int, orders: tuple[int, ...] = HUGE) -> bool:
        """Take size more bytes, in pieces of the first order that fits and is to be had. False if memory ran out."""
        wanted = self.bytes + size
        while self.bytes < wanted:
            left = wanted - self.bytes
            fitting = [order for order in orders if PAGE_SIZE << order <= left] or [0]
            if not any(self._take_many(order, max(1, left // (PAGE_SIZE << order))) for order in fitting):
                return False
        return True

    def _take_many(self, order: int, count: int) -> int:
        """Take up to count pieces. Returns how many."""
        taken = 0
        for pfn, number in self._offers(order, count):
            self.pieces[pfn, order] += number
            taken += number
        self.bytes += taken * (PAGE_SIZE << order)
        return taken

    def _offers(self, order: int, count: int) -> Iterator[tuple[int, int]]:
        if order < PAGEBLOCK_ORDER:
            yield from self._blocks_of.take_pieces(order, count)
            return
        for _ in range(count):
            block = self._blocks_of.allocate(order)
            if block is None:
                return
            yield block.pfn, 1

    def shrink(self, size: int) -> int:
        """Free pieces at random until size bytes are free, or nothing is left. Returns the bytes freed."""
        before = self.bytes
        while self.pieces and before - self.bytes < size:
            total = self.pieces.total()
            count = min(total, max(1, (size - before + self.bytes) * total // self.bytes))
            alike = len({order for _pfn, order in self.pieces}) == 1
            if alike and count > total // 2:
                kept = Counter(self._draw(total - count))
                for key, number in list(self.pieces.items()):
                    self._free_many(key, number - kept[key])
                continue
            for key in self._draw(count):
                self._free_many(key, 1)
                if before - self.bytes >= size:
                    break
        return before - self.bytes

    def _draw(self, count: int) -> Sequence[tuple[int, int]]:
        """Draw pieces at random, none twice."""
        return self._guest.random.sample(list(self.pieces), count, counts=list(self.pieces.values()))

    def _free_many(self, key: tuple[int, int], count: int) -> None:
        pfn, order = key
        if not count:
            return
        self.pieces[key] -= count
        if not self.pieces[key]:
            del self.pieces[key]
        self.bytes -= count * (PAGE_SIZE << order)
        if order < PAGEBLOCK_ORDER:
            self._blocks_of.free_pieces(pfn, order, count)
        else:
            self._blocks_of.free(Block(pfn, order))

    def adopt(self, other: Holding) -> None:
        """Take over what another one holds."""
        assert isinstance(other, BlockHolding)
        self.pieces += other.pieces
        self.bytes += other.bytes
        other.pieces, other.bytes = Counter(), 0

    def clear(self) -> None:
        """Free everything, oldest first, as a process that ends."""
        for key, number in list(self.pieces.items()):
            self._free_many(key, number)


@hold.register
def _hold_blocks(guest: BlockGuest) -> Holding:
    return BlockHolding(guest)
