"""Keeper and worker as processes: one front end after another, hostile streams, and every way to end.

Each test leaves no child, no descriptor and no socket file behind; a fixture sees to that.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostdev.driver import DEADLINE, Buffer, FrontendError, GuestMemory
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS, EXIT_USAGE
from hostdev.fds import Fd
from hostdev.frontend import DeviceProcess, Frontend, start_device
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import Role
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, Request
from tests.device_program import children, descriptors, program, serves, wait_ended, works
from tests.in_process import MIB, PAGE

GET_FEATURES = wire.message(Request.GET_FEATURES, 0, b"")
SET_OWNER = wire.message(Request.SET_OWNER, 0, b"")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()  # what other tests have left to it goes now, and not in between
    before = set(children(os.getpid())), len(descriptors(os.getpid()))
    yield
    assert (set(children(os.getpid())), len(descriptors(os.getpid()))) == before


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "balloon.sock"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def device(patience: None) -> Iterator[DeviceProcess]:
    with start_device() as device:
        yield device


# One front end after another


def test_the_next_front_end_is_served(path: Path) -> None:
    with program(path) as device:
        for _ in range(5):
            serves(device.connect())
        status, said = device.end()
    assert (status, "Traceback" in said) == (EXIT_PASS, False)


def test_a_front_end_that_comes_before_its_predecessor_is_seen_to_go(path: Path) -> None:
    """The keeper finds both in one look: it is a VM that was started again at once, not a second one."""
    with program(path) as device:
        first = Frontend(device.connect())
        first.start()
        os.kill(device.pid, signal.SIGSTOP)
        first.send_raw(GET_FEATURES * 10)
        first.close()
        second = device.connect()
        os.kill(device.pid, signal.SIGCONT)
        serves(second)
        assert device.end()[0] == EXIT_PASS


def test_once(path: Path) -> None:
    with program(path, "--once") as device:
        serves(device.connect())
        status, said = device.wait()
    assert (status, "Traceback" in said) == (EXIT_PASS, False)


def test_a_second_front_end_is_turned_away(path: Path) -> None:
    with program(path) as device:
        with Frontend(device.connect()) as guest:
            guest.start()
            with device.connect() as second:
                second.settimeout(DEADLINE)
                assert second.recv(1) == b""
            works(guest)
        serves(device.connect())
        assert device.end()[0] == EXIT_PASS


def test_a_second_program_on_the_path_leaves_the_first_alone(path: Path) -> None:
    """With --once, taking it for the front end would end the first."""
    with program(path, "--once") as device:
        with program(path) as second:
            status, said = second.wait()
            assert (status, len(said.splitlines())) == (EXIT_USAGE, 1)
        serves(device.connect())
        assert device.wait()[0] == EXIT_PASS


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with program(path, "--once") as device:
        serves(device.connect())
        assert device.wait()[0] == EXIT_PASS


@pytest.mark.parametrize("option", ["--fd", "--socket-fd"])
def test_a_connected_descriptor(option: str) -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "hostdev.cli", f"{option}={theirs.fileno()}"]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL) as process:
        theirs.close()
        serves(ours)
        assert process.wait(DEADLINE) == EXIT_PASS


def test_a_listening_descriptor(tmp_path: Path) -> None:
    """Inherited, so not ours to remove."""
    path = tmp_path / "inherited.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        command = [sys.executable, "-m", "hostdev.cli", f"--fd={listener.fileno()}"]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
    with process:
        for _ in range(2):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(path))
            serves(connection)
        process.terminate()
        assert process.wait(DEADLINE) == EXIT_PASS
    assert path.is_socket()


# What a worker has


def test_a_worker_has_its_own_descriptors_alone(path: Path) -> None:
    with program(path) as device, Frontend(device.connect()) as guest:
        guest.negotiate()
        guest.request(Request.GET_FEATURES)
        own = {number: what for number, what in descriptors(device.worker()).items() if number > 2}
        kinds = sorted(what.split(":")[0] + what.split(":")[1][:10] for what in own.values())
        # The keeper's channel, the front end's back channel and what waits for it, one call eventfd a ring.
        assert sum(what.startswith("socket:") for what in own.values()) == 2, kinds
        assert sum("eventfd" in what for what in own.values()) == 5, kinds
        assert sum("eventpoll" in what for what in own.values()) == 1, kinds
        assert sum("balloon-record" in what for what in own.values()) == 1, kinds
        assert len(own) == 9, kinds
        guest.resume(first=True)
        own = {number: what for number, what in descriptors(device.worker()).items() if number > 2}
        assert sum("guest-ram" in what for what in own.values()) == 2  # the region's, and its mapping's
        assert sum("eventfd" in what for what in own.values()) == 10
        assert sum("balloon-record" in what for what in own.values()) == 1
        assert len(own) == 16
        assert (
            "guest-ram" not in Path(f"/proc/{device.pid}/maps").read_text()
        )  # held for a successor, never looked at
        guest.connection.close()
        device.end()


def test_a_worker_keeps_nothing_open_of_what_it_refuses(device: DeviceProcess) -> None:
    with Frontend(device.connect()) as guest, Fd(os.memfd_create("refused")) as refused:
        guest.start()
        (worker,) = device.workers()
        before = len(descriptors(worker)), len(descriptors(device.pid))
        for turn in range(1000):
            count = (1, 2, 9, 16)[turn % 4]
            guest.send_raw(wire.message(Request.GET_QUEUE_NUM, FLAG_NEED_REPLY, b""), [refused] * count)
            guest.receive()
        for _ in range(300):
            guest.request(Request.SET_VRING_CALL, wire.U64(0), [guest.rings[0].call], need_reply=True)
            guest.request(Request.SET_VRING_KICK, wire.U64(0), [refused], need_reply=True)
            guest.request(Request.SET_VRING_CALL, wire.U64(77), [guest.rings[0].call], need_reply=True)
        assert (len(descriptors(worker)), len(descriptors(device.pid))) == before


# Streams


def test_a_message_byte_by_byte(device: DeviceProcess) -> None:
    with Frontend(device.connect()) as guest:
        guest.negotiate()
        config = wire.CONFIG_ACCESS.encode(wire.ConfigAccess(0, 16, 0, bytes(16)))
        for byte in wire.message(Request.GET_CONFIG, 0, config):
            guest.send_raw(bytes([byte]))
        assert guest.receive()[1] == config
        for byte in GET_FEATURES * 3:
            guest.send_raw(bytes([byte]))
        assert len({guest.receive() for _ in range(3)}) == 1


def test_a_descriptor_may_come_with_any_byte(device: DeviceProcess) -> None:
    with Frontend(device.connect()) as guest:
        guest.negotiate()
        message = wire.message(Request.SET_VRING_CALL, FLAG_NEED_REPLY, wire.U64_PAYLOAD.encode(wire.U64(0)))
        for at in (1, 12, 15):
            guest.send_raw(message[:at])
            guest.send_raw(message[at:], [guest.rings[0].call])
            assert guest.receive()[1] == bytes(8)


def assert_closed(connection: socket.socket) -> None:
    connection.settimeout(DEADLINE)
    assert connection.recv(1) == b""


@pytest.mark.parametrize(
    "stream",
    [
        wire.HEADER.encode(wire.Header(1, 0, 0)),
        wire.HEADER.encode(wire.Header(1, 2, 0)),
        wire.HEADER.encode(wire.Header(1, 1 | wire.FLAG_REPLY, 0)),
        wire.HEADER.encode(wire.Header(1, 1 | 1 << 20, 0)),
        wire.HEADER.encode(wire.Header(1, 1, wire.MAX_PAYLOAD + 1)),
        wire.HEADER.encode(wire.Header(1, 1, 2**32 - 1)),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 4096,
    ],
    ids=["version 0", "version 2", "reply", "reserved flag", "4097 bytes", "4 GiB", "HTTP", "ones"],
)
def test_broken_streams_are_closed(path: Path, stream: bytes) -> None:
    """At once, without waiting for a payload that may never come; the next front end is served."""
    with program(path) as device:
        with device.connect() as connection:
            connection.sendall(stream)
            with contextlib.suppress(ConnectionResetError):  # what it did not read of ours
                assert_closed(connection)
        serves(device.connect())
        status, said = device.end()
    assert (status, "Traceback" in said) == (EXIT_PASS, False)
    assert "closing the connection: " in said


def test_descriptors_without_end_are_closed(path: Path) -> None:
    """One message, a byte and 16 descriptors at a time: bounded, or the keeper would run out of them."""
    with program(path) as device:
        with Frontend(device.connect()) as guest, Fd(os.memfd_create("many")) as many:
            with contextlib.suppress(ConnectionError):
                # No more than its header: a user who is not root may have 1024 descriptors under way (unix(7)).
                for byte in wire.message(Request.SET_OWNER, 0, bytes(100))[: wire.HEADER_SIZE]:
                    guest.send_raw(bytes([byte]), [many] * 16)
            with pytest.raises((FrontendError, ConnectionResetError)):
                guest.receive()
        serves(device.connect())
        status, said = device.end()
    assert (status, "Traceback" in said) == (EXIT_PASS, False)
    assert "descriptors with one message" in said


@pytest.mark.parametrize("cut", [1, 11, 12, 13])
def test_a_front_end_that_goes_in_the_middle_of_a_message(path: Path, cut: int) -> None:
    message = wire.message(Request.SET_FEATURES, 0, bytes(8))
    with program(path) as device:
        with device.connect() as connection:
            connection.sendall(message[:cut])
        serves(device.connect())
        status, said = device.end()
    assert (status, "Traceback" in said) == (EXIT_PASS, False)


def test_a_front_end_that_never_reads(device: DeviceProcess) -> None:
    """It is not read from either: what it can make us keep is one answer, and none is lost."""
    connection = device.connect()
    sent = 0
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    with Frontend(connection) as guest:
        before = _resident(device.pid)
        while poll.poll(500) and sent < 64 * MIB:
            with contextlib.suppress(BlockingIOError):
                sent += connection.send(GET_FEATURES * 100, socket.MSG_DONTWAIT)
        # Less than is there in the two sockets' buffers, with what the kernel adds to each message.
        assert sent < 2 * connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert _resident(device.pid) - before < 4 * MIB
        whole, rest = divmod(sent, len(GET_FEATURES))
        answers = {guest.receive() for _ in range(whole)}
        assert len(answers) == 1
        connection.settimeout(DEADLINE)
        connection.sendall(GET_FEATURES[rest:] if rest else GET_FEATURES)
        assert guest.receive() in answers


def _resident(pid: int) -> int:
    """Bytes of a process's own pages."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


