"""A device whose worker is killed at a chosen line of its code, and what there is to be seen afterwards. Not a test.

Each worker counts the lines of hostdev that it executes from the moment when the test has armed it, and
kills itself with SIGKILL before the chosen one, once. Between two lines there is at most one system call, so that each gap around
a send, a receive, a release and a store is met. The device has no hooks for it: sys.settrace does it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import hostdev
from hostdev import births, commands, estimates, fds, hinting, snapshot, worker
from hostdev.control_socket import ControlSocket
from hostdev.driver import DEADLINE, FrontendError
from hostdev.estate import Estate
from hostdev.frontend import DeviceProcess, Frontend, forget_files
from hostdev.journal import recall
from hostdev.keeper import Keeper
from hostdev.metrics import Sample
from hostdev.options import Options, Start
from hostdev.record import Record
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, HEADER, HEADER_SIZE
from tests.control_process import QmpSocket
from tests.device_program import listens, wait_for

HERE = str(Path(hostdev.__file__).parent)
# A kill that is never come to: to count lines.
NEVER = 1 << 40
# Words of the memory that the test shares with the workers.
_ARMED, _LINES, _LAST, _KILLS, _WHERE = range(5)
# Lines whose places are remembered: the longest scenario has 40,000.
MAX_LINES = 1 << 17


class Doom:
    """When a worker is to die, in memory that all of them share."""

    def __init__(self) -> None:
        memory = memoryview(mmap.mmap(-1, 8 * (_WHERE + MAX_LINES)))
        self._words = memory.cast("Q")

    def arm(self, line: int) -> None:
        """Have a worker die before it executes this line, 1 and up."""
        self._words[_LINES], self._words[_LAST] = 0, line
        self._words[_ARMED] = 1

    def disarm(self) -> list[int]:
        """Let them live. Returns which lines were executed, in their order: a number for each place in the code."""
        self._words[_ARMED] = 0
        return list(self._words[_WHERE : _WHERE + min(self._words[_LINES], MAX_LINES)])

    @property
    def kills(self) -> int:
        """How many have died."""
        return self._words[_KILLS]

    def start(
        self,
        channel: socket.socket,
        options: Options,
        control: socket.socket | None,
        estate: Estate,
        beginning: Start,
    ) -> int:
        """In place of worker.start: the same, watched."""
        sys.settrace(self._enter)
        return _START(channel, options, control, estate, beginning)

    def _enter(self, frame: FrameType, event: str, _argument: object) -> Any:  # noqa: ANN401
        return self._step if frame.f_code.co_filename.startswith(HERE) else None

    def _step(self, frame: FrameType, event: str, _argument: object) -> Any:  # noqa: ANN401
        words = self._words
        if event == "line" and words[_ARMED]:
            if words[_LINES] < MAX_LINES:
                words[_WHERE + words[_LINES]] = (
                    hash(frame.f_code.co_filename) % (1 << 40) << 16 | frame.f_lineno
                )
            words[_LINES] += 1
            if words[_LINES] == words[_LAST]:
                words[_ARMED] = 0
                words[_KILLS] += 1
                # By tgkill, which a confined process has for abort().
                signal.raise_signal(signal.SIGKILL)
        return self._step


_START = worker.start


class Seen:
    """What a record says, and so what a successor would go on with."""

    def __init__(self, record: Record, used: dict[int, int]) -> None:
        image = snapshot.parse(record.state)
        self.image = image
        counts = recall(record, image.session.number, used)
        self.counters: dict[Sample, int] = dict(zip(image.samples, counts, strict=False))


class Mortal:
    """A keeper in a process of its own, its front end, a client of its control socket, and the doom of its workers."""

    def __init__(self, device: DeviceProcess, doom: Doom, control: Path) -> None:
        self.device = device
        self.doom = doom
        self.guest = Frontend(device.connect())
        wait_for(lambda: listens(control), "the control socket")
        self.client = QmpSocket(control)

    def seen(self) -> Seen:
        """Read the record through the keeper's descriptor of it."""
        for entry in Path(f"/proc/{self.device.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if "balloon-record" in str(entry.readlink()):
                    return self._read(entry)
        raise AssertionError("the keeper has no record")

    def _read(self, path: Path) -> Seen:
        with fds.Fd(os.open(path, os.O_RDWR)) as fd:
            record = Record(fd)
        try:
            return Seen(record, {ring.index: ring.used_index for ring in self.guest.rings})
        finally:
            record.close()

    def worker(self) -> int:
        """Process id of the worker. The control process is the keeper's first child."""
        return self.device.workers()[1]

    def ask(self, name: str, /, **arguments: object) -> tuple[dict[str, Any], list[int]]:
        """Execute a command and take meanwhile what the device has to tell, as a front end does. Returns answer and requests."""
        self.client.send(name, **arguments)
        requests = []
        poll = select.poll()
        for sock in (self.client.connection, self.guest.backend_channel):
            poll.register(sock, select.POLLIN)
        while True:
            ready = dict(poll.poll(0 if self.client.has_message else DEADLINE * 1000))
            if self.guest.backend_channel.fileno() in ready:
                requests += self.told()
            elif self.client.has_message or self.client.connection.fileno() in ready:
                message = self.client.message()
                if "event" not in message:
                    return message, requests
            else:
                raise FrontendError("no answer")

    def told(self) -> list[int]:
        """Take what has come on the back end's channel, up to the end of a message. Returns the requests."""
        stream, requests = b"", []
        channel = self.guest.backend_channel
        channel.settimeout(DEADLINE)
        while stream or _is_readable(channel):
            stream += channel.recv(1 << 16)
            while len(stream) >= HEADER_SIZE:
                header = HEADER.decode(stream[:HEADER_SIZE])
                assert not header.flags & FLAG_NEED_REPLY
                assert header.size <= 1
                if len(stream) < HEADER_SIZE + header.size:
                    break
                requests.append(header.request)
                stream = stream[HEADER_SIZE + header.size :]
        return requests

    def close(self) -> None:
        self.client.close()
        self.guest.close()


def _is_readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


@contextlib.contextmanager
def mortal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: Options | None = None
) -> Iterator[Mortal]:
    """Start a device whose workers can be doomed. Nothing of it is left at the end."""
    doom = Doom()
    monkeypatch.setattr(worker, "start", doom.start)
    # Who dies at every step of the way is not to wait its turn.
    monkeypatch.setattr(births, "STARTS_SECONDS", 0.0)
    monkeypatch.setattr(estimates, "PAUSE_SECONDS", 0.01)
    # And the guest that is asked is the test, which may be late.
    monkeypatch.setattr(hinting, "ROUND_SECONDS", DEADLINE)
    monkeypatch.setattr(commands, "STATISTICS_SECONDS", DEADLINE)
    ours, theirs = socket.socketpair()
    control = tmp_path / "control"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            ours.close()
            os.dup2(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            forget_files()
            with ControlSocket(str(control)) as listening:
                listening.open()
                keeper = Keeper(
                    lambda _name: options or Options(), once=True, control=listening, term_seconds=0
                )
                status = keeper.run(theirs)
        finally:
            os._exit(status)
    theirs.close()
    device = DeviceProcess(pid, ours)
    mortal: Mortal | None = None
    try:
        mortal = Mortal(device, doom, control)
        yield mortal
    finally:
        doom.disarm()
        if mortal is not None:
            mortal.close()
        try:
            device.wait(DEADLINE)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            device.wait()
            raise
        assert device.status == 0, (tmp_path / "log").read_text()
        (tmp_path / "log").unlink()
