"""Linux's free page reporting as a model: pulls free blocks off a zone's lists, has them reported, puts them back.

Two variants of mm/page_reporting.c, which differ in when a full scatterlist is reported and in how far a pass goes:

    V17      the patch as acked: "[PATCH v17 4/9] mm: Introduce Reported pages", February 2020. A list is reported as
             soon as it is full, and the walk goes on from the head of the free list until nothing is left.
    MERGED   Linux 5.7 and later, read at 0560e316d419 (2026). A full list is reported when one more block is met; what
             is not reported yet is rotated to the front; a budget ends each free list's turn.

It neither knows what a report does, which is its callable's, nor when time passes, which is its event loop's; a zone's
lock is nothing here but the moment of the report, in which the callable may allocate and free. modelled_guest.py is its
user.

The invariant, from the review of that patch: no path leaves a block on the scatterlist. Each isolated block reaches the
drain exactly once, also if isolation stops half way or the report fails. It is checked in every pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from guest_images.buddy import Zone
from guest_images.event_loop import Event, EventLoop
from guest_images.free_lists import (
    MAX_PAGE_ORDER,
    PAGE_SIZE,
    PAGEBLOCK_ORDER,
    Block,
    FreeList,
    MigrateType,
    ModelError,
)

# PAGE_REPORTING_CAPACITY: entries of the scatterlist.
DEFAULT_CAPACITY = 32
# PAGE_REPORTING_DELAY, in seconds; page_reporting_delay_ms since 7.3.
DEFAULT_DELAY = 2.0
# "a sixteenth of the current list": the kernel divides by PAGE_REPORTING_CAPACITY * 16.
DEFAULT_SHARE = 16
_REPORTED_TYPES = [migrate_type for migrate_type in MigrateType if migrate_type != MigrateType.ISOLATE]


class ReportError(ModelError):
    """A report failed: what prdev->report() says with a negative return value."""


class LostPageError(ModelError):
    """The invariant is broken: a block was left on the scatterlist, or isolated."""


class Variant(Enum):
    """Which page_reporting_cycle() is modelled."""

    V17 = "v17"
    MERGED = "merged"


class State(IntEnum):
    """What the delayed work is about."""

    IDLE = 0
    REQUESTED = 1
    ACTIVE = 2


@dataclass(frozen=True, slots=True)
class Parameters:
    """The constants of the kernel, to be turned.

    order: the least that is reported. delay: seconds. capacity: entries of the scatterlist. share: a pass may report
    one in so many blocks of each list, and a scatterlist more; None for no bound. report_seconds: how long the guest
    waits for one report, in its own time.
    """

    variant: Variant = Variant.MERGED
    order: int = PAGEBLOCK_ORDER
    delay: float = DEFAULT_DELAY
    capacity: int = DEFAULT_CAPACITY
    share: int | None = DEFAULT_SHARE
    report_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Raises ModelError for values that no kernel would take."""
        if not 0 <= self.order <= MAX_PAGE_ORDER:
            raise ModelError(f"order {self.order} cannot be reported: give 0 to {MAX_PAGE_ORDER}")
        if self.capacity < 1 or (self.share is not None and self.share < 1):
            raise ModelError(f"capacity {self.capacity} and share {self.share} must be 1 or more")
        if self.variant is Variant.V17 and self.share is not None:
            raise ModelError("the v17 patch has no budget: give share=None")
        if self.delay <= 0 or self.report_seconds < 0:
            raise ModelError(f"a delay of {self.delay} s cannot be kept: give more than 0")

    @classmethod
    def v17(cls, order: int = PAGEBLOCK_ORDER) -> Parameters:
        """The acked patch: 2 s, 32 entries, no budget."""
        return cls(variant=Variant.V17, order=order, share=None)


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of the delayed work: when it began, in seconds, and what it reported with success."""

    time: float
    reports: int
    blocks: int
    bytes: int


Report = Callable[[Sequence[Block]], None]


class Scatterlist:
    """A bounded list of isolated blocks that is filled from its end."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries = [Block(0, 0)] * capacity
        self._offset = capacity

    def __len__(self) -> int:
        return self.capacity - self._offset

    @property
    def full(self) -> bool:
        """Return whether no entry is left."""
        return self._offset == 0

    def add(self, block: Block) -> None:
        """Put a block before those that are there."""
        self._offset -= 1
        self._entries[self._offset] = block

    def blocks(self) -> tuple[Block, ...]:
        """The blocks, last added first."""
        return tuple(self._entries[self._offset :])

    def clear(self) -> None:
        """Forget the blocks."""
        self._offset = self.capacity


