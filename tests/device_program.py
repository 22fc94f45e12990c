"""The command vhost-user-balloon as a process, and looks at processes from outside. Not a test; used by many."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hostdev.driver import DEADLINE, Buffer
from hostdev.fds import Fd
from hostdev.frontend import Frontend
from hostdev.wire.balloon import Role
from tests.in_process import PAGE


def descriptors(pid: int) -> dict[int, str]:
    """Open descriptors of a process and what each of them is."""
    folder = Path(f"/proc/{pid}/fd")
    found = {}
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            found[int(entry.name)] = str(entry.readlink())
    return found


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Poll a condition that no descriptor announces."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {DEADLINE} s"
        time.sleep(0.005)


def wait_ended(pidfd: Fd) -> None:
    poll = select.poll()
    poll.register(pidfd.fileno(), select.POLLIN)
    assert poll.poll(DEADLINE * 1000), "the process does not end"


class Program:
    """The command vhost-user-balloon, listening at a path."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process = process
        self.pid = process.pid
        self._path = path

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._path))
        return connection

    def worker(self) -> int:
        (pid,) = children(self.pid)
        return pid

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """End it by a signal; its exit status and what it said."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        _out, said = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, said


# Of a device none of whose processes is to hang: on a loaded machine it may not be one's turn for seconds.
PATIENT = dict.fromkeys(
    (
        "hostdev.post.ANSWER_SECONDS",
        "hostdev.post.END_SECONDS",
        "hostdev.worker.TURN_SECONDS",
        "hostdev.control_link.END_DEADLINE",
        "hostdev.control_link.SILENCE_SECONDS",
        "hostdev.handover.START_SECONDS",
        "hostdev.handover.SERVE_SECONDS",
        "hostdev.takeover.READY_SECONDS",
        "hostdev.takeover._SEND_SECONDS",
    ),
    DEADLINE,
)

# The command with other constants, which are the first argument.
_CHANGED = """
import importlib, json, sys
from hostdev import cli
for place, value in json.loads(sys.argv.pop(1)).items():
    module, _, name = place.rpartition(".")
    assert hasattr(importlib.import_module(module), name), place
    setattr(importlib.import_module(module), name, value)
sys.exit(cli.main())
"""


def changed(constants: Mapping[str, float]) -> list[str]:
    """What the interpreter is to be started with for that: the plain command if there are none."""
    return ["-c", _CHANGED, json.dumps(constants)] if constants else ["-m", "hostdev.cli"]


@contextlib.contextmanager
def program(path: Path, *options: str, constants: Mapping[str, float] = PATIENT) -> Iterator[Program]:
    """constants: what is to be otherwise than the device has it, by module and name; {} where a process is to hang."""
    command = [sys.executable, *changed(constants), f"--socket-path={path}", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: process.poll() is not None or watches(process.pid, path), "serving")
            yield Program(process, path)
        finally:
            if process.poll() is None:
                process.kill()


def listens(path: Path) -> bool:
    """Without connecting: that would be a front end."""
    return _listener(path) is not None


def _listener(path: Path) -> str | None:
    """What a descriptor of the socket that listens at path is. Those of who has connected there have the same path."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        # __SO_ACCEPTCON (1 << 16) in the kernel's table.
        if len(fields) == 8 and fields[7] == str(path) and int(fields[3], 16) & 0x10000:
            return f"socket:[{fields[6]}]"
    return None


def watches(pid: int, path: Path) -> bool:
    """True while a keeper waits for who connects at path, so that all it begins with is there: it listens before that."""
    listener, opened = _listener(path), descriptors(pid)
    waiting = [number for number, what in opened.items() if what == "anon_inode:[eventpoll]"]
    return listener is not None and any(
        opened.get(watched) == listener for number in waiting for watched in _watched(pid, number)
    )


def _watched(pid: int, number: int) -> list[int]:
    """The descriptors that an epoll waits for (proc(5), fdinfo)."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
        lines = Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines()
        return [int(line.split()[1]) for line in lines if line.startswith("tfd:")]
    return []


def works(guest: Frontend) -> None:
    """A report goes through."""
    ring = guest.rings[Role.REPORTING]
    guest.memory.write(0x800000, b"\xaa" * PAGE)
    ring.wait_used(ring.offer([Buffer(0x800000, PAGE, writable=True)]))
    assert guest.memory.read(0x800000, PAGE) == bytes(PAGE)


def serves(connection: socket.socket) -> None:
    with Frontend(connection) as guest:
        guest.start()
        works(guest)