# Ways to end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("phase", ["waiting", "connected", "in a message", "started", "in a report"])
def test_signals_leave_nothing(path: Path, number: signal.Signals, phase: str) -> None:
    with program(path, "--on-term=now") as device, contextlib.ExitStack() as stack:
        worker = None
        if phase != "waiting":
            memory = GuestMemory((512 if phase == "in a report" else 64) * MIB)
            guest = stack.enter_context(Frontend(device.connect(), memory=memory))
            guest.negotiate()
            worker = stack.enter_context(Fd(os.pidfd_open(device.worker())))
        if phase == "in a message":
            guest.send_raw(GET_FEATURES[:7])
        if phase in ("started", "in a report"):
            guest.resume(first=True)
        if phase == "in a report":
            os.posix_fallocate(memory.fd.fileno(), 64 * MIB, 256 * MIB)
            guest.rings[Role.REPORTING].offer([Buffer(64 * MIB, 256 * MIB, writable=True)])
        status, said = device.end(number)
        assert (status, "Traceback" in said) == (EXIT_PASS, False)
        if worker is not None:
            wait_ended(worker)


def test_signals_without_end_leave_nothing(path: Path) -> None:
    """An impatient user: the socket file is removed all the same."""
    with program(path) as device, Frontend(device.connect()) as guest:
        guest.start()
        with contextlib.suppress(ProcessLookupError):
            for _ in range(200):
                device.process.send_signal(signal.SIGINT)
        status, said = device.end(signal.SIGTERM)
    assert (status, "Traceback" in said) == (EXIT_PASS, False)


