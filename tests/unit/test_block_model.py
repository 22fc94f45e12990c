"""The guest modelled by pageblocks: what it counts, and how near it comes to the page-exact one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from balloonlab.fleet import FleetPlan, FleetRun, run_fleet
from balloonlab.fleet_results import result_of
from guest_images.block_model import BlockGuest, BlockHolding, TouchedBlocks
from guest_images.free_lists import PAGE_SIZE, Block, ModelError
from guest_images.page_reporting import Parameters
from guest_images.workloads import SMALL, WORKLOADS, hold

MIB = 1 << 20
SIZE = 256 * MIB
ZONES = SIZE - 4 * MIB
# How far the two models may be apart.
TOLERANCE = 0.05
# 4 MiB blocks come free seldom in a churn: what is reported of them differs by 3 % between seeds of the same model.
REPORTED_TOLERANCE = {9: TOLERANCE, 10: 2 * TOLERANCE}


def guest(size: int = SIZE) -> BlockGuest:
    return BlockGuest(size, Parameters(), seed=1)


def live(plan: FleetPlan) -> FleetRun:
    return run_fleet(plan, lambda _sample: None)


def both(plan: FleetPlan) -> tuple[FleetRun, FleetRun]:
    return live(plan), live(replace(plan, model="blocks"))


def test_touched_pages() -> None:
    touched = TouchedBlocks(SIZE)
    touched.take(Block(1024, 9))
    touched.touch(1536, 10)
    touched.touch(1536, 7)
    assert touched.footprint_bytes == (512 + 10) * PAGE_SIZE
    touched.take(Block(1024, 10))
    assert touched.footprint_bytes == 4 * MIB
    touched.report([Block(1024, 10), Block(4096, 9)])
    assert touched.footprint_bytes == 0
    assert touched.memory_bytes == SIZE


def test_small_pieces_share_pageblocks_and_return_them() -> None:
    one = guest()
    held = hold(one)
    assert isinstance(held, BlockHolding)
    assert held.grow(3 * MIB, SMALL)
    assert len({pfn for pfn, _order in held.pieces}) == 2
    assert held.bytes == one.footprint_bytes == 3 * MIB
    assert one.free_bytes == ZONES - 3 * MIB
    assert held.shrink(MIB) == MIB
    assert (one.free_bytes, one.footprint_bytes) == (ZONES - 2 * MIB, 3 * MIB)
    held.clear()
    assert one.free_bytes == ZONES
    one.run_until(60)
    assert one.footprint_bytes == 0
    one.verify()


def test_a_piece_that_stays_keeps_a_pageblock() -> None:
    one = guest()
    held = hold(one)
    held.grow(100 * MIB, SMALL)
    held.shrink(99 * MIB)
    one.run_until(60)
    assert held.bytes == MIB
    assert one.footprint_bytes > 90 * MIB


def test_memory_ends_at_the_watermarks_and_reclaim_comes_before_that() -> None:
    one = guest(32 * MIB)
    held, cache = hold(one), hold(one)
    cache.grow(8 * MIB, SMALL)
    assert not held.grow(64 * MIB)
    assert one.failed_allocations > 0
    assert [zone.free_pages for zone in one.zones] == [zone.watermarks.min for zone in one.zones]
    one.reclaimers.append(lambda pages: cache.shrink(pages * PAGE_SIZE) // PAGE_SIZE)
    assert held.grow(4 * MIB, SMALL)
    assert cache.bytes <= 4 * MIB


def test_a_piece_goes_over_from_one_holding_to_another() -> None:
    one = guest()
    first, second = hold(one), hold(one)
    first.grow_mixed(20 * MIB)
    held = first.bytes
    second.adopt(first)
    assert (first.bytes, second.bytes) == (0, held)
    first.clear()
    assert one.free_bytes == ZONES - held
    second.clear()
    assert one.free_bytes == ZONES


def test_reports_below_a_pageblock_cannot_be_told() -> None:
    with pytest.raises(ModelError, match=r"reports of order 8: give order 9 or more"):
        BlockGuest(SIZE, Parameters(order=8))


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_repeats(name: str) -> None:
    plan = FleetPlan(3, SIZE, name, Parameters(), duration=100, model="blocks")
    first, again = live(plan), live(plan)
    assert first.digest == again.digest
    assert first.samples == again.samples
    assert max(sample.footprint_bytes for sample in first.samples) > 0


@pytest.mark.parametrize("name", WORKLOADS)
def test_twenty_guests_hold_what_page_exact_ones_hold(name: str) -> None:
    exact, blocks = map(result_of, both(FleetPlan(20, 128 * MIB, name, Parameters(), duration=45)))
    assert exact.footprint_gib_minutes > 0
    assert blocks.footprint_gib_minutes == pytest.approx(exact.footprint_gib_minutes, rel=TOLERANCE)
    assert blocks.used_gib_minutes == pytest.approx(exact.used_gib_minutes, rel=TOLERANCE)
    assert blocks.peak_bytes == pytest.approx(exact.peak_bytes, rel=TOLERANCE)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("order", [9, 10])
@pytest.mark.parametrize("name", WORKLOADS)
def test_twenty_guests_for_ten_minutes(name: str, order: int) -> None:
    """Footprint, use and the bytes reported; the number of reports is too small to be told to 5 %."""
    exact, blocks = map(result_of, both(FleetPlan(20, SIZE, name, Parameters(order=order), duration=600)))
    for field in ("footprint_gib_minutes", "used_gib_minutes", "peak_bytes", "reported_bytes"):
        model, truth = getattr(blocks, field), getattr(exact, field)
        print(
            f"{name}, order {order}, {field}: {truth:.4g} by pages, {model:.4g} by pageblocks, {model / truth - 1:+.1%}"
        )
        tolerance = REPORTED_TOLERANCE[order] if field == "reported_bytes" else TOLERANCE
        assert model == pytest.approx(truth, rel=tolerance), field
