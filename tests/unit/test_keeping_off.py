"""A device that touches no guest memory any more, in one process: what it still knows of rings, and what it answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from hostdev import snapshot
from hostdev.balloon import DEADLY, MAX_DEADLY, MAX_DEATHS
from hostdev.driver import Buffer
from hostdev.fds import Fd
from hostdev.journal import Journal
from hostdev.snapshot import Done
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import Role, Statistic
from hostdev.wire.vhost_user import Request
from tests.device_program import descriptors as open_descriptors
from tests.in_process import MIB, PAGE, InProcess
from tests.unit.test_balloon import offered, report, send_statistics
from tests.unit.test_record import descriptors, parts_of

REPORTING = Role.REPORTING
FREE = 8 * MIB
HIGH = 32 * MIB


@pytest.fixture
def guest() -> Iterator[InProcess]:
    with InProcess(rings_at=HIGH) as guest:
        guest.start()
        for _ in range(3):
            report(guest, offered(FREE, PAGE))
        yield guest


def successor(guest: InProcess, cut: int | None, *, keeps_off: bool = False) -> InProcess:
    """Another process's device after the memory was cut to so many bytes."""
    held = descriptors(guest)
    image = snapshot.parse(snapshot.gather(parts_of(guest), Done()))
    if cut is not None:
        os.ftruncate(guest.memory.fd.fileno(), cut)
    other = InProcess(memory=guest.memory, rings_at=HIGH)
    snapshot.restore(parts_of(other), image, held, keeps_off=keeps_off)
    assert other.balloon.keeps_off
    assert other.balloon.inert
    assert not other.balloon.is_running
    return other


def test_the_base_is_read_where_the_ring_is_still_there(guest: InProcess) -> None:
    with successor(guest, HIGH + 4 * MIB) as other:
        assert other.stop() == {0: 0, 1: 0, 2: 0, 3: 0, 4: 3}


def test_a_held_buffer_is_offered_again(guest: InProcess) -> None:
    send_statistics(guest, Statistic(1, 1))
    with successor(guest, None, keeps_off=True) as other:
        assert other.stop() == {0: 0, 1: 0, 2: 0, 3: 0, 4: 3}


def test_the_base_is_what_was_set_where_the_ring_is_gone(guest: InProcess) -> None:
    bases = guest.stop()
    guest.resume(bases=bases)
    with successor(guest, FREE) as other:
        assert other.stop() == bases


@pytest.mark.parametrize(
    "change",
    [
        lambda guest: guest.status(Request.REM_MEM_REG, wire.SingleRegion(0, guest.memory.regions[0])),
        lambda guest: guest.balloon.rings.give_up(REPORTING),
    ],
    ids=["without memory", "broken"],
)
def test_rings_that_did_not_run(guest: InProcess, change: Callable[[InProcess], object]) -> None:
    change(guest)
    with successor(guest, None, keeps_off=True) as other:
        assert other.stop()[REPORTING] == 3


def test_rings_that_were_never_set_up() -> None:
    with InProcess() as guest:
        guest.negotiate()
        guest.add_memory()
        with successor(guest, None, keeps_off=True) as other:
            assert set(other.stop().values()) == {0}


def test_a_ring_that_starts_later_waits_for_ever(guest: InProcess) -> None:
    with successor(guest, FREE) as other:
        other.stop()
        assert [other.start_ring(ring, 9) for ring in other.rings] == [0] * 5
        other.enable()
        other.rings[REPORTING].notify()
        assert [other.run(ring.index) for ring in other.rings] == [0] * 5
        assert other.stop() == dict.fromkeys(range(5), 9)


def test_its_own_successor_is_the_same(guest: InProcess) -> None:
    """For good: the file has its length again, and no worker has died, so only the record knows of it."""
    size = os.fstat(guest.memory.fd.fileno()).st_size
    with successor(guest, FREE) as second, successor(second, size) as third:
        assert third.balloon.giver.why_inert == second.balloon.giver.why_inert
        assert third.stop() == second.stop()


# Chains that workers die with


class Deadly(Journal):
    """Of a guest with whose every chain so many workers have died."""

    def take_up(self, index: int, position: int) -> int:
        return MAX_DEATHS


def test_a_chain_that_workers_die_with_is_passed_over() -> None:
    with InProcess() as guest:
        guest.start()
        guest.balloon.journal = Deadly()
        for number in range(1, MAX_DEADLY + 1):
            report(guest, offered(FREE, PAGE))
            assert guest.metrics.value("guest_errors_total", DEADLY) == number
            assert guest.balloon.inert == (number == MAX_DEADLY)
        assert guest.discarder.released == []


def test_a_buffer_that_is_held_goes_first() -> None:
    with InProcess() as guest:
        guest.start()
        ring = guest.rings[Role.STATISTICS]
        held = ring.offer([Buffer(MIB, 10)])
        guest.run(Role.STATISTICS)
        guest.balloon.journal = Deadly()
        deadly = ring.offer([Buffer(MIB, 10)])
        guest.run(Role.STATISTICS)
        assert [head for head, _length in ring.take_used()] == [held, deadly]


def test_a_ring_that_says_that_there_is_something_and_has_nothing() -> None:
    """Its index changes between two looks."""
    with InProcess() as guest:
        guest.start()
        guest.balloon.journal = Deadly()
        queue = guest.balloon.rings.started[REPORTING].queue
        queue.take = lambda: None  # type: ignore[method-assign]
        guest.rings[REPORTING].offer([offered(FREE, PAGE)])
        assert not guest.step(REPORTING).returned
        guest.balloon.journal = Journal()
        assert not guest.step(REPORTING).returned


def test_descriptors_are_closed() -> None:
    before = len(open_descriptors(os.getpid()))
    with InProcess() as guest:
        guest.start()
        with successor(guest, FREE) as other:
            assert isinstance(other.session.memory.regions[0].fd, Fd)
    assert len(open_descriptors(os.getpid())) == before


def test_a_ring_that_is_not_started_is_given_up_already() -> None:
    with InProcess() as guest:
        guest.balloon.rings.give_up(REPORTING)
        assert guest.balloon.rings.stop(REPORTING) is None
