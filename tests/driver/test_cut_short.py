"""Guest memory whose file is cut short: a touch of what is gone is a SIGBUS, which ends a worker and nothing else.

Its successors touch guest memory by pread alone: they answer messages, serve no ring and release nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostdev.driver import USER_BASE, Buffer, GuestMemory
from hostdev.frontend import Frontend
from hostdev.memory import Region
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import Role
from hostdev.wire.vhost_user import Request
from tests.device_program import Program, children, program, serves, wait_for, works
from tests.in_process import MIB, PAGE

HIGH, LOW = 32 * MIB, 16 * MIB
GUEST_RAM = "memfd:guest-ram"


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Program]:
    with program(tmp_path / "balloon.sock") as device:
        yield device
        assert device.process.poll() in (None, 0)


@pytest.fixture
def guest(device: Program) -> Iterator[Frontend]:
    """Its rings lie in the upper half of its memory."""
    with Frontend(device.connect(), rings_at=HIGH) as guest:
        guest.start()
        works(guest)
        works(guest)
        yield guest


def successor(device: Program, gone: int) -> int:
    """Wait for the worker that took over, and has said so."""
    wait_for(lambda: gone not in children(device.pid) and bool(children(device.pid)), "a successor")
    return device.worker()


def keeps_off(pid: int) -> bool:
    return GUEST_RAM not in Path(f"/proc/{pid}/maps").read_text()


def answers(guest: Frontend) -> None:
    assert guest.read_config().num_pages == 0
    assert guest.request(Request.GET_FEATURES) & wire.F_PROTOCOL_FEATURES


def cut(guest: Frontend, size: int) -> None:
    os.ftruncate(guest.memory.fd.fileno(), size)


def test_case_19_memory_that_is_cut_short_under_its_rings(device: Program, guest: Frontend) -> None:
    """One worker dies, and no second: kicks, messages, a whole pause and new memory leave its successor alive."""
    first = device.worker()
    cut(guest, LOW)
    guest.rings[Role.REPORTING].notify()
    second = successor(device, first)
    answers(guest)
    assert keeps_off(second)
    for ring in guest.rings:
        ring.notify()
    guest.enable(enabled=False)
    for ring in guest.rings:
        reply = guest.request(Request.GET_VRING_BASE, wire.VringState(ring.index, 0))
        assert reply.index == ring.index
    fresh = wire.MemoryRegion(1 << 40, 2 * MIB, 1 << 46, 0)
    with contextlib.closing(GuestMemory(2 * MIB)) as memory:
        add = wire.SingleRegion(0, fresh)
        assert guest.request(Request.ADD_MEM_REG, add, [memory.fd], need_reply=True) == 0
    assert [guest.start_ring(ring) for ring in guest.rings] == [0] * len(guest.rings)
    guest.enable()
    for ring in guest.rings:
        ring.notify()
    answers(guest)
    assert (device.worker(), keeps_off(second)) == (second, True)
    guest.close()
    serves(device.connect())
    said = device.end()[1]
    assert said.count("SIGBUS") == 2, said  # that it died of it, and what follows from that
    assert "guest memory was cut short" in said
    assert "Traceback" not in said


def test_case_19_memory_that_is_cut_short_beside_the_rings(device: Program) -> None:
    """Noticed by no touch: a successor finds it, and still knows where each ring is, which it reads by pread."""
    with Frontend(device.connect()) as guest:
        guest.start()
        for _ in range(3):
            works(guest)
        first = device.worker()
        cut(guest, HIGH)
        works(guest)
        os.kill(first, signal.SIGKILL)
        second = successor(device, first)
        answers(guest)
        assert keeps_off(second)
        assert guest.stop()[Role.REPORTING] == 4


def test_case_19_what_keeps_off_once_does_so_for_good(device: Program, guest: Frontend) -> None:
    """Also when the file has its length again: what was in it is lost, and the rings are not what they were."""
    first = device.worker()
    cut(guest, LOW)
    guest.rings[Role.REPORTING].notify()
    second = successor(device, first)
    answers(guest)
    cut(guest, guest.memory.size)
    os.kill(second, signal.SIGKILL)
    third = successor(device, second)
    answers(guest)
    assert keeps_off(third)


def test_a_bus_error_that_memory_has_no_part_in(device: Program) -> None:
    """Somebody's signal, or another mapping's. The second time it is guest memory that is taken for it."""
    with Frontend(device.connect()) as guest:
        guest.start()
        works(guest)
        first = device.worker()
        os.kill(first, signal.SIGBUS)
        second = successor(device, first)
        works(guest)
        os.kill(second, signal.SIGBUS)
        third = successor(device, second)
        answers(guest)
        assert keeps_off(third)
        assert guest.stop()[Role.REPORTING] == 2


def test_a_trace_that_is_cut_short_ends_and_nothing_else_does(tmp_path: Path) -> None:
    """As a log's rotation would do it."""
    trace = tmp_path / "trace"
    with program(tmp_path / "balloon.sock", f"--trace={trace}", "--once") as device:
        with Frontend(device.connect()) as guest:
            guest.start()
            works(guest)
            os.truncate(trace, 0)
            for _ in range(3):
                works(guest)
        said = device.wait()[1]
    assert said.count("the trace ends") == 1
    assert "inert" not in said


