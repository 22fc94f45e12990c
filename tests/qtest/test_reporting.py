"""Reports of free pages: what they release to the byte, what they do not, and that each is answered with length 0."""

from __future__ import annotations

import struct

import pytest

from hostdev.driver import Buffer
from hostdev.wire.balloon import Feature, Role
from hostdev.wire.virtqueue import DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor
from qmp_glue.virtio_pci import Status
from tests.qtest.bench import FEATURES, FREE, MIB, PAGE, RAM_BYTES, Bench

ISR_QUEUE = 1
# Entries of one report on x86 with 4 MiB blocks (PAGE_REPORTING_CAPACITY, include/linux/page_reporting.h, 6.12).
CAPACITY = 32


def test_one_entry(bench: Bench) -> None:
    bench.drive()
    bench.fill(FREE - PAGE, 2 * MIB + 2 * PAGE)
    bench.device.take_isr()
    before = bench.footprint()
    assert bench.report((FREE, 2 * MIB)) == 0
    assert before - bench.footprint() == 2 * MIB
    assert bench.holds(FREE, 2 * MIB, 0)
    assert bench.holds(FREE - PAGE, PAGE)
    assert bench.holds(FREE + 2 * MIB, PAGE)
    bench.wait_until(lambda: bench.device.take_isr() & ISR_QUEUE == ISR_QUEUE, "no interrupt for the report")


@pytest.mark.parametrize("indirect", [False, True])
def test_thirty_two_entries(bench: Bench, indirect: bool) -> None:
    bench.drive()
    entries = [(FREE + 4 * MIB * number, 4 * MIB) for number in range(CAPACITY)]
    bench.fill(FREE, 4 * MIB * CAPACITY)
    before = bench.footprint()
    assert bench.report(*entries, indirect=indirect) == 0
    assert before - bench.footprint() == 4 * MIB * CAPACITY


def test_pages_that_are_empty_already(bench: Bench) -> None:
    bench.drive()
    assert bench.given_back(lambda: bench.report((FREE, 2 * MIB))) == 0


def test_small_and_scattered_entries(bench: Bench) -> None:
    bench.drive()
    bench.fill(FREE, 64 * PAGE)
    entries = [(FREE + 2 * PAGE * number, PAGE) for number in reversed(range(CAPACITY))]
    assert bench.given_back(lambda: bench.report(*entries)) == CAPACITY * PAGE
    for number in range(CAPACITY):
        assert bench.holds(FREE + 2 * PAGE * number, PAGE, 0)
        assert bench.holds(FREE + 2 * PAGE * number + PAGE, PAGE)


def test_an_entry_that_is_not_whole_pages(bench: Bench) -> None:
    """QEMU's passes over such an entry. Ours releases the whole pages inside it: the guest named every byte of them."""
    bench.drive()
    bench.fill(FREE, 8 * PAGE)
    released = bench.given_back(lambda: bench.report((FREE + 1, 8 * PAGE - 2)))
    assert released == (6 * PAGE if bench.ours else 0)
    assert bench.holds(FREE, PAGE)
    assert bench.holds(FREE + 7 * PAGE, PAGE)


def test_readable_buffers_report_nothing(bench: Bench) -> None:
    bench.drive()
    bench.fill(FREE, 4 * PAGE)
    before = bench.footprint()
    assert bench.send(Role.REPORTING, [Buffer(FREE, 2 * PAGE)]) == 0
    assert before == bench.footprint()
    mixed = [Buffer(FREE, 2 * PAGE), Buffer(FREE + 2 * PAGE, 2 * PAGE, writable=True)]
    assert bench.send(Role.REPORTING, mixed) == 0
    assert before - bench.footprint() == 2 * PAGE
    assert bench.holds(FREE, 2 * PAGE)


def test_entries_that_overlap(bench: Bench) -> None:
    bench.drive()
    bench.fill(FREE, 4 * MIB)
    entries = [(FREE, 2 * MIB), (FREE + MIB, 2 * MIB), (FREE, 2 * MIB)]
    assert bench.given_back(lambda: bench.report(*entries)) == 3 * MIB
    assert bench.holds(FREE + 3 * MIB, MIB)


@pytest.mark.parametrize("address", [RAM_BYTES, RAM_BYTES - MIB], ids=["outside", "across the end"])
def test_an_entry_outside_of_memory(bench: Bench, address: int) -> None:
    """QEMU's stops working until its reset. Ours returns the chain, having released what of it is memory."""
    bench.drive()
    bench.fill(RAM_BYTES - MIB, MIB)
    before = bench.footprint()
    if bench.ours:
        assert bench.report((address, 2 * MIB)) == 0
        assert before - bench.footprint() == RAM_BYTES - address
    else:
        bench.rings[Role.REPORTING].offer([Buffer(address, 2 * MIB, writable=True)])
        bench.wait_until(lambda: Status.NEEDS_RESET in bench.device.status, "the device is not broken")
        assert before == bench.footprint()
    bench.renew()
    bench.drive()
    bench.fill(FREE, MIB)
    assert bench.given_back(lambda: bench.report((FREE, MIB))) == MIB


