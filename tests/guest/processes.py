"""A program as a person starts it, watched from outside: its output, its descendants, its end.

Only what this test started is ever signalled, by process id; a process id is told from its next owner by its start time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# What another person's guests on the same two cores may make of 5 s.
DEADLINE_SECONDS = 120.0
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Process:
    """One process of the system, for as long as it lives."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        """False once it has ended; whether its parent has taken notice is not its business."""
        return _stat(self.pid)[:1] not in ([], ["Z"]) and _stat(self.pid)[19:20] == [self.started]

    @property
    def argv(self) -> list[str]:
        """Its command line; nothing once it has ended."""
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            return []


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on (proc(5)): 0 is the state, 1 the parent, 19 the start."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def family(pid: int) -> list[Process]:
    """Return a process and all its descendants, parents before children."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    stats = {each: stat for each in pids if (stat := _stat(each))}
    found = [pid]
    for each in found:
        found += [child for child, stat in stats.items() if int(stat[1]) == each]
    return [Process(each, stats[each][19]) for each in found if each in stats]


def wait_until(condition: Callable[[], object], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Poll until the condition holds. Raises TimeoutError, which says what was waited for."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(POLL_SECONDS)


class Program:
    """A running program; what it writes is kept. Its files are in ``folder``."""

    def __init__(self, popen: subprocess.Popen[bytes], errors: Path) -> None:
        self.popen = popen
        self._errors = errors
        self._output = b""
        if popen.stdout is not None:
            os.set_blocking(popen.stdout.fileno(), False)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def output(self) -> str:
        """Return what came through the pipe so far."""
        if self.popen.stdout is not None:
            self._output += _available(self.popen.stdout)
        return self._output.decode()

    def errors(self) -> str:
        """Return what it wrote on standard error so far."""
        return self._errors.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait for a text in its output."""
        wait_until(lambda: text in self.output() or self.popen.poll() is not None, f"{text!r} in the output")
        assert text in self.output(), f"it ended with {self.popen.returncode}: {self.errors()}"

    def wait(self, seconds: float = DEADLINE_SECONDS) -> int:
        """Wait for its end and return its status as a shell has it."""
        status = self.popen.wait(seconds)
        return 128 - status if status < 0 else status

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program alone, as kill does."""
        os.kill(self.pid, number)

    def interrupt(self) -> None:
        """Send SIGINT to its process group, as a terminal does on Ctrl-C."""
        os.killpg(self.pid, signal.SIGINT)


def _available(pipe: IO[bytes]) -> bytes:
    chunks = b""
    while chunk := pipe.read():
        chunks += chunk
    return chunks


@contextmanager
def started(
    argv: Sequence[str],
    folder: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int = subprocess.DEVNULL,
) -> Iterator[Program]:
    """Run a program in a session of its own; whatever happens, it and its descendants have ended afterwards."""
    errors = folder / f"stderr-{len(list(folder.iterdir()))}"
    with errors.open("wb") as stderr:
        popen = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=os.environ | dict(env or {}),
            cwd=cwd,
            start_new_session=True,
            bufsize=0,
        )
    try:
        yield Program(popen, errors)
    finally:
        end_family(popen)
        for pipe in (popen.stdin, popen.stdout):
            if pipe is not None:
                pipe.close()


def end(processes: Sequence[Process]) -> None:
    """Kill those that still live."""
    for process in processes:
        if process.alive:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def end_family(popen: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a program that a test started."""
    if popen.poll() is None:
        end(family(popen.pid))
    popen.wait(DEADLINE_SECONDS)