def test_a_trace_that_cannot_be_gone_on_with_is_left(tmp_path: Path) -> None:
    trace = tmp_path / "folder" / "trace"
    trace.parent.mkdir()
    with program(tmp_path / "balloon.sock", f"--trace={trace}", "--once") as device:
        with Frontend(device.connect()) as guest:
            guest.start()
            works(guest)
            shutil.rmtree(trace.parent)
            first = device.worker()
            os.kill(first, signal.SIGKILL)
            successor(device, first)
            works(guest)
        said = device.wait()[1]
    assert said.count("nothing more is traced") == 1
    assert "Traceback" not in said


def test_case_19_buffers_that_are_cut_off_are_no_memory(device: Program) -> None:
    """Rings that are still there serve on: a list of page frame numbers in what is gone is outside guest memory."""
    with Frontend(device.connect()) as guest:
        guest.start()
        first = device.worker()
        cut(guest, LOW)
        ring = guest.rings[Role.INFLATE]
        assert ring.wait_used(ring.offer([Buffer(HIGH, 1024)])) == 0
        report = guest.rings[Role.REPORTING]
        assert report.wait_used(report.offer([Buffer(HIGH, 2 * MIB, writable=True)])) == 0
        assert guest.memory.footprint() <= LOW
        works(guest)
        assert device.worker() == first


def test_a_file_that_may_shrink_is_told(tmp_path: Path) -> None:
    with program(tmp_path / "balloon.sock", "--once") as device:
        serves(device.connect())
        assert "not sealed against shrinking" in device.wait()[1]


@pytest.mark.parametrize("sealed", [False, True])
def test_seals_are_read(sealed: bool) -> None:
    with contextlib.closing(GuestMemory(2 * MIB)) as memory:
        if sealed:
            fcntl.fcntl(memory.fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        region = Region(memory.regions[0], memory.fd)
        assert region.may_shrink is not sealed
        region.close()


def test_bytes_of_two_regions_are_answered_and_kept(device: Program) -> None:
    """One file, twice in the guest's memory: a page that is free at one address may be in use at the other."""
    low = wire.MemoryRegion(0, HIGH, USER_BASE, 0)
    twice = wire.MemoryRegion(1 << 32, LOW, USER_BASE + (1 << 32), LOW)
    with Frontend(device.connect(), memory=GuestMemory(HIGH, [low, twice])) as guest:
        guest.start()
        ring = guest.rings[Role.REPORTING]
        guest.memory.write(LOW, b"\xaa" * PAGE)
        before = guest.memory.footprint()
        for address in (LOW, 1 << 32):
            ring.wait_used(ring.offer([Buffer(address, PAGE, writable=True)]))
        assert (guest.memory.read(LOW, PAGE), guest.memory.footprint()) == (b"\xaa" * PAGE, before)
        assert guest.request(Request.REM_MEM_REG, wire.SingleRegion(0, twice), need_reply=True) == 0
        works(guest)
