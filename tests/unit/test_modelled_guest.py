"""Modelled guests without a device: zones, allocation over zones, reclaim, accounting, and the workloads."""

from __future__ import annotations

import pytest

from guest_images.event_loop import EventLoop
from guest_images.free_lists import PAGE_SIZE, Block, MigrateType, ModelError
from guest_images.guest_pages import AccountedPages
from guest_images.modelled_guest import ModelledGuest, accounted_guest, zones_of
from guest_images.page_reporting import Parameters, Variant
from guest_images.workloads import SMALL, WORKLOADS, Holding, WorkloadError, workload

MIB = 1 << 20
SIZE = 256 * MIB


def guest(seed: int = 0, parameters: Parameters | None = None, size: int = SIZE) -> ModelledGuest:
    return accounted_guest(size, parameters or Parameters(), seed=seed)


def test_zones() -> None:
    names = [(zone.name, zone.start_pfn >> 8, zone.end_pfn >> 8) for zone in zones_of(8192 * MIB)]
    assert names == [("DMA", 4, 16), ("DMA32", 16, 4096), ("Normal", 4096, 8192)]
    assert [zone.name for zone in zones_of(SIZE)] == ["DMA", "DMA32"]
    assert not any(zone.put_back_to_tail for zone in zones_of(SIZE, Variant.V17))


@pytest.mark.parametrize("size", [0, 16 * MIB, SIZE + PAGE_SIZE, -SIZE])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(ModelError, match="multiple of 4 MiB, 32 MiB at least"):
        guest(size=size)


def test_zones_beyond_the_memory() -> None:
    with pytest.raises(ModelError, match="beyond a memory"):
        ModelledGuest(zones_of(SIZE), Parameters(), AccountedPages(SIZE // 2))


def test_the_highest_zone_is_used_first_then_the_lower_then_the_reserves() -> None:
    small = guest(size=32 * MIB)
    dma, dma32 = small.zones
    block = small.allocate(10)
    assert block is not None
    assert block.pfn >= dma32.start_pfn
    taken = [block]
    while (block := small.allocate(0)) is not None:
        taken.append(block)
    assert [zone.free_pages for zone in small.zones] == [zone.watermarks.min for zone in (dma, dma32)]
    assert small.failed_allocations == 1
    for block in taken:
        small.free(block)
    assert small.free_bytes == 28 * MIB
    small.verify()


def test_reclaim_comes_before_failure() -> None:
    small = guest(size=32 * MIB)
    held = Holding(small)
    assert not held.grow(32 * MIB, SMALL)
    small.reclaimers.append(lambda pages: held.shrink(pages * PAGE_SIZE) // PAGE_SIZE)
    assert small.allocate(0) is not None
    assert small.failed_allocations == 1


def test_a_block_of_no_zone_cannot_be_freed() -> None:
    with pytest.raises(ModelError, match="in no zone"):
        guest().free(Block(0, 0))


def test_accounting() -> None:
    pages = AccountedPages(SIZE)
    pages.take(Block(1024, 9))
    pages.take(Block(1024, 3))
    assert pages.footprint_bytes == 2 * MIB
    pages.give_up(Block(1024, 9))
    pages.report([Block(1024, 8), Block(4096, 10)])
    assert pages.footprint_bytes == MIB


def test_a_guest_that_has_used_all_its_memory() -> None:
    used = guest()
    assert used.footprint_bytes == 0
    used.write_everything()
    assert used.footprint_bytes == SIZE - 4 * MIB
    used.run_until(30)
    assert used.footprint_bytes == 12 * MIB  # the DMA zone is too small to report


def test_a_guest_settles_as_the_pacing_model_says() -> None:
    """4 MiB blocks, 256 MiB a pass and 2 s apart: a fresh 1 GiB guest takes four passes for its DMA32 zone."""
    fresh = guest(size=1024 * MIB, parameters=Parameters(order=10))
    fresh.run_until(60)
    assert [(one.time, one.bytes // MIB) for one in fresh.passes] == [(2, 256), (4, 256), (6, 256), (8, 240)]
    assert fresh.reported_bytes == 1008 * MIB


def test_half_full_and_freed() -> None:
    filled = guest()
    blocks = [filled.allocate(9) for _ in range(64)]
    filled.run_until(10)
    assert (filled.footprint_bytes, filled.free_bytes) == (128 * MIB, 124 * MIB)
    for block in blocks:
        assert block is not None
        filled.free(block)
    filled.run_until(20)
    assert filled.footprint_bytes == 0


def lives(name: str, seed: int) -> tuple[object, ...]:
    one = guest(seed, size=SIZE // 2, parameters=Parameters(order=7))
    workload(name, 1, 4).start(one)
    footprints = []
    for moment in range(10, 131, 10):
        one.run_until(moment)
        footprints.append(one.footprint_bytes)
    one.verify()
    return tuple(one.passes), tuple(footprints), one.free_bytes


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_repeat_report_and_stay_in_bounds(name: str) -> None:
    first = lives(name, 5)
    assert first == lives(name, 5)
    passes, footprints, _free = first
    assert isinstance(passes, tuple)
    assert sum(one.bytes for one in passes) > 0
    assert isinstance(footprints, tuple)
    assert 0 < max(footprints) < SIZE // 2
    assert min(footprints) < max(footprints)


@pytest.mark.parametrize("name", ["churn", "cache", "fragmentation"])
def test_another_seed_is_another_life(name: str) -> None:
    assert lives(name, 1) != lives(name, 2)


def test_staggered_guests_peak_at_different_times() -> None:
    loop = EventLoop()
    guests = [accounted_guest(SIZE, Parameters(), loop=loop, seed=index) for index in range(4)]
    for index, one in enumerate(guests):
        workload("staggered", index, len(guests)).start(one)
    peaks: list[list[int]] = []
    for moment in range(125, 240, 30):
        loop.run_until(moment)
        peaks.append([one.footprint_bytes for one in guests])
    assert [row.index(max(row)) for row in peaks] == [0, 1, 2, 3]


def test_a_page_cache_is_not_reported_until_it_is_dropped() -> None:
    cached = guest()
    workload("cache").start(cached)
    cached.run_until(239)
    assert cached.footprint_bytes > 0.75 * SIZE
    cached.run_until(260)
    assert cached.footprint_bytes < 0.5 * SIZE


def test_pinned_pages_keep_memory_from_the_host() -> None:
    """One page in a hundred stays, and holds most of what was filled; freed pages are not free blocks."""
    pinned = guest()
    workload("fragmentation").start(pinned)
    pinned.run_until(60)
    assert pinned.free_bytes > 0.97 * (SIZE - 4 * MIB)
    assert pinned.footprint_bytes > 0.6 * SIZE


def test_unmovable_pages_do_not_mix_with_movable_ones() -> None:
    """What migrate types are for: pinned pages come from pageblocks of their own, and the rest can be reported."""
    grouped = guest()
    pinned, filled = Holding(grouped, MigrateType.UNMOVABLE), Holding(grouped)
    for _ in range(150):
        pinned.grow(4 * PAGE_SIZE, SMALL)
        filled.grow(256 * PAGE_SIZE, SMALL)
    filled.clear()
    grouped.run_until(60)
    assert grouped.footprint_bytes < 10 * MIB


def test_an_unknown_workload() -> None:
    with pytest.raises(WorkloadError, match="unknown workload 'churm': give one of fill, churn, staggered"):
        workload("churm")
