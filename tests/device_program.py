"""The command vhost-user-balloon as a process, and looks at processes from outside. Not a test; used by many."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


# The command, with a keeper that waits for its workers as long as a test waits for anything.
_PATIENT = f"""
import sys
from hostdev import cli, post
post.ANSWER_SECONDS = post.END_SECONDS = {DEADLINE}
sys.exit(cli.main())
"""


@contextlib.contextmanager
def program(path: Path, *options: str, patient: bool = False) -> Iterator[Program]:
    """patient: take no worker for one that hangs. For who counts on its staying the same, on a machine that may hold it up."""
    start = ["-c", _PATIENT] if patient else ["-m", "hostdev.cli"]
    command = [sys.executable, *start, f"--socket-path={path}", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: listens(path) or process.poll() is not None, "listening")
            yield Program(process, path)
        finally:
            if process.poll() is None:
                process.kill()


def listens(path: Path) -> bool:
    """__SO_ACCEPTCON (1 << 16) in the kernel's table, without connecting: that would be a front end."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[7] == str(path):
            return bool(int(fields[3], 16) & 0x10000)
    return False


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
