"""Modelled guests on the device's real processes: what they report is what the host gets back, page by page."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from guest_images.event_loop import EventLoop
from guest_images.free_lists import PAGE_SIZE, Block, MigrateType, Watermarks
from guest_images.guest_pages import SHORT_STAMP, MappedPages, PageCheckError
from guest_images.modelled_guest import RESERVED_BYTES, RING_BYTES, ModelledGuest, accounted_guest, guest_on
from guest_images.page_reporting import Parameters
from guest_images.workloads import WORKLOADS, workload
from guest_images.zone_layout import zone_from_counts
from hostdev.discard import Discarder
from hostdev.frontend import start_device
from hostdev.memory import Region

pytestmark = pytest.mark.usefixtures("patience")

MIB = 1 << 20
SIZE = 128 * MIB
# Small reports, so that the smallest guests have some: the driver reports nothing near low + capacity << order.
PARAMETERS = Parameters(order=6, capacity=8)
V17 = Parameters.v17(order=9)


@pytest.fixture(params=[PARAMETERS, V17], ids=["merged", "v17"])
def guest(request: pytest.FixtureRequest) -> Iterator[ModelledGuest]:
    with start_device() as device, guest_on(device, SIZE, request.param, seed=1) as guest:
        yield guest


def held(guest: ModelledGuest) -> int:
    """Bytes of the guest's zones that the host holds: all but what is behind them, where the rings are."""
    assert isinstance(guest.pages, MappedPages)
    number, size, at, found = guest.pages.memory.fd.fileno(), guest.memory_bytes, 0, 0
    with contextlib.suppress(OSError):  # ENXIO: no more data
        while at < size:
            start = os.lseek(number, at, os.SEEK_DATA)
            at = os.lseek(number, start, os.SEEK_HOLE)
            found += max(0, min(at, size) - start)
    return found


def test_the_footprint_falls_by_exactly_what_was_reported(guest: ModelledGuest) -> None:
    blocks = [guest.allocate(9) for _ in range(40)]
    assert held(guest) == 80 * MIB
    rings = guest.footprint_bytes - held(guest)
    assert 0 < rings <= RING_BYTES
    for block in blocks[:30]:
        assert block is not None
        guest.free(block)
    assert held(guest) == 80 * MIB
    guest.run_until(30)
    assert guest.reported_bytes >= 60 * MIB
    assert held(guest) == guest.pages.accounted_bytes == 20 * MIB
    assert 0 < guest.footprint_bytes - held(guest) <= RING_BYTES
    guest.verify()
    for block in blocks[30:]:
        assert block is not None
        guest.free(block)
    guest.verify()


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_passes_its_page_checks(name: str) -> None:
    with start_device() as device, guest_on(device, SIZE, PARAMETERS, seed=3, whole_pages=True) as guest:
        workload(name, 1, 4).start(guest)
        guest.run_until(100)
        assert guest.reports > 0
        assert held(guest) == guest.pages.accounted_bytes
        guest.verify()


def test_a_seed_repeats_to_the_byte() -> None:
    """With the device twice, and accounted only: the same passes, the same bytes; another seed differs."""

    def live(seed: int) -> tuple[object, ...]:
        with start_device() as device, guest_on(device, SIZE, PARAMETERS, seed=seed) as guest:
            workload("churn").start(guest)
            guest.run_until(60)
            assert isinstance(guest.pages, MappedPages)
            read = guest.pages.memory.read
            image = b"".join(read(at, SHORT_STAMP) for at in range(RESERVED_BYTES, SIZE, PAGE_SIZE))
            return tuple(guest.passes), guest.pages.accounted_bytes, image

    first = live(7)
    assert first == live(7)
    assert first != live(8)
    dry = accounted_guest(SIZE, PARAMETERS, seed=7)
    workload("churn").start(dry)
    dry.run_until(60)
    assert (tuple(dry.passes), dry.footprint_bytes) == first[:2]


def test_guests_in_step_on_one_loop() -> None:
    loop = EventLoop()
    with (
        start_device() as first,
        start_device() as second,
        guest_on(first, SIZE, PARAMETERS, loop=loop, seed=1) as left,
        guest_on(second, SIZE, PARAMETERS, loop=loop, seed=2) as right,
    ):
        for index, guest in enumerate((left, right)):
            workload("staggered", index, 2).start(guest)
        loop.run_until(100)
        assert left.reports > 0 < right.reports
        assert left.passes != right.passes
        left.verify()
        right.verify()


