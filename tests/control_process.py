"""A real control process with the test as its keeper, a worker that is not one, and a plain QMP client. Not a test."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hostdev import control, fds
from hostdev.child import Child
from hostdev.control import MAX_CLIENTS
from hostdev.driver import DEADLINE
from hostdev.errors import CommandError
from hostdev.listening import ListeningPath
from hostdev.wire.balloon import STATISTIC_NAMES
from hostdev.wire.control import ENVELOPE, MAX_ENVELOPE, Envelope, Kind
from tests.device_program import PATIENT, Program, children, descriptors, program, wait_for

# An answer of the right type for each command that a worker gets.
ANSWERS: dict[str, Any] = {
    "balloon": {},
    "query-balloon": {"actual": 1 << 30},
    "set-target": {},
    "qom-get": 2,
    "qom-set": {},
    "query-balloon-stats": {
        # What QEMU says of a figure that the guest did not give.
        "stats": dict.fromkeys(STATISTIC_NAMES, (1 << 64) - 1),
        "last-update": 0,
        "unknown": [{"tag": 99, "value": 1}],
    },
    "query-status": {"connected": True, "running": True, "features": ["reporting"], "worker": 7},
    "query-memory": [],
    "query-rings": [],
    "inhibit": {},
    "allow": {},
    "estimate-free": {"bytes": 1 << 20, "blocks": 1, "seconds": 0.5, "complete": True},
}

# The guest's name where a test has but one.
GUEST = "vm1"

# Bytes that may wait in a pair, of which the kernel makes twice as many: 212,992 are its own default, and a host may have
# another (net.core.wmem_default).
ROOM = 106_496


def exchange(channel: socket.socket, deadline: float = DEADLINE) -> Envelope:
    """Receive one envelope; its descriptors are closed."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    assert poll.poll(deadline * 1000), "nothing comes"
    received = fds.receive(channel, MAX_ENVELOPE)
    fds.close_all(received.fds)
    return ENVELOPE.decode(received.data)


def gets_on(client: QmpSocket) -> None:
    """It is served as if nothing had happened."""
    assert client.execute("query-version")["return"]["package"] == "vhost-user-balloon"


