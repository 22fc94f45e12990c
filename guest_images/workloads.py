"""What modelled guests do with their memory: seeded, so that a run repeats to the byte.

A workload is started once on a guest and then lives by the guest's event loop. Sizes are shares of the guest's memory,
times are seconds. Randomness is the guest's own generator, so that guests in one loop do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Protocol

from guest_images.free_lists import PAGE_SIZE, PAGEBLOCK_ORDER, Block, MigrateType, ModelError
from guest_images.modelled_guest import ModelledGuest

# Orders of anonymous memory: transparent huge pages, large folios, single pages. Tried from the first down.
HUGE = (PAGEBLOCK_ORDER, 4, 2, 0)
SMALL = (0,)
# A mixture as programs make it; the number is how often, of 100.
_MIXTURE = ((PAGEBLOCK_ORDER, 10), (4, 30), (2, 30), (0, 30))


class WorkloadError(ModelError):
    """A workload is unknown, or cannot be."""


class Workload(Protocol):
    """Something that can be started on a guest."""

    def start(self, guest: ModelledGuest) -> None:
        """Take up work: allocate, and ask the guest's loop for more."""


class Holding:
    """Memory that a program of the guest holds."""

    def __init__(self, guest: ModelledGuest, migrate_type: MigrateType = MigrateType.MOVABLE) -> None:
        self._guest = guest
        self._migrate_type = migrate_type
        self._blocks: list[Block] = []
        self.bytes = 0

    def grow(self, size: int, orders: tuple[int, ...] = HUGE) -> bool:
        """Take size more bytes, in blocks of the first order that fits and is to be had. False if memory ran out."""
        wanted = self.bytes + size
        while self.bytes < wanted:
            block = self._take([order for order in orders if PAGE_SIZE << order <= wanted - self.bytes])
            if block is None:
                return False
            self._blocks.append(block)
            self.bytes += block.pages * PAGE_SIZE
        return True

    def _take(self, orders: list[int]) -> Block | None:
        for order in orders or [0]:
            block = self._guest.allocate(order, self._migrate_type)
            if block is not None:
                return block
        return None

    def grow_mixed(self, size: int) -> bool:
        """Take size more bytes in blocks of mixed orders. False if memory ran out."""
        wanted, dice = self.bytes + size, self._guest.random
        orders, weights = zip(*_MIXTURE, strict=True)
        while self.bytes < wanted:
            (order,) = dice.choices(orders, weights)
            if not self.grow(PAGE_SIZE << order, tuple(range(order, -1, -1))):
                return False
        return True

    def shrink(self, size: int) -> int:
        """Free blocks at random until size bytes are free, or nothing is left. Returns the bytes freed."""
        before, dice, blocks = self.bytes, self._guest.random, self._blocks
        while blocks and before - self.bytes < size:
            chosen = dice.randrange(len(blocks))
            blocks[chosen], blocks[-1] = blocks[-1], blocks[chosen]
            block = blocks.pop()
            self._guest.free(block)
            self.bytes -= block.pages * PAGE_SIZE
        return before - self.bytes

    def adopt(self, other: Holding) -> None:
        """Take over what another one holds."""
        self._blocks += other._blocks
        self.bytes += other.bytes
        other._blocks, other.bytes = [], 0

    def clear(self) -> None:
        """Free everything, oldest first, as a process that ends."""
        blocks, self._blocks, self.bytes = self._blocks, [], 0
        for block in blocks:
            self._guest.free(block)

    def resize(self, size: int) -> None:
        """Grow or shrink to about size bytes."""
        if size > self.bytes:
            self.grow(size - self.bytes)
        else:
            self.shrink(self.bytes - size)


@singledispatch
def hold(guest: ModelledGuest) -> Holding:
    """What a program of this guest holds, nothing yet. Another model of a guest has a holding of its own."""
    return Holding(guest)


def _every(guest: ModelledGuest, period: float, act: Callable[[], None]) -> None:
    def turn() -> None:
        act()
        guest.loop.call_later(period, turn)

    guest.loop.call_later(period, turn)


@dataclass(frozen=True, slots=True)
class FillAndFree:
    """Fill memory, hold it, free it all; again and again. What a demo does to a real guest."""

    share: float = 0.6
    first: float = 10.0
    hold: float = 20.0
    period: float = 120.0
    orders: tuple[int, ...] = HUGE

    def start(self, guest: ModelledGuest) -> None:
        """Wait for the first fill."""
        held = hold(guest)

        def fill() -> None:
            held.grow(int(self.share * guest.memory_bytes), self.orders)
            guest.loop.call_later(self.hold, held.clear)
            guest.loop.call_later(self.period, fill)

        guest.loop.call_later(self.first, fill)


