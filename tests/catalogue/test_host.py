"""Case 46: a host that refuses, that has no room, that stops us, whose clock jumps and whose disk is full; and our own faults.

Whatever it is, QEMU's connection stays open and what it asks is answered.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostdev import fds
from hostdev.acceptor import PAUSE
from hostdev.config_space import ConfigSpace
from hostdev.config_teller import ConfigTeller
from hostdev.driver import DEADLINE, Buffer
from hostdev.frontend import Frontend, start_device
from hostdev.giver import MAX_HOST_ERRORS, Giver
from hostdev.jobs import Jobs
from hostdev.memory import Region
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import Config
from hostdev.wire.vhost_user import Request
from tests.catalogue.acts import (
    FREE,
    INFLATE,
    LIST,
    REPORTING,
    STATISTICS,
    fill,
    is_empty,
    is_filled,
    is_read,
    limit_of_files,
    offered,
    report,
    status,
    still_inflates,
    still_serves,
    wait_idle,
)
from tests.clock import KeepersClock
from tests.control_process import state
from tests.device_program import Program, children, descriptors, listens, program, wait_for, watches
from tests.in_process import MIB, PAGE, InProcess

GET_FEATURES = wire.message(Request.GET_FEATURES, 0, b"")


# The host refuses to take memory back


REFUSALS = (errno.ENOSPC, errno.EPERM, errno.EINTR, errno.EOPNOTSUPP, errno.EIO, errno.ENOMEM, errno.EACCES)


@pytest.mark.parametrize("code", REFUSALS, ids=lambda code: errno.errorcode[code])
def test_case_46_the_host_refuses(local: InProcess, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Counted, the buffer returned, the page kept; the next one is tried, and after eight in a row none is.

    EINTR as well: no signal has a handler in a worker, so nothing is there that could be tried again.
    """

    def refuse(_region: Region, _advice: int, _offset: int, _length: int) -> None:
        raise OSError(code, os.strerror(code))

    fill(local, FREE, PAGE)
    for turn in range(1, MAX_HOST_ERRORS):
        with monkeypatch.context() as patch:
            patch.setattr(Region, "advise", refuse)
            assert report(local, offered(FREE, PAGE)) == 0
        assert (local.balloon.inert, is_filled(local, FREE, PAGE)) == (False, True)
        assert local.metrics.value("host_errors_total", str(code)) == turn
    still_serves(local)
    with monkeypatch.context() as patch:
        patch.setattr(Region, "advise", refuse)
        for _ in range(MAX_HOST_ERRORS):
            assert not local.balloon.inert
            assert report(local, offered(FREE, PAGE)) == 0
    assert local.balloon.inert
    fill(local, FREE, PAGE)
    assert report(local, offered(FREE, PAGE)) == 0
    assert is_filled(local, FREE, PAGE)
    assert local.read_config() == Config()


# The host has no room


def test_case_46_no_descriptor_for_a_front_end(tmp_path: Path) -> None:
    """It waits in the backlog until there is one; the device says so and does not spin."""
    path = tmp_path / "balloon.sock"
    with program(path) as device:
        begun = time.monotonic()
        with limit_of_files(device.pid, 0):
            connection = device.connect()
            connection.sendall(GET_FEATURES)
            wait_for(lambda: not watches(device.pid, path), "looking away")
            assert not is_readable(connection, 0)
        # Each PAUSE it tries once.
        tries = 1 + int((time.monotonic() - begun) / PAUSE)
        with Frontend(connection) as guest:
            assert guest.receive()[0].request == Request.GET_FEATURES
            guest.start()
            still_serves(guest)
        status, said = device.end()
    assert (status, "Traceback" in said) == (0, False)
    # Said of the first, the second, the fourth, ...
    assert 1 <= said.count("no front end can be accepted") <= tries.bit_length()


def test_case_46_descriptors_for_a_part_of_what_is_needed(listening: Program) -> None:
    """A connection and no record, a record and no worker: turned away, or answered as soon as there are enough."""
    idle = len(descriptors(listening.pid))
    for left in range(1, 9):
        with limit_of_files(listening.pid, left):
            connection = listening.connect()
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(GET_FEATURES)
            wait_for(functools.partial(is_noticed, listening, connection, idle), "a look at it")
        with connection:
            assert is_readable(connection, DEADLINE), "neither answered nor turned away"
        wait_idle(listening, idle)
    with Frontend(listening.connect()) as guest:
        guest.start()
        still_serves(guest)


def is_noticed(device: Program, connection: socket.socket, idle: int) -> bool:
    return is_readable(connection, 0) or len(descriptors(device.pid)) > idle


