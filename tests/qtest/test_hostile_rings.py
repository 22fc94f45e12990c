"""Rings that no driver should leave behind: indices, heads, memory taken from under them. Ours stops that ring, and no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostdev.driver import Buffer
from hostdev.wire.balloon import Role
from hostdev.wire.virtqueue import DESCRIPTOR_WRITE, Descriptor
from qmp_glue.virtio_pci import PciRing
from tests.qtest.bench import (
    FREE,
    LIST,
    MIB,
    PAGE,
    PATTERN,
    RAM_BYTES,
    RING_BYTES,
    RING_SIZE,
    RINGS_AT,
    Bench,
)
from tests.qtest.hostile import (
    BROKEN,
    ROM_AT,
    Witness,
    await_broken,
    await_stopped,
    offer,
    pfns,
)

ONE_PAGE = Descriptor(FREE, PAGE, DESCRIPTOR_WRITE, 0)


@pytest.fixture
def witness(bench: Bench) -> Iterator[Witness]:
    witness = Witness(bench)
    yield witness
    witness.check()


def lie(ring: PciRing, ahead: int) -> None:
    ring.set_available_index((ring.next_available + ahead) & 0xFFFF)
    ring.notify()


@pytest.mark.parametrize("ahead", [RING_SIZE + 1, 1000, 1 << 15, -1, -RING_SIZE])
def test_an_index_that_cannot_be(ours: Bench, ahead: int) -> None:
    """The ring stops, through a pause as well: the base that is told is where it was, and it breaks there again."""
    witness = Witness(ours)
    ours.drive()
    witness.check_service()
    ring = ours.rings[Role.REPORTING]
    assert ring.used_index == 1
    lie(ring, ahead)
    await_stopped(ours, Role.REPORTING)
    ours.qmp("stop")
    ours.qmp("cont")
    await_stopped(ours, Role.REPORTING)
    assert ring.used_index == 1
    witness.check_service(but=Role.REPORTING)
    witness.expected = [f"{BROKEN} {ring.index}"] * 2
    witness.check()


def test_an_index_more_than_a_ring_ahead(bench: Bench, witness: Witness) -> None:
    """QEMU's does not mind: it goes around the ring, up to 65535 chains, until it meets one that it cannot use."""
    bench.drive()
    bench.report((FREE, PAGE))
    ring = bench.rings[Role.REPORTING]
    lie(ring, ring.size + 1)
    if bench.ours:
        await_stopped(bench, Role.REPORTING)
        assert ring.used_index == 1
        witness.expected = [f"{BROKEN} {ring.index}"]
    else:
        bench.wait_for_index(ring, ring.size + 2)


@pytest.mark.parametrize("role", [Role.INFLATE, Role.STATISTICS, Role.FREE_PAGE_HINT, Role.REPORTING])
@pytest.mark.parametrize("head", [RING_SIZE, 0xFFFF])
def test_a_head_outside_of_the_table(bench: Bench, witness: Witness, role: Role, head: int) -> None:
    bench.drive()
    ring = bench.rings[role]
    # QEMU's ring of hints is of 1024.
    offer(ring, max(head, bench.device.queue_size(role)))
    if bench.ours:
        await_stopped(bench, role)
        witness.check_service(but=role)
        witness.expected = [f"{BROKEN} {ring.index}"]
    else:
        await_broken(bench)
    assert ring.used_index == 0


def test_the_same_head_twice(bench: Bench, witness: Witness) -> None:
    """The first is returned before the second is looked at, so it may be."""
    bench.drive()
    ring = bench.rings[Role.REPORTING]
    ring.write_descriptor(0, ONE_PAGE)
    bench.fill(FREE, PAGE)
    before = bench.footprint()
    ring.publish(0)
    offer(ring, 0)
    bench.wait_for_index(ring, 2)
    assert ring.take_used() == [(0, 0), (0, 0)]
    assert before - bench.footprint() == PAGE
    witness.needs_reset = False


def test_the_head_that_is_held(ours: Bench) -> None:
    """A statistics buffer stays with the device. The same one offered again meanwhile is no ring that can be followed."""
    witness = Witness(ours)
    ours.drive()
    ring = ours.rings[Role.STATISTICS]
    ring.write_descriptor(0, Descriptor(LIST, 20, 0, 0))
    ring.publish(0)
    offer(ring, 0)
    await_stopped(ours, Role.STATISTICS)
    assert ring.used_index == 0
    witness.check_service(but=Role.STATISTICS)
    witness.expected = [f"{BROKEN} {ring.index}"]
    witness.check()


# --- memory taken from under a ring, by its own driver ---


@pytest.mark.parametrize("whose", ["one", "all", "everything"])
def test_a_report_of_the_rings(bench: Bench, witness: Witness, whose: str) -> None:
    """Its own table and indices read as zeroes from then on. The chain is answered; then the ring has gone backwards."""
    bench.drive()
    ring = bench.rings[Role.REPORTING]
    own = RINGS_AT + ring.index * RING_BYTES
    named = {
        "one": (own, RING_BYTES),
        "all": (RINGS_AT, len(Role) * RING_BYTES),
        "everything": (MIB, RAM_BYTES - MIB),
    }[whose]
    bench.fill(FREE, PAGE)
    bench.fill(ROM_AT - PAGE, PAGE)
    ring.offer([Buffer(*named, writable=True)])
    bench.wait_for_index(ring, 1)
    assert bench.holds(ROM_AT - PAGE, PAGE)
    assert bench.holds(FREE, PAGE, 0 if whose == "everything" else PATTERN)
    ring.notify()
    if bench.ours:
        await_stopped(bench, Role.REPORTING)
        assert bench.send_pages(Role.INFLATE, [FREE]) == 0
        witness.expected = [f"{BROKEN} {ring.index}"]
    else:
        await_broken(bench)
    assert ring.used_index == 1


def test_an_inflation_by_its_own_list_and_ring(ours: Bench) -> None:
    """The numbers were copied before the first page goes."""
    witness = Witness(ours)
    ours.drive()
    ring = ours.rings[Role.INFLATE]
    ours.fill(FREE, 2 * PAGE)
    ours.qtest.write(LIST, pfns(LIST // PAGE, ring.descriptors // PAGE, FREE // PAGE))
    offered = ring.offer([Buffer(LIST, 12)])
    assert ring.wait_used(offered) == 0
    assert ours.holds(LIST, PAGE, 0)
    assert ours.holds(FREE, PAGE, 0)
    assert ours.holds(FREE + PAGE, PAGE)
    await_stopped(ours, Role.INFLATE)
    witness.check_service(but=Role.INFLATE)
    witness.expected = [f"{BROKEN} {ring.index}"]
    witness.check()