class PageReporting:
    """The state machine of one guest: struct page_reporting_dev_info and what works on it."""

    def __init__(
        self, zones: Sequence[Zone], parameters: Parameters, report: Report, loop: EventLoop
    ) -> None:
        """report: gives blocks to the host, in the scatterlist's order; raises ReportError if it cannot."""
        self.zones = zones
        self.parameters = parameters
        self.state = State.IDLE
        self.passes: list[Pass] = []
        self.failed_reports = 0
        self.work: Event | None = None
        self._report = report
        self._loop = loop
        self._scatterlist = Scatterlist(parameters.capacity)
        self._reported: list[tuple[Block, ...]] = []
        self._calls = 0

    @property
    def reports(self) -> int:
        """Number of reports that succeeded."""
        return sum(one.reports for one in self.passes)

    @property
    def reported_bytes(self) -> int:
        """Bytes of all reports that succeeded, each time they were reported."""
        return sum(one.bytes for one in self.passes)

    def register(self) -> None:
        """page_reporting_register(): ask for a first pass, then listen to the zones."""
        self.request()
        for zone in self.zones:
            zone.on_free = self.notify_free

    def unregister(self) -> None:
        """page_reporting_unregister(): stop listening, and the delayed work."""
        for zone in self.zones:
            zone.on_free = None
        if self.work is not None:
            self.work.cancel()
        self.work, self.state = None, State.IDLE

    def notify_free(self, order: int) -> None:
        """page_reporting_notify_free(): a block of this order came to a free list."""
        if order >= self.parameters.order:
            self.request()

    def request(self) -> None:
        """__page_reporting_request(): go to REQUESTED; from IDLE, start the delayed work as well."""
        was, self.state = self.state, State.REQUESTED
        if was == State.IDLE:
            self._schedule()

    def _schedule(self) -> None:
        self.work = self._loop.call_later(self.parameters.delay, self.process)

    def process(self) -> None:
        """page_reporting_process(): one pass over all zones; it ends when the time of its reports has passed."""
        self.state = State.ACTIVE
        self._reported, self._calls = [], 0
        begun = self._loop.now
        try:
            for zone in self.zones:
                self._process_zone(zone)
        except ReportError:
            self.failed_reports += 1
        done = self._reported
        self.passes.append(Pass(begun, len(done), sum(map(len, done)), sum(map(bytes_of, done))))
        elapsed = self._calls * self.parameters.report_seconds
        if elapsed:
            self.work = self._loop.call_later(elapsed, self._finish)
        else:
            self._finish()

    def _finish(self) -> None:
        """Go idle, or again after the delay if somebody asked meanwhile: cmpxchg(ACTIVE, IDLE)."""
        if self.state == State.REQUESTED:
            self._schedule()
        else:
            self.work, self.state = None, State.IDLE

    def _process_zone(self, zone: Zone) -> None:
        """page_reporting_process_zone(): nothing near the low watermark, else all lists, then what is left over."""
        parameters = self.parameters
        if not zone.watermark_ok(0, zone.watermarks.low + (parameters.capacity << parameters.order)):
            return
        walk = self._walk_v17 if parameters.variant is Variant.V17 else self._walk_merged
        try:
            for order in range(parameters.order, MAX_PAGE_ORDER + 1):
                for migrate_type in _REPORTED_TYPES:
                    walk(zone, order, zone.list_of(order, migrate_type))
            if len(self._scatterlist):
                self._report_and_drain(zone)
        except Exception:
            self._prove_nothing_left(zone)
            raise
        # Not where Ctrl-C ends it anywhere: that is no lost page, and must not be called one.
        self._prove_nothing_left(zone)

    def _walk_merged(self, zone: Zone, order: int, blocks: FreeList) -> None:
        """page_reporting_cycle() of 5.7 and later: full lists wait for one more block; a budget; rotation."""
        budget = self._budget(zone, order)
        pfn = blocks.following(FreeList.HEAD)
        while pfn != FreeList.HEAD:
            following = blocks.following(pfn)
            if zone.is_reported(pfn):
                pfn = following
            elif budget < 0:
                self.state = State.REQUESTED
                break
            elif self._scatterlist.full:
                blocks.rotate_to_front(pfn)
                self._report_and_drain(zone)
                budget -= 1
                pfn = blocks.following(FreeList.HEAD)
            elif zone.isolate(pfn):
                self._scatterlist.add(Block(pfn, order))
                pfn = following
            else:
                break
        if pfn != FreeList.HEAD:
            blocks.rotate_to_front(pfn)

    def _budget(self, zone: Zone, order: int) -> float:
        """Reports for one list: a share of the order's blocks, rounded up; one more is made, as the test is < 0."""
        if self.parameters.share is None:
            return math.inf
        return -(-zone.free_blocks(order) // (self.parameters.capacity * self.parameters.share))

    def _walk_v17(self, zone: Zone, order: int, blocks: FreeList) -> None:
        """page_reporting_cycle() of the acked patch: a list is reported the moment it is full."""
        pfn = blocks.following(FreeList.HEAD)
        while pfn != FreeList.HEAD:
            following = blocks.following(pfn)
            if zone.is_reported(pfn):
                pfn = following
                continue
            # The review's break: isolation fails at the watermark only, and what is on the scatterlist by then is
            # reported by a later list or as the leftover of the zone.
            if not zone.isolate(pfn):
                break
            self._scatterlist.add(Block(pfn, order))
            pfn = following
            if self._scatterlist.full:
                self._report_and_drain(zone)
                pfn = blocks.following(FreeList.HEAD)

    def _report_and_drain(self, zone: Zone) -> None:
        """Report the scatterlist, then put every block back, marked if that succeeded. Raises ReportError after that."""
        blocks = self._scatterlist.blocks()
        self._calls += 1
        succeeded = False
        try:
            self._report(blocks)
            succeeded = True
        finally:
            self._scatterlist.clear()
            for block in blocks:
                zone.put_back(block.pfn, reported=succeeded)
        self._reported.append(blocks)

    def _prove_nothing_left(self, zone: Zone) -> None:
        if len(self._scatterlist) or zone.isolated:
            raise LostPageError(
                f"zone {zone.name}: {len(self._scatterlist)} blocks on the scatterlist and {len(zone.isolated)} isolated "
                "at the end of a pass: each must reach the drain once"
            )


def bytes_of(blocks: Sequence[Block]) -> int:
    """Bytes in so many blocks."""
    return sum(block.pages for block in blocks) * PAGE_SIZE
