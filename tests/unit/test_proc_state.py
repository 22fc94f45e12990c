"""The state of real guests of three kernels, recorded around a free: what is read of it, and the zones made of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from balloonlab.recording import Recording, read_recording
from guest_images.free_lists import MigrateType, ModelError
from guest_images.page_reporting import Parameters
from guest_images.proc_state import ProcState, zones_after
from guest_images.zone_layout import parse_pagetypeinfo, parse_zoneinfo

RECORDED = Path(__file__).parent / "recorded"
KERNELS = ("6.1", "6.12", "7.3")
MOVABLE, UNMOVABLE = MigrateType.MOVABLE, MigrateType.UNMOVABLE


@pytest.fixture(params=KERNELS)
def recording(request: pytest.FixtureRequest) -> Recording:
    return read_recording(RECORDED / f"{request.param}.json")


def state(free: dict[int, int], *, low: int = 100, per_cpu: str = "0") -> ProcState:
    """Describe a zone of 64 MiB with so many movable free blocks of some orders."""
    counts = " ".join(str(free.get(order, 0)) for order in range(11))
    return ProcState(
        f"Node 0, zone DMA32\n  min 50\n  low {low}\n  high 200\n  spanned 16384\n  managed 16384\n"
        f"  pagesets\n    cpu: 0\n              count: {per_cpu}\n    cpu: 1\n              count:    2\n  start_pfn: 4096\n",
        f"Node    0, zone    DMA32, type      Movable {counts}\n",
    )


def marked(before: ProcState, after: ProcState, order: int = 9) -> tuple[int, int]:
    """Count the marks, and the free blocks that page reporting looks at."""
    (zone,) = zones_after(before, after, Parameters(order=order, capacity=1))
    zone.check()
    return len(zone.reported_blocks()), sum(zone.free_blocks(current) for current in range(order, 11))


def test_the_zones_of_real_kernels_are_read(recording: Recording) -> None:
    for moment in (recording.before, recording.after):
        zones = parse_zoneinfo(moment.zoneinfo)
        assert list(zones) == ["DMA", "DMA32"]
        assert (zones["DMA32"].start_pfn, zones["DMA32"].spanned) == (4096, 258016)
        assert 0 < zones["DMA32"].watermarks.min < zones["DMA32"].watermarks.low
        counts = parse_pagetypeinfo(moment.pagetypeinfo)
        assert {MOVABLE, UNMOVABLE, MigrateType.ISOLATE} <= counts["DMA32"].keys()


def test_the_zones_made_of_them_have_their_free_lists(recording: Recording) -> None:
    counts = parse_pagetypeinfo(recording.after.pagetypeinfo)
    for zone in zones_after(recording.before, recording.after, recording.parameters):
        zone.check()
        for migrate_type, orders in counts[zone.name].items():
            assert tuple(len(zone.list_of(order, migrate_type)) for order in range(11)) == orders


def test_the_zones_made_of_them_know_what_was_reported(recording: Recording) -> None:
    low, high = zones_after(recording.before, recording.after, recording.parameters)
    assert low.name == "DMA"
    assert low.reported_blocks() == set()  # never far enough from its watermark
    kept = sum(orders[10] for orders in parse_pagetypeinfo(recording.before.pagetypeinfo)["DMA32"].values())
    assert len(high.reported_blocks()) == kept
    assert all(high.order_of(pfn) == 10 for pfn in high.reported_blocks())


def test_per_cpu_pages_of_all_sets() -> None:
    assert state({10: 1}, per_cpu="40").per_cpu_bytes == 42 * 4096


def test_what_was_free_before_is_marked_and_the_rest_is_not() -> None:
    assert marked(state({10: 3}), state({10: 8})) == (3, 8)


def test_what_was_taken_in_between_is_not_marked() -> None:
    assert marked(state({10: 8}), state({10: 3})) == (3, 3)


def test_marks_are_at_the_end_of_the_list() -> None:
    (zone,) = zones_after(state({10: 2}), state({10: 6}), Parameters(capacity=1))
    assert set(list(zone.list_of(10, MOVABLE))[-2:]) == zone.reported_blocks()


def test_smaller_blocks_are_what_splits_left() -> None:
    assert marked(state({9: 2, 10: 2}), state({9: 2, 10: 4})) == (2, 6)


def test_a_zone_near_its_low_watermark_was_not_reported() -> None:
    low = 3 * 1024 - 512
    assert marked(state({10: 3}, low=low), state({10: 3}, low=low)) == (0, 3)


def test_a_zone_that_a_fill_brought_near_its_low_watermark_was() -> None:
    low = 3 * 1024 - 512
    assert marked(state({10: 3}, low=low), state({10: 8}, low=low)) == (3, 8)


def test_a_zone_that_was_not_there_before_has_no_marks() -> None:
    other = ProcState(
        *(text.replace("DMA32", "Normal") for text in (state({10: 3}).zoneinfo, state({10: 3}).pagetypeinfo))
    )
    assert marked(other, state({10: 8})) == (0, 8)


def test_only_free_blocks_can_be_marked() -> None:
    (zone,) = state({10: 1}).zones()
    with pytest.raises(ModelError, match="page 7 of zone DMA32 begins no free block"):
        zone.mark_reported(7)


def test_parameters_are_the_guests_own(recording: Recording) -> None:
    assert recording.parameters == replace(Parameters(), order=9, delay=2.0)
