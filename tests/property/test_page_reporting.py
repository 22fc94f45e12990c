"""Random lives of a modelled zone with page reporting. What holds after every step, whatever happened:

1. Each page is free, used or isolated, in one place: none is lost, none is listed twice (Zone.check).
2. Between passes nothing is isolated: each isolated block reached the drain once, also after a stop at the watermark or
   a report that failed.
3. A block is reported only while it is isolated, whole and of an order that may be reported, never while it is used;
   and no two entries of a report overlap. What stays free is above the min watermark.
4. A mark is believed only if it is true: the pages of a marked block were all in a successful report since they were
   last used.
5. No request is lost: a zone that is not IDLE has its work waiting, one that is has none; and when a zone with an
   unlimited watermark is left alone, each block that may be reported gets reported, in as many passes as the budget asks.
6. While a report is under way, with the zone's lock free, allocations and frees may happen, of the buddies of what
   is reported above all: all of the above holds still.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from guest_images.buddy import Zone
from guest_images.event_loop import EventLoop
from guest_images.free_lists import MAX_PAGE_ORDER, PAGEBLOCK_ORDER, Block, MigrateType, Watermarks
from guest_images.page_reporting import PageReporting, Parameters, ReportError, State, Variant

LARGEST = 1 << MAX_PAGE_ORDER
BLOCKS = 6
NO_LIMIT = Watermarks(-1 << 20, -1 << 20, 0)
ORDERS = st.one_of(st.integers(0, MAX_PAGE_ORDER), st.integers(PAGEBLOCK_ORDER - 1, MAX_PAGE_ORDER))
TYPES = st.sampled_from([MigrateType.UNMOVABLE, MigrateType.MOVABLE, MigrateType.RECLAIMABLE])
ACTS = st.lists(st.one_of(st.tuples(ORDERS, TYPES), st.integers(0, 1 << 16)), max_size=4)


class Life(RuleBasedStateMachine):
    @initialize(
        variant=st.sampled_from(Variant),
        order=st.sampled_from([0, 4, 8, 9, 10]),
        capacity=st.integers(1, 4),
        share=st.sampled_from([1, 2, 16]),
        lowest=st.sampled_from([0, 500, 2000, 4000]),
    )
    def begin(self, variant: Variant, order: int, capacity: int, share: int, lowest: int) -> None:
        merged = variant is Variant.MERGED
        # From the middle of a largest block on, and with min above low, so that isolation stops half way.
        marks = Watermarks(lowest, lowest // 8, lowest)
        self.zone = Zone("Normal", 1 << PAGEBLOCK_ORDER, BLOCKS * LARGEST, marks, put_back_to_tail=merged)
        self.parameters = Parameters(
            variant, order, capacity=capacity, share=share if merged else None, report_seconds=0.5
        )
        self.loop = EventLoop()
        self.reporting = PageReporting([self.zone], self.parameters, self.report, self.loop)
        self.used: list[int] = []
        self.clean: set[int] = set()
        self.failing = 0
        self.buddies = False
        self.during: list[tuple[int, MigrateType] | int] = []
        self.reporting.register()

    def report(self, blocks: Sequence[Block]) -> None:
        pages = [page for block in blocks for page in range(block.pfn, block.pfn + block.pages)]
        assert len(pages) == len(set(pages))
        assert 0 < len(blocks) <= self.parameters.capacity
        for block in blocks:
            assert self.zone.isolated[block.pfn] == block.order >= self.parameters.order
        assert self.zone.free_pages > self.zone.watermarks.min
        acts, self.during = self.during, []
        if self.buddies:
            buddies = {block.pfn ^ block.pages for block in blocks}
            for pfn in [pfn for pfn in self.used if pfn in buddies]:
                self.used.remove(pfn)
                self.zone.free(pfn)
        for act in acts:
            self.act(act)
        if self.failing:
            self.failing -= 1
            raise ReportError("as told")
        self.clean.update(pages)

    def act(self, act: tuple[int, MigrateType] | int) -> None:
        if isinstance(act, tuple):
            self.allocate(*act)
        elif self.used:
            self.zone.free(self.used.pop(act % len(self.used)))

    def allocate(self, order: int, migrate_type: MigrateType) -> None:
        before = self.zone.free_pages
        pfn = self.zone.allocate(order, migrate_type)
        if pfn is None:
            assert self.zone.free_pages == before
            return
        assert self.zone.free_pages >= self.zone.watermarks.min
        self.used.append(pfn)
        self.clean.difference_update(range(pfn, pfn + (1 << order)))

    @rule(order=ORDERS, migrate_type=TYPES, times=st.integers(1, 12))
    def allocates(self, order: int, migrate_type: MigrateType, times: int) -> None:
        for _ in range(times):
            self.allocate(order, migrate_type)

    @rule(choice=st.integers(0, 1 << 16), times=st.integers(1, 6))
    def frees(self, choice: int, times: int) -> None:
        for turn in range(times):
            self.act(choice * (turn + 1))

    @rule(
        failing=st.integers(0, 2),
        during=ACTS,
        buddies=st.booleans(),
        seconds=st.sampled_from([2.0, 3.0, 0.3]),
    )
    def time_passes(
        self, failing: int, during: list[tuple[int, MigrateType] | int], *, buddies: bool, seconds: float
    ) -> None:
        self.failing, self.during, self.buddies = failing, during, buddies
        self.reporting.request()
        self.loop.run_until(self.loop.now + seconds)

    @rule()
    def all_is_reported_in_the_end(self) -> None:
        self.failing, self.during, self.buddies = 0, [], False
        self.zone.watermarks, kept = NO_LIMIT, self.zone.watermarks
        self.reporting.request()
        self.loop.run_until(self.loop.now + 10_000)
        assert self.reporting.state is State.IDLE
        left = [
            pfn
            for order in range(self.parameters.order, MAX_PAGE_ORDER + 1)
            for migrate_type in range(MigrateType.ISOLATE)
            for pfn in self.zone.list_of(order, migrate_type)
            if not self.zone.is_reported(pfn)
        ]
        assert not left
        self.zone.watermarks = kept

    @invariant()
    def nothing_is_lost(self) -> None:
        self.zone.check()
        assert not self.zone.isolated
        assert sorted(self.used) == sorted(block.pfn for block in self.zone.used_blocks())

    @invariant()
    def marks_are_true(self) -> None:
        for pfn in self.zone.reported_blocks():
            order = self.zone.order_of(pfn)
            assert order is not None
            assert order >= self.parameters.order
            assert self.clean.issuperset(range(pfn, pfn + (1 << order)))

    @invariant()
    def no_request_is_lost(self) -> None:
        assert (self.reporting.state is State.IDLE) == (self.reporting.work is None)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=250, stateful_step_count=30)