def test_a_chain_in_a_circle(bench: Bench) -> None:
    """QEMU's stops working until its reset. Ours returns the chain and releases nothing of it."""
    bench.drive()
    bench.fill(FREE, PAGE)
    ring = bench.rings[Role.REPORTING]
    ring.write_descriptor(0, Descriptor(FREE, PAGE, DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 0))
    ring.publish(0)
    ring.notify()
    if bench.ours:
        bench.wait_until(lambda: ring.take_used() == [(0, 0)], "the chain is not returned")
        assert bench.device.status & Status.NEEDS_RESET == 0
    else:
        bench.wait_until(lambda: Status.NEEDS_RESET in bench.device.status, "the device is not broken")
    assert bench.holds(FREE, PAGE)


def test_an_available_index_that_lies(bench: Bench) -> None:
    """Ours stops that ring alone: a back end has no way to set NEEDS_RESET.

    QEMU's believes it, and says NEEDS_RESET at the first head, whose buffer has no bytes.
    """
    bench.drive()
    ring = bench.rings[Role.REPORTING]
    ring.set_available_index(ring.size + 1)
    ring.notify()
    if bench.ours:
        assert bench.send_pages(Role.INFLATE, [FREE]) == 0
    else:
        bench.wait_until(lambda: Status.NEEDS_RESET in bench.device.status, "the device is not broken")
    assert ring.used_index == 0
    bench.renew()
    bench.drive()
    assert bench.report((FREE, MIB)) == 0


def test_many_reports_before_one_kick_come_back_in_order(bench: Bench) -> None:
    bench.drive()
    ring = bench.rings[Role.REPORTING]
    bench.fill(FREE, ring.size * PAGE)
    before = bench.footprint()
    heads = [ring.add([Buffer(FREE + number * PAGE, PAGE, writable=True)]) for number in range(ring.size)]
    ring.notify()
    ring.wait_used(heads[-1])
    assert ring.take_used() == [(head, 0) for head in heads[:-1]]
    assert before - bench.footprint() == ring.size * PAGE


@pytest.mark.parametrize("size", [2, 8, 32])
def test_other_queue_sizes(bench: Bench, size: int) -> None:
    bench.drive(size=size)
    assert bench.device.queue_size(Role.REPORTING) == size
    for _ in range(3 * size):
        bench.fill(FREE, 2 * PAGE)
        before = bench.footprint()
        assert bench.report((FREE, PAGE), (FREE + PAGE, PAGE)) == 0
        assert before - bench.footprint() == 2 * PAGE


def test_the_ring_index_wraps(bench: Bench) -> None:
    """65536 chains and then some, a whole ring at a time: slot and head are the same all along."""
    bench.drive()
    ring = bench.rings[Role.REPORTING]
    size = ring.size
    for head in range(size):
        ring.write_descriptor(head, Descriptor(FREE, PAGE, DESCRIPTOR_WRITE, 0))
    bench.qtest.write(ring.available + 4, struct.pack(f"<{size}H", *range(size)))
    for index in range(size, (1 << 16) + 2 * size, size):
        ring.set_available_index(index & 0xFFFF)
        ring.notify()
        bench.wait_for_index(ring, index & 0xFFFF)
    bench.fill(FREE, PAGE)
    ring.set_available_index(size + 1)
    ring.notify()
    bench.wait_for_index(ring, size + 1)
    assert bench.holds(FREE, PAGE, 0)


def test_dense_numbering_without_hinting(bench: Bench) -> None:
    """Linux numbers queues over what was negotiated, QEMU over what it offered: with a hole they miss each other.

    Ours follows the driver, so ring 3 is the reporting ring here; in QEMU's it is the one for hints.
    """
    bench.set_up(FEATURES & ~Feature.FREE_PAGE_HINT, numbers={Role.REPORTING: 3})
    bench.device.add_status(Status.DRIVER_OK)
    bench.fill(FREE, MIB)
    before = bench.footprint()
    assert bench.report((FREE, MIB)) == 0
    assert before - bench.footprint() == (MIB if bench.ours else 0)


def test_fixed_numbering_without_hinting(bench: Bench) -> None:
    bench.set_up(FEATURES & ~Feature.FREE_PAGE_HINT, numbers={Role.REPORTING: 4})
    bench.device.add_status(Status.DRIVER_OK)
    bench.fill(FREE, MIB)
    assert bench.given_back(lambda: bench.report((FREE, MIB))) == MIB