def test_a_scatterlist_longer_than_an_indirect_table() -> None:
    with start_device() as device, guest_on(device, SIZE, Parameters(order=0, capacity=200)) as guest:
        pages = [guest.allocate(0) for _ in range(1200)]
        for page in pages[::2]:
            assert page is not None
            guest.free(page)
        guest.run_until(10)
        assert guest.passes[0].blocks >= 400  # the budget of 600 blocks: two reports of 200
        assert held(guest) == guest.pages.accounted_bytes == 600 * PAGE_SIZE
        guest.verify()


def test_a_guest_with_zones_of_its_own() -> None:
    """As one that is modelled after a real guest: what is in use from the start is there, and can be freed."""
    counts = {MigrateType.MOVABLE: (5, 4, 3, 0, 0, 0, 0, 0, 0, 3, 20)}
    zone = zone_from_counts("DMA32", 0, SIZE // PAGE_SIZE, Watermarks(100, 200, 300), counts)
    with start_device() as device, guest_on(device, SIZE, Parameters(capacity=4), zones=[zone]) as guest:
        in_use = SIZE - zone.free_pages * PAGE_SIZE
        assert held(guest) == in_use
        guest.write_everything()
        assert held(guest) == guest.pages.accounted_bytes == SIZE
        guest.run_until(60)
        assert held(guest) == guest.pages.accounted_bytes == in_use + (5 + 2 * 4 + 4 * 3) * PAGE_SIZE
        for block in list(zone.used_blocks()):
            guest.free(block)
        guest.verify()
        guest.run_until(120)
        assert held(guest) == guest.pages.accounted_bytes == 0


# Sabotage: the device is forked from this process, so what is patched here is what it does.


@pytest.fixture
def one_page_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    release = Discarder.release

    def greedy(self: Discarder, region: Region, offset: int, length: int) -> None:
        release(self, region, offset, min(length + PAGE_SIZE, region.size - offset))

    monkeypatch.setattr(Discarder, "release", greedy)


def report_before(guest: ModelledGuest, *, used: bool) -> Block:
    """Have a block reported that another follows, which is used, or free but too small to be reported."""
    blocks = [guest.allocate(6) for _ in range(9)]
    ordered = sorted(block for block in blocks if block is not None)
    first = next(block for block in ordered if Block(block.pfn + 64, 6) in ordered and block.pfn % 128 == 0)
    second = Block(first.pfn + 64, 6)
    if not used:
        guest.free(second)
        pieces = [guest.allocate(5), guest.allocate(5)]
        assert pieces == [Block(second.pfn, 5), Block(second.pfn + 32, 5)]
        second = Block(second.pfn, 5)
        guest.free(second)
    guest.free(first)
    guest.run_until(60)
    assert guest.reports > 0
    return second


def touch(guest: ModelledGuest, block: Block, *, used: bool) -> None:
    """What notices it first: a used block is freed, a free one is taken."""
    if used:
        guest.free(block)
    else:
        assert guest.allocate(block.order) == block


@pytest.mark.usefixtures("one_page_too_many")
@pytest.mark.parametrize("used", [True, False], ids=["used", "free"])
def test_a_device_that_releases_one_page_too_many_is_caught(*, used: bool) -> None:
    with start_device() as device, guest_on(device, SIZE, PARAMETERS) as guest:
        victim = report_before(guest, used=used)
        with pytest.raises(PageCheckError, match=f"page {victim.pfn} .* holds zeros"):
            guest.verify()
        with pytest.raises(PageCheckError, match=f"page {victim.pfn} "):
            touch(guest, victim, used=used)


@pytest.mark.parametrize("used", [True, False], ids=["used", "free"])
def test_an_honest_device_is_not(*, used: bool) -> None:
    with start_device() as device, guest_on(device, SIZE, PARAMETERS) as guest:
        victim = report_before(guest, used=used)
        guest.verify()
        touch(guest, victim, used=used)
        guest.verify()


@pytest.mark.usefixtures("one_page_too_many")
def test_a_churning_guest_runs_into_it() -> None:
    with start_device() as device, guest_on(device, SIZE, PARAMETERS) as guest:
        workload("churn").start(guest)
        with pytest.raises(PageCheckError):
            guest.run_until(60)


def test_a_device_that_changes_a_page_is_caught(guest: ModelledGuest) -> None:
    block = guest.allocate(0)
    assert block is not None
    assert isinstance(guest.pages, MappedPages)
    guest.pages.memory.write(block.pfn * PAGE_SIZE + 3, b"!")
    with pytest.raises(PageCheckError, match="foreign bytes"):
        guest.free(block)