def say(channel: socket.socket, kind: Kind, number: int = 0, value: object = None) -> None:
    """Send one envelope with JSON in it, or with bytes as they are."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    channel.send(ENVELOPE.encode(Envelope(kind, number, text)))


class FakeWorker:
    """What the control process may expect of a worker: a RETURN or an ERROR for each COMMAND, when it pleases."""

    def __init__(self) -> None:
        self.channel, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
        self.answers: dict[str, Any] = dict(ANSWERS)
        self.commands: list[dict[str, Any]] = []

    def receive(self) -> tuple[int, dict[str, Any]]:
        """Take one COMMAND: its id and what it says."""
        envelope = exchange(self.channel)
        assert envelope.kind == Kind.COMMAND
        command = json.loads(envelope.text)
        assert command.keys() == {"execute", "arguments"}
        self.commands.append(command)
        return envelope.id, command

    def serve(self) -> None:
        """Answer one COMMAND."""
        number, command = self.receive()
        answer = self.answers[command["execute"]]
        if isinstance(answer, CommandError):
            say(self.channel, Kind.ERROR, number, {"class": answer.error_class, "desc": str(answer)})
        else:
            say(self.channel, Kind.RETURN, number, answer)

    def returns(self, number: int, value: object) -> None:
        """Answer a COMMAND that was received."""
        say(self.channel, Kind.RETURN, number, value)

    def is_asked(self) -> bool:
        """There is something to receive."""
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        return bool(poll.poll(0))

    def tell(self, event: str, data: Mapping[str, Any]) -> None:
        say(self.channel, Kind.EVENT, 0, {"event": event, "data": data})

    def close(self) -> None:
        self.channel.close()
        self.theirs.close()


class QmpSocket:
    """A client that waits for each answer. Events that come meanwhile are kept."""

    def __init__(self, path: Path, *, negotiate: bool = True) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(DEADLINE)
        self.connection.connect(str(path))
        self._data = b""
        self.events: list[dict[str, Any]] = []
        self.greeting = self.message()
        if negotiate:
            assert self.execute("qmp_capabilities") == {"return": {}}

    @property
    def has_message(self) -> bool:
        """True if one has been received and not been taken."""
        return b"\n" in self._data

    def message(self) -> dict[str, Any]:
        """Receive one message. Raises EOFError when the other side has closed."""
        while b"\n" not in self._data:
            piece = self.connection.recv(65536)
            if not piece:
                raise EOFError
            self._data += piece
        line, _newline, self._data = self._data.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def send(self, name: str, /, **arguments: object) -> None:
        """Ask, as QMPClient does: without a newline."""
        self.connection.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())

    def answer(self) -> dict[str, Any]:
        """Receive the answer to what was asked."""
        while "event" in (message := self.message()):
            self.events.append(message)
        return message

    def execute(self, name: str, /, **arguments: object) -> dict[str, Any]:
        """Ask and wait for the answer."""
        self.send(name, **arguments)
        return self.answer()

    def event(self) -> dict[str, Any]:
        """Receive the next event."""
        if self.events:
            return self.events.pop(0)
        message = self.message()
        assert "event" in message
        return message

    def is_closed(self) -> bool:
        """True once nothing more comes and the other side has closed."""
        try:
            return self.message() is None
        except (EOFError, ConnectionResetError):
            return True

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> QmpSocket:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class ControlProcess:
    """A control process; ``keeper`` is the keeper's end of its channel."""

    def __init__(self, path: Path, child: Child, keeper: socket.socket) -> None:
        self.path = path
        self.child = child
        self.pid = child.pid
        self.keeper = keeper

    def connect(self, *, negotiate: bool = True) -> QmpSocket:
        return QmpSocket(self.path, negotiate=negotiate)

    def connect_guest(self, worker: FakeWorker, name: str = GUEST) -> None:
        """Give it a worker's pair, as the keeper does for each front end, and for each successor of a worker."""
        with fds.Fd(worker.theirs.detach()) as theirs:
            fds.send(self.keeper, ENVELOPE.encode(Envelope(Kind.GUEST, 0, name.encode())), [theirs])

    def disconnect_guest(self, name: str = GUEST) -> None:
        """Nobody is connected at that place, or nobody any more."""
        say(self.keeper, Kind.GUEST, 0, name.encode())

    def remove_guest(self, name: str = GUEST) -> None:
        say(self.keeper, Kind.GONE, 0, name.encode())

    def announce(self, worker: FakeWorker, name: str = GUEST) -> None:
        """Give it a worker's pair; whoever connects from now on finds that worker, which answered itself."""
        self.connect_guest(worker, name)
        with self.connect() as client:
            wait_for(lambda: self._reaches(client, worker, name), "the worker")
            served = len(descriptors(self.pid))
        # Who counts descriptors is not to find this client's.
        wait_for(lambda: len(descriptors(self.pid)) < served, "this client's end")
        worker.commands.clear()

    @staticmethod
    def _reaches(client: QmpSocket, worker: FakeWorker, name: str) -> bool:
        """The keeper's word may be read after a client's."""
        client.send("query-status", guest=name)
        poll = select.poll()
        poll.register(worker.channel, select.POLLIN)
        poll.register(client.connection, select.POLLIN)
        ((number, _mask), *_others) = poll.poll(DEADLINE * 1000)
        if number == worker.channel.fileno():
            worker.serve()
        answer = client.answer()
        return bool(answer.get("return", {}).get("connected"))

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done meanwhile it finds all at once."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_for(lambda: state(self.pid) == "T", "standing still")
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


def state(pid: int) -> str:
    """R running, S asleep, T stopped, ... (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _start(channel: socket.socket, listener: socket.socket, generation: int) -> int:
    """Log to descriptor 2: pytest's own stderr is a file that isolate() closes, and whose number a client may get."""
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    logging.basicConfig(stream=sys.stderr, force=True)
    return control.start(channel, listener, generation)


@contextlib.contextmanager
def control_process(path: Path, generation: int = 0) -> Iterator[ControlProcess]:
    """Fork a control process that listens at path. At the end it sees its channel close, and must end well."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
    with ours, ListeningPath(str(path), "--control", MAX_CLIENTS) as listener:
        with theirs:
            child = Child("control process", functools.partial(_start, theirs, listener, generation))
        gc.unfreeze()
        try:
            yield ControlProcess(path, child, ours)
        except BaseException:
            child.kill()
            raise
        finally:
            ours.close()
            child.has_ended(DEADLINE)  # a machine may be slower than a keeper has time for
            ended_well = child.reap()
        assert ended_well


class Controlled:
    """A device with a control socket, in a folder that it makes for it."""

    def __init__(self, device: Program, control: Path) -> None:
        self.device = device
        self.path = control
        wait_for(lambda: bool(children(device.pid)), "the control process")
        # The first child of the keeper: it is there before any front end.
        (self.control_pid,) = children(device.pid)

    def client(self) -> QmpSocket:
        return QmpSocket(self.path)

    def others(self) -> list[int]:
        """The keeper's children but for the control process that was there first."""
        return [pid for pid in children(self.device.pid) if pid != self.control_pid]


@contextlib.contextmanager
def controlled(
    tmp_path: Path, *options: str, constants: Mapping[str, float] = PATIENT
) -> Iterator[Controlled]:
    """constants: as program() has them."""
    control = tmp_path / "private" / "balloon.qmp"
    path = tmp_path / "balloon.sock"
    with program(path, f"--control={control}", *options, constants=constants) as device:
        yield Controlled(device, control)