def is_readable(connection: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@pytest.mark.parametrize("which", ["receive", "send"])
def test_case_46_no_memory_for_a_message(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """Tried again: to close would end the VM."""
    real: Callable[..., object] = getattr(fds, which)
    failures = [errno.ENOMEM, errno.ENOBUFS, errno.ENOMEM]

    def short(sock: socket.socket, *arguments: object) -> object:
        # Of the front end's connection alone: a pair to a worker is of another type.
        if sock.type == socket.SOCK_STREAM and failures:
            code = failures.pop()
            raise OSError(code, os.strerror(code))
        return real(sock, *arguments)

    monkeypatch.setattr(fds, which, short)
    with start_device() as device:
        monkeypatch.undo()
        with Frontend(device.connect()) as guest:
            guest.start()
            still_serves(guest)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_case_46_told_to_end_at_any_point(tmp_path: Path, number: signal.Signals) -> None:
    """After so many messages, and with a chain under way: it ends well, with its worker, and leaves nothing."""
    path = tmp_path / "balloon.sock"
    for seed in range(4):
        with program(path, "--on-term=now") as device, Frontend(device.connect()) as guest:
            for _ in range(random.Random(seed).randrange(12)):
                guest.request(Request.GET_FEATURES)
            if seed % 2:
                guest.start()
                guest.rings[REPORTING].offer([offered(FREE, 16 * MIB)])
            ended, said = device.end(number)
            assert (ended, "Traceback" in said) == (0, False)
    assert list(tmp_path.iterdir()) == []


def test_case_46_stopped_and_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole, for longer than a worker has for its answer: nobody is late for that, and what was asked is answered."""
    clock = KeepersClock(monkeypatch)
    with start_device() as device, Frontend(device.connect()) as guest:
        guest.start()
        (worker,) = device.workers()
        # The worker first: it is to have the message when time is up for it.
        os.kill(worker, signal.SIGSTOP)
        guest.send_raw(GET_FEATURES)
        fill(guest, FREE, PAGE)
        head = guest.rings[REPORTING].offer([offered(FREE, PAGE)])
        wait_for(lambda: is_read(guest.connection), "the message to be passed on")
        os.kill(device.pid, signal.SIGSTOP)
        wait_for(lambda: state(worker) == state(device.pid) == "T", "the stop")
        clock.skip(3600)
        assert not is_readable(guest.connection, 0)
        os.kill(device.pid, signal.SIGCONT)
        wait_for(lambda: state(device.pid) == "S", "the keeper's look at who is late")
        os.kill(worker, signal.SIGCONT)
        assert guest.receive()[0].request == Request.GET_FEATURES
        assert guest.rings[REPORTING].wait_used(head) == 0
        assert is_empty(guest, FREE, PAGE)
        assert device.workers() == [worker]
        still_serves(guest)


# Clocks


@pytest.mark.parametrize("jump", [-(10**9), -3600.0, 3600.0, 10.0**9])
def test_case_46_a_clock_that_jumps(local: InProcess, jump: float) -> None:
    """The guest is asked by the monotonic clock; when it has answered is told by the other one."""
    statistics = local.balloon.statistics
    ring = local.rings[STATISTICS]
    local.memory.write(FREE, bytes(10))
    statistics.set_interval(10)
    head = ring.add([offered(FREE, 0)])
    local.run(STATISTICS)
    assert statistics.due == local.now + 10
    before = statistics.last_update
    monotonic, wall = local.now, statistics._wall_clock
    statistics._wall_clock = lambda: wall() + jump
    assert local.tick(9.0) == set()
    assert local.tick(1.0) == {STATISTICS}
    assert ring.take_used() == [(head, 0)]
    ring.add([offered(FREE, 0)])
    local.run(STATISTICS)
    assert statistics.due == monotonic + 20
    assert statistics.last_update == before + 10 + int(jump)
    still_serves(local)


# A log that cannot be written


@contextlib.contextmanager
def broken_log(how: str) -> Iterator[int]:
    """A descriptor that nothing can be written to."""
    if how == "disk full":
        number = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
    else:
        reading, number = os.pipe()
        os.close(reading)
    try:
        yield number
    finally:
        os.close(number)


def test_case_46_standard_descriptors_that_are_closed(tmp_path: Path) -> None:
    """What is opened does not get their numbers: a worker keeps those, and would have the keeper's own descriptors."""
    path = tmp_path / "balloon.sock"
    command = [sys.executable, "-m", "hostdev.cli", f"--socket-path={path}"]
    with subprocess.Popen(["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]) as process:
        try:
            wait_for(lambda: listens(path) or process.poll() is not None, "listening")
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(path))
            with Frontend(connection) as guest:
                guest.start()
                still_serves(guest)
                assert_standard(process.pid, *children(process.pid))
            process.terminate()
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()


def test_case_46_a_connection_that_is_a_standard_descriptor() -> None:
    """As inetd has it: the connection is moved out of the way, and no worker has it."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "hostdev.cli", "--fd=0"]
    with theirs:
        process = subprocess.Popen(
            command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    with process:
        with Frontend(ours) as guest:
            guest.start()
            still_serves(guest)
            assert_standard(process.pid, *children(process.pid))
        assert process.wait(DEADLINE) == 0


def assert_standard(*pids: int) -> None:
    """Numbers 0 to 2 are nobody's file; keeper and worker."""
    assert len(pids) == 2
    for pid in pids:
        assert [descriptors(pid)[number] for number in range(3)] == ["/dev/null"] * 3


@pytest.mark.parametrize("how", ["disk full", "nobody reads", "closed"])
def test_case_46_a_log_that_cannot_be_written(tmp_path: Path, how: str) -> None:
    """ENOSPC and EPIPE are not the device's end, nor is a signal sent for the latter."""
    path = tmp_path / "balloon.sock"
    command = [sys.executable, "-m", "hostdev.cli", f"--socket-path={path}", "--log-level=debug"]
    if how == "closed":
        command = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    with broken_log(how) as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_for(lambda: listens(path) or process.poll() is not None, "listening")
            for _ in range(2):
                connection = socket.socket(socket.AF_UNIX)
                connection.connect(str(path))
                with Frontend(connection) as guest:
                    guest.start()
                    still_serves(guest)
                    ring = guest.rings[REPORTING]
                    ring.set_available_index(5000)  # a line in the log for that
                    ring.notify()
                    assert status(guest, Request.SET_VRING_CALL, wire.U64(99), [ring.call]) == 1
                    still_inflates(guest)
                    os.kill(children(process.pid)[0], signal.SIGKILL)
                    still_inflates(guest, FREE + PAGE)
            process.terminate()
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []


# Our own faults


FAULTS = (MemoryError, ZeroDivisionError, KeyError, RecursionError, AssertionError, OSError, UnicodeError)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_case_46_an_unexpected_error_in_a_message(
    monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    """The message is answered, the device is inert, its worker and the connection live."""

    def fail(*_arguments: object) -> None:
        raise fault("a fault of ours")

    monkeypatch.setattr(ConfigSpace, "read", fail)
    with start_device() as device, Frontend(device.connect()) as guest:
        guest.start()
        still_serves(guest)
        workers = device.workers()
        access = wire.ConfigAccess(0, 16, 0, bytes(16))
        for _ in range(3):
            assert guest.request(Request.GET_CONFIG, access).size == 0
        assert_inert(guest)
        assert device.workers() == workers
        assert guest.stop()[REPORTING] == 2


def assert_inert(guest: Frontend) -> None:
    """Everything is answered, nothing is released."""
    fill(guest, FREE, PAGE)
    assert report(guest, offered(FREE, PAGE)) == 0
    guest.memory.write(LIST, (FREE // PAGE).to_bytes(4, "little"))
    ring = guest.rings[INFLATE]
    assert ring.wait_used(ring.offer([Buffer(LIST, 4)])) == 0
    assert is_filled(guest, FREE, PAGE)


@pytest.mark.parametrize("where", [(Jobs, "of"), (Giver, "give")], ids=lambda where: str(where[1]))
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_case_46_an_unexpected_error_in_a_ring(
    monkeypatch: pytest.MonkeyPatch, where: tuple[type, str], fault: type[Exception]
) -> None:
    """The chain is returned and the device inert; a report waits in the guest's kernel without a time-out."""
    real = getattr(*where)
    failures = [fault("a fault of ours")]

    def fail(*arguments: object) -> object:
        if failures:
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr(*where, fail)
    with start_device() as device, Frontend(device.connect()) as guest:
        guest.start()
        (worker,) = device.workers()
        fill(guest, FREE, PAGE)
        assert report(guest, offered(FREE, PAGE)) == 0
        assert is_filled(guest, FREE, PAGE)
        assert_inert(guest)
        assert guest.read_config() == Config()
        assert device.workers() == [worker]
        assert guest.stop()[REPORTING] == 2


def test_case_46_an_unexpected_error_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(ConfigTeller, "tell", fail)
    with start_device() as device, Frontend(device.connect()) as guest:
        guest.start()
        (worker,) = device.workers()
        guest.read_config()
        assert_inert(guest)
        assert device.workers() == [worker]
