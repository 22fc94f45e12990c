"""The balloon proper: inflating, deflating, statistics, hints."""

from __future__ import annotations

import random

import pytest

from hostdev.driver import Buffer
from hostdev.wire.balloon import PFN_STRUCT, STATISTIC, Role, Statistic
from qmp_glue.virtio_pci import Status
from tests.qtest.bench import FREE, LIST, MIB, PAGE, RAM_BYTES, Bench

# What Linux puts into one buffer (VIRTIO_BALLOON_ARRAY_PFNS_MAX, drivers/virtio/virtio_balloon.c, 6.12).
PFNS = 256
STATISTICS = STATISTIC.encode(Statistic(4, MIB)) + STATISTIC.encode(Statistic(5, 2 * MIB))


def pages(count: int) -> list[int]:
    return [FREE + PAGE * number for number in range(count)]


def shuffled(count: int) -> list[int]:
    return random.Random(20200219).sample(pages(count), count)


@pytest.mark.parametrize("addresses", [pages(PFNS), shuffled(PFNS)], ids=["in order", "shuffled"])
def test_inflate(bench: Bench, addresses: list[int]) -> None:
    bench.drive()
    bench.fill(FREE, (PFNS + 1) * PAGE)
    before = bench.footprint()
    assert bench.send_pages(Role.INFLATE, addresses) == 0
    assert before - bench.footprint() == PFNS * PAGE
    assert bench.holds(FREE + PFNS * PAGE, PAGE)


def test_inflate_every_other_page(bench: Bench) -> None:
    bench.drive()
    bench.fill(FREE, PFNS * PAGE)
    assert bench.given_back(lambda: bench.send_pages(Role.INFLATE, pages(PFNS)[::2])) == PFNS // 2 * PAGE
    assert all(bench.holds(address, PAGE) for address in pages(PFNS)[1::2])


def test_inflate_the_same_page_again(bench: Bench) -> None:
    bench.drive()
    bench.fill(FREE, 4 * PAGE)
    assert bench.given_back(lambda: bench.send_pages(Role.INFLATE, [FREE + PAGE] * 8)) == PAGE
    assert bench.given_back(lambda: bench.send_pages(Role.INFLATE, [FREE + PAGE, FREE])) == PAGE


def test_inflate_outside_of_memory(bench: Bench) -> None:
    bench.drive()
    bench.fill(FREE, 2 * PAGE)
    registers = bench.device.notify_address(Role.INFLATE) & -PAGE
    outside = [RAM_BYTES, FREE, 0xFFFF_FFFF * PAGE, registers, FREE + PAGE]
    before = bench.footprint()
    assert bench.send_pages(Role.INFLATE, outside) == 0
    assert before - bench.footprint() == 2 * PAGE
    assert not bench.device.status & Status.NEEDS_RESET


def test_inflate_in_buffers_that_split_a_number(bench: Bench) -> None:
    bench.drive()
    bench.fill(FREE, 4 * PAGE)
    data = b"".join(PFN_STRUCT.pack(address // PAGE) for address in (FREE + PAGE, FREE + 2 * PAGE))
    bench.qtest.write(LIST, data[:3])
    bench.qtest.write(LIST + 64, data[3:])
    before = bench.footprint()
    assert bench.send(Role.INFLATE, [Buffer(LIST, 3), Buffer(LIST + 64, len(data) - 3)]) == 0
    assert before - bench.footprint() == 2 * PAGE
    assert bench.holds(FREE, PAGE)
    assert bench.holds(FREE + 3 * PAGE, PAGE)


def test_deflate(bench: Bench) -> None:
    bench.drive()
    bench.fill(FREE, PFNS * PAGE)
    bench.send_pages(Role.INFLATE, pages(PFNS))
    before = bench.footprint()
    assert bench.send_pages(Role.DEFLATE, pages(PFNS)) == 0
    assert bench.footprint() == before
    bench.fill(FREE, PFNS * PAGE)
    assert bench.footprint() - before == PFNS * PAGE
    assert bench.send_pages(Role.DEFLATE, [RAM_BYTES, *shuffled(PFNS)]) == 0
    assert bench.holds(FREE, PFNS * PAGE)


@pytest.mark.parametrize("early", [False, True], ids=["after DRIVER_OK", "before DRIVER_OK"])
def test_a_statistics_buffer_is_held_and_returned(bench: Bench, early: bool) -> None:
    """Linux queues its first one, and kicks, before DRIVER_OK (init_vqs, drivers/virtio/virtio_balloon.c, 6.12)."""
    bench.set_up()
    ring = bench.rings[Role.STATISTICS]
    bench.qtest.write(LIST + 2048, STATISTICS)
    buffers = [Buffer(LIST + 2048, len(STATISTICS))]
    if early:
        first = ring.offer(buffers)
        bench.device.add_status(Status.DRIVER_OK)
    else:
        bench.device.add_status(Status.DRIVER_OK)
        first = ring.offer(buffers)
    bench.send_pages(Role.INFLATE, [FREE])
    assert ring.used_index == 0
    second = ring.offer(buffers)
    assert ring.wait_used(first) == 0
    assert ring.used_index == 1
    ring.offer(buffers)
    assert ring.wait_used(second) == 0
    assert ring.used_index == 2


def test_hinted_pages_are_answered_and_kept(bench: Bench) -> None:
    """They are not free: the guest may take them back before the device sees them."""
    bench.drive()
    bench.fill(FREE, MIB)
    before = bench.footprint()
    assert bench.send(Role.FREE_PAGE_HINT, [Buffer(FREE, MIB, writable=True)]) == 0
    assert bench.footprint() == before
    assert bench.holds(FREE, MIB)
