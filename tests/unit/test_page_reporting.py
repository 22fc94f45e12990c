"""The model of page reporting against the kernel's text: states, order of reports, budget, watermarks, errors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from guest_images.buddy import Zone
from guest_images.event_loop import EventLoop
from guest_images.free_lists import MAX_PAGE_ORDER, Block, FreeList, MigrateType, ModelError, Watermarks
from guest_images.page_reporting import (
    LostPageError,
    PageReporting,
    Parameters,
    ReportError,
    Scatterlist,
    State,
    Variant,
)

LARGEST = 1 << MAX_PAGE_ORDER
NONE = Watermarks(0, 0, 0)
V17 = Parameters.v17(10)
MERGED = Parameters(order=10)
BOTH = pytest.mark.parametrize("parameters", [V17, MERGED], ids=["v17", "merged"])


class Host:
    """Takes reports, or refuses them from the n-th on."""

    def __init__(self, refuse_from: int | None = None) -> None:
        self.reports: list[list[Block]] = []
        self.refuse_from = refuse_from

    def __call__(self, blocks: Sequence[Block]) -> None:
        if self.refuse_from is not None and len(self.reports) >= self.refuse_from:
            raise ReportError("no")
        self.reports.append(list(blocks))


class Machine:
    """A zone of so many largest blocks, reporting to a Host."""

    def __init__(
        self,
        blocks: int,
        parameters: Parameters,
        watermarks: Watermarks = NONE,
        *,
        refuse_from: int | None = None,
    ) -> None:
        tail = parameters.variant is not Variant.V17
        self.zone = Zone("Normal", 0, blocks * LARGEST, watermarks, put_back_to_tail=tail)
        self.host = Host(refuse_from)
        self.loop = EventLoop()
        self.reporting = PageReporting([self.zone], parameters, self.host, self.loop)

    def state(self) -> State:
        return self.reporting.state

    def sizes(self) -> list[int]:
        return [len(report) for report in self.host.reports]


@BOTH
def test_states(parameters: Parameters) -> None:
    machine = Machine(64, parameters)
    reporting, loop = machine.reporting, machine.loop
    reporting.register()
    assert machine.state() is State.REQUESTED
    loop.run_until(1.999)
    assert not machine.host.reports
    loop.run_until(2)
    assert (machine.state(), reporting.work) == (State.IDLE, None)
    assert machine.sizes() == [32, 32]
    assert (reporting.reports, reporting.reported_bytes) == (2, 64 << 22)
    assert [(one.time, one.reports, one.blocks, one.bytes) for one in reporting.passes] == [
        (2, 2, 64, 64 << 22)
    ]
    loop.run_until(60)
    assert len(reporting.passes) == 1


@BOTH
def test_only_a_large_free_block_asks_for_a_pass(parameters: Parameters) -> None:
    machine = Machine(64, parameters)
    machine.reporting.register()
    machine.loop.run_until(10)
    page = machine.zone.allocate(0, MigrateType.MOVABLE)
    assert page is not None
    assert machine.state() is State.IDLE
    other = machine.zone.allocate(0, MigrateType.MOVABLE)
    assert other is not None
    machine.zone.free(page)
    assert machine.state() is State.IDLE
    machine.zone.free(other)
    assert machine.state() is State.REQUESTED
    machine.loop.run_until(12)
    assert machine.sizes() == [32, 32, 1]
    assert machine.host.reports[-1] == [Block(page & ~(LARGEST - 1), 10)]


@BOTH
def test_a_request_during_a_pass_runs_the_work_again(parameters: Parameters) -> None:
    machine = Machine(40, parameters)
    block = machine.zone.allocate(10)
    assert block is not None

    def free_it(blocks: Sequence[Block]) -> None:
        machine.host(blocks)
        if len(machine.host.reports) == 2:
            machine.zone.free(block)

    machine.reporting._report = free_it
    machine.reporting.register()
    machine.loop.run_until(2)
    assert machine.sizes() == [32, 7]
    assert machine.state() is State.REQUESTED
    machine.loop.run_until(4)
    assert machine.sizes() == [32, 7, 1]
    assert machine.state() is State.IDLE


def test_the_scatterlist_is_filled_from_its_end() -> None:
    entries = Scatterlist(2)
    entries.add(Block(1, 0))
    assert (entries.blocks(), len(entries), entries.full) == ((Block(1, 0),), 1, False)
    entries.add(Block(2, 0))
    assert (entries.blocks(), entries.full) == ((Block(2, 0), Block(1, 0)), True)
    machine = Machine(33, MERGED)
    machine.reporting.process()
    assert machine.host.reports[0][0] == Block(31 * LARGEST, 10)
    assert machine.host.reports[0][-1] == Block(0, 10)
    assert machine.host.reports[1] == [Block(32 * LARGEST, 10)]


@pytest.mark.parametrize(("variant", "largest"), [(Variant.V17, 1100), (Variant.MERGED, 96)])
def test_merged_reports_a_full_list_when_it_meets_another_block(variant: Variant, largest: int) -> None:
    """So a list that was filled by smaller blocks is paid for by the budget of the larger ones."""
    share = None if variant is Variant.V17 else 16
    machine = Machine(1132, Parameters(variant, order=9, share=share))
    halves = [machine.zone.allocate(9) or 0 for _ in range(64)]
    for half in halves[::2]:
        machine.zone.free(half)
    machine.reporting.process()
    orders = [[block.order for block in report] for report in machine.host.reports]
    assert orders[0] == [9] * 32
    assert sum(report.count(10) for report in orders) == largest


@BOTH
def test_a_zone_no_larger_than_a_scatterlist_reports_nothing(parameters: Parameters) -> None:
    machine = Machine(32, parameters)
    machine.reporting.process()
    assert not machine.sizes()


def test_the_budget_of_the_merged_kernel() -> None:
    """ceil(nr_free / 512) + 1 reports for a list and pass; then 2 s later the next part."""
    machine = Machine(1100, MERGED)
    machine.reporting.register()
    machine.loop.run_until(60)
    assert [one.blocks for one in machine.reporting.passes] == [128] * 8 + [76]
    assert [one.time for one in machine.reporting.passes] == [2.0 * n for n in range(1, 10)]
    assert machine.state() is State.IDLE
    assert len(machine.zone.reported_blocks()) == 1100


def test_v17_has_no_budget() -> None:
    machine = Machine(1100, V17)
    machine.reporting.register()
    machine.loop.run_until(60)
    assert [one.blocks for one in machine.reporting.passes] == [1100]
    assert len(machine.zone.reported_blocks()) == 1100


def test_256_mib_in_one_pass() -> None:
    """What a real 1 GiB guest does with its 4 MiB blocks: 64 in a pass, 2 s apart."""
    machine = Machine(256, MERGED)
    machine.reporting.register()
    machine.loop.run_until(60)
    assert [one.bytes >> 20 for one in machine.reporting.passes] == [256] * 4


def test_the_unreported_blocks_come_first_on_the_list() -> None:
    machine = Machine(300, MERGED)
    machine.reporting.process()
    blocks = list(machine.zone.list_of(10, MigrateType.MOVABLE))
    reported = [machine.zone.is_reported(pfn) for pfn in blocks]
    assert reported == sorted(reported)
    assert reported.count(True) == 64


def reported_first(blocks: int, watermarks: Watermarks) -> Machine:
    """A machine whose list begins with ten blocks that are reported already."""
    machine = Machine(blocks, MERGED, watermarks)
    for pfn in range(0, 10 * LARGEST, LARGEST):
        machine.zone._reported.add(pfn)
    return machine


def listed(machine: Machine) -> list[int]:
    return [pfn // LARGEST for pfn in machine.zone.list_of(10, MigrateType.MOVABLE)]


def test_a_list_is_rotated_before_its_report() -> None:
    """What was passed over goes behind what comes; what was reported goes behind that, last isolated first."""
    machine = reported_first(300, NONE)
    machine.reporting.process()
    expected = [*range(74, 300), *range(10), *range(41, 9, -1), *range(73, 41, -1)]
    assert listed(machine) == expected


def test_a_list_is_rotated_where_its_walk_stopped() -> None:
    """Also by the watermark: the next pass begins with what this one could not isolate."""
    machine = reported_first(40, Watermarks(34 * LARGEST, 0, 0))
    machine.reporting.process()
    assert machine.sizes() == [5]
    assert listed(machine) == [*range(15, 40), *range(10), *range(14, 9, -1)]


@BOTH
def test_blocks_of_all_lists_share_a_report(parameters: Parameters) -> None:
    machine = Machine(80, Parameters(parameters.variant, order=9, share=parameters.share))
    halves = [machine.zone.allocate(9) for _ in range(6)]
    for half in halves[::2]:
        assert half is not None
        machine.zone.free(half)
    machine.reporting.process()
    machine.reporting.process()  # the budget of 77 blocks was two reports
    assert machine.sizes() == [32, 32, 16]
    assert [block.order for block in machine.host.reports[0]] == [10] * 29 + [9] * 3


@BOTH
def test_isolated_pageblocks_are_not_reported(parameters: Parameters) -> None:
    machine = Machine(33, parameters)
    machine.zone._lists[10 * 6 + MigrateType.ISOLATE].add(0, to_tail=True)
    machine.zone._lists[10 * 6 + MigrateType.MOVABLE].remove(0)
    machine.zone._free[0] = 10 * 6 + MigrateType.ISOLATE
    machine.reporting.process()
    assert machine.sizes() == [32]
    assert not machine.zone.is_reported(0)


@BOTH
def test_a_zone_near_its_low_watermark_is_left_alone(parameters: Parameters) -> None:
    for low, reports in ((LARGEST, []), (LARGEST - 1, [32, 1])):
        machine = Machine(33, parameters, Watermarks(0, low, low))
        machine.reporting.process()
        assert machine.sizes() == reports


@BOTH
def test_the_min_watermark_ends_a_list_and_nothing_is_lost(parameters: Parameters) -> None:
    """The review's break: blocks are on the scatterlist when isolation stops."""
    machine = Machine(40, parameters, Watermarks(30 * LARGEST, 0, 0))
    machine.reporting.process()
    assert machine.sizes() == [9]
    assert not machine.zone.isolated
    machine.zone.check()
    first = machine.zone.list_of(10, MigrateType.MOVABLE).following(FreeList.HEAD)
    assert machine.zone.is_reported(first) == (parameters.variant is Variant.V17)