def test_a_dead_keeper_takes_its_worker_along(device: DeviceProcess) -> None:
    with Frontend(device.connect()) as guest:
        guest.start()
        with Fd(os.pidfd_open(device.workers()[0])) as worker:
            os.kill(device.pid, signal.SIGKILL)
            wait_ended(worker)
        assert device.wait() == -signal.SIGKILL
        with pytest.raises((FrontendError, ConnectionResetError)):
            guest.receive()


@pytest.mark.parametrize("message_pending", [False, True])
def test_a_dead_worker_is_replaced(path: Path, message_pending: bool) -> None:
    """The front end notices nothing, is served on, and the next one as well."""
    with program(path) as device:
        with Frontend(device.connect()) as guest:
            guest.start()
            worker = device.worker()
            if message_pending:
                os.kill(worker, signal.SIGSTOP)
                guest.send_raw(GET_FEATURES)
            os.kill(worker, signal.SIGKILL)
            if message_pending:
                assert guest.receive()[0].request == Request.GET_FEATURES
            works(guest)
            assert device.worker() != worker
        serves(device.connect())
        status, said = device.end()
    assert (status, "Traceback" in said) == (EXIT_PASS, False)
    assert "the worker ended with signal SIGKILL" in said


def test_a_worker_that_hangs_is_killed(path: Path) -> None:
    with program(path, "--once", constants={}) as device, Frontend(device.connect()) as guest:
        guest.start()
        with Fd(os.pidfd_open(device.worker())) as worker:
            os.kill(device.worker(), signal.SIGSTOP)
            guest.connection.close()
            wait_ended(worker)
        status, said = device.wait()
    assert status == EXIT_CHECK_FAILED
    assert "hangs: killing" in said


def test_a_stopped_worker_goes_on(device: DeviceProcess) -> None:
    with Frontend(device.connect()) as guest:
        guest.start()
        (worker,) = device.workers()
        os.kill(worker, signal.SIGSTOP)
        head = guest.rings[Role.REPORTING].offer([Buffer(0x800000, PAGE, writable=True)])
        guest.send_raw(GET_FEATURES)
        os.kill(worker, signal.SIGCONT)
        assert guest.receive()[0].request == Request.GET_FEATURES
        assert guest.rings[Role.REPORTING].wait_used(head) == 0


def test_ctrl_c_reaches_the_worker_too_and_ends_cleanly(path: Path) -> None:
    """The terminal signals the whole process group."""
    with program(path, "--on-term=now") as device, Frontend(device.connect()) as guest:
        guest.start()
        os.kill(device.worker(), signal.SIGINT)
        works(guest)
        status, said = device.end(signal.SIGINT)
    assert (status, "Traceback" in said) == (EXIT_PASS, False)