@dataclass(frozen=True, slots=True)
class Churn:
    """A working set that turns over all the time, and now and then changes its size.

    turnover: share of the working set that is replaced in a second. drift: seconds between changes of size, each to
    between half of the working set and all of it.
    """

    share: float = 0.5
    turnover: float = 0.02
    drift: float = 30.0
    step: float = 1.0

    def start(self, guest: ModelledGuest) -> None:
        """Take the working set, then turn it over."""
        full = int(self.share * guest.memory_bytes)
        wanted, held = full, hold(guest)
        held.grow_mixed(full)

        def replace() -> None:
            # Up to what is wanted, not by what was freed: each would take a little more, and the set would grow.
            held.shrink(int(self.turnover * self.step * held.bytes))
            held.grow_mixed(max(0, wanted - held.bytes))

        def drift() -> None:
            nonlocal wanted
            wanted = int(full * guest.random.uniform(0.5, 1.0))
            held.resize(wanted)

        _every(guest, self.step, replace)
        _every(guest, self.drift, drift)


@dataclass(frozen=True, slots=True)
class StaggeredPeaks:
    """A low base, and a peak that comes at another time in each of count guests: what makes overcommit worth while."""

    index: int = 0
    count: int = 1
    base: float = 0.15
    peak: float = 0.7
    period: float = 120.0
    hold: float = 30.0

    def start(self, guest: ModelledGuest) -> None:
        """Take the base, then wait for this guest's turn."""
        held = hold(guest)
        held.grow_mixed(int(self.base * guest.memory_bytes))
        burst = hold(guest)

        def peak() -> None:
            burst.grow(int((self.peak - self.base) * guest.memory_bytes))
            guest.loop.call_later(self.hold, burst.clear)
            guest.loop.call_later(self.period, peak)

        guest.loop.call_later(self.period * self.index / self.count, peak)


@dataclass(frozen=True, slots=True)
class PageCache:
    """Reads files into a cache of single pages, which is no free memory and so is never reported, beside a churn.

    read: share of memory read in a second. drop: seconds between "echo 1 > drop_caches"; None for never. The cache
    gives way where an allocation would fail.
    """

    share: float = 0.6
    read: float = 0.005
    drop: float | None = 240.0
    programs: Churn = Churn(share=0.2)

    def start(self, guest: ModelledGuest) -> None:
        """Start the programs and the reading."""
        cache = hold(guest)
        guest.reclaimers.append(lambda pages: cache.shrink(max(pages, 32) * PAGE_SIZE) // PAGE_SIZE)

        def read() -> None:
            if cache.bytes < self.share * guest.memory_bytes:
                cache.grow(int(self.read * guest.memory_bytes), SMALL)

        self.programs.start(guest)
        _every(guest, 1.0, read)
        if self.drop is not None:
            _every(guest, self.drop, cache.clear)


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """Fill with single pages, free them but for a few that are pinned where they are: little of it can be reported.

    pinned: share of the filled pages that stay.
    """

    share: float = 0.7
    pinned: float = 0.01
    hold: float = 20.0
    period: float = 120.0

    def start(self, guest: ModelledGuest) -> None:
        """Wait for the first round."""

        def fill() -> None:
            held = hold(guest)
            held.grow(int(self.share * guest.memory_bytes) - kept.bytes, SMALL)
            guest.loop.call_later(self.hold, lambda: free(held))
            guest.loop.call_later(self.period, fill)

        def free(held: Holding) -> None:
            kept.clear()
            held.shrink(int((1 - self.pinned) * held.bytes))
            kept.adopt(held)

        kept = hold(guest)
        guest.loop.call_later(10.0, fill)


WORKLOADS: dict[str, Callable[[int, int], Workload]] = {
    "fill": lambda _index, _count: FillAndFree(),
    "churn": lambda _index, _count: Churn(),
    "staggered": StaggeredPeaks,
    "cache": lambda _index, _count: PageCache(),
    "fragmentation": lambda _index, _count: Fragmentation(),
}


def workload(name: str, index: int = 0, count: int = 1) -> Workload:
    """Make the named workload for guest number index of count. Raises WorkloadError for a name that is none."""
    if name not in WORKLOADS:
        raise WorkloadError(f"unknown workload {name!r}: give one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name](index, count)