@BOTH
@pytest.mark.parametrize("refuse_from", [0, 1])
def test_a_failing_report_returns_early_and_marks_nothing(parameters: Parameters, refuse_from: int) -> None:
    machine = Machine(80, parameters, refuse_from=refuse_from)
    machine.reporting.register()
    machine.loop.run_until(2)
    assert len(machine.zone.reported_blocks()) == 32 * refuse_from
    assert (machine.reporting.failed_reports, machine.reporting.state) == (1, State.IDLE)
    assert machine.reporting.reported_bytes == 32 * refuse_from << 22
    machine.zone.check()
    machine.host.refuse_from = None
    machine.reporting.request()
    machine.loop.run_until(10)
    assert len(machine.zone.reported_blocks()) == 80


def test_an_exception_of_another_kind_loses_no_block_either() -> None:
    machine = Machine(40, MERGED)

    def broken(blocks: Sequence[Block]) -> None:
        raise ValueError(len(blocks))

    machine.reporting._report = broken
    with pytest.raises(ValueError, match="32"):
        machine.reporting.process()
    machine.zone.check()
    assert machine.zone.free_pages == 40 * LARGEST


def test_a_block_left_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(40, MERGED)
    monkeypatch.setattr(Zone, "put_back", lambda *_arguments, **_marks: False)
    with pytest.raises(LostPageError, match="isolated at the end of a pass"):
        machine.reporting.process()


def test_a_report_takes_the_time_it_is_given() -> None:
    machine = Machine(1100, Parameters(order=10, report_seconds=0.25))
    machine.reporting.register()
    machine.loop.run_until(2.5)
    assert machine.state() is State.REQUESTED  # by the budget, while the pass is not over
    machine.loop.run_until(8.9)
    assert [one.time for one in machine.reporting.passes] == [2, 5, 8]


def test_unregistering_stops_the_work() -> None:
    machine = Machine(40, MERGED)
    machine.reporting.register()
    machine.reporting.unregister()
    machine.loop.run_until(10)
    assert not machine.host.reports
    machine.zone.free(machine.zone.allocate(10) or 0)
    assert machine.state() is State.IDLE


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"order": 11}, "give 0 to 10"),
        ({"order": -1}, "give 0 to 10"),
        ({"capacity": 0}, "must be 1 or more"),
        ({"share": 0}, "must be 1 or more"),
        ({"delay": 0}, "more than 0"),
        ({"report_seconds": -1}, "more than 0"),
        ({"variant": Variant.V17}, "share=None"),
    ],
)
def test_parameters_no_kernel_would_take(values: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Parameters(**values)  # type: ignore[arg-type]
