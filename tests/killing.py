"""Kills workers at their work, and knows who is one. Not a test; used by those of every tier."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from pathlib import Path

from tests.device_program import children, wait_for

# What every worker has mapped, and nobody else.
RECORD = "memfd:vhost-user-balloon-record"


def is_worker(pid: int) -> bool:
    return RECORD in _read(f"/proc/{pid}/maps")


def is_alive(pid: int) -> bool:
    """False for one that waits to be buried, too."""
    return _state(pid) not in ("", "Z", "X")


def is_idle(pid: int) -> bool:
    """True for a worker that waits for something to do."""
    return is_worker(pid) and waits(pid)


def waits(pid: int) -> bool:
    """True for one that waits in poll() or the like; a kernel that does not tell what for says 0."""
    waits_in = _read(f"/proc/{pid}/wchan")
    return ("poll" in waits_in or waits_in == "0") and _state(pid) == "S"


def _state(pid: int) -> str:
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].strip()[:1]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Killer:
    """Of the workers of one device, which serves one guest at the least. ``kills``: how many it has killed."""

    def __init__(self, keeper: int, seed: int = 1) -> None:
        """Wait until there is a worker; the device's other children are there by then."""
        self._keeper = keeper
        self._random = random.Random(seed)
        self.kills = 0
        wait_for(lambda: any(is_worker(pid) for pid in children(keeper)), "a worker")
        self._others = {pid for pid in children(keeper) if not is_worker(pid)}

    def workers(self) -> list[int]:
        """Process ids of the workers that live, those included that have only just begun."""
        return [pid for pid in children(self._keeper) if pid not in self._others and is_alive(pid)]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int | None:
        """Send the oldest worker a signal. Returns its process id, None if there is none at the moment."""
        for pid in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                self.kills += 1
                return pid
        return None

    def settle(self) -> None:
        """Wait for a worker that has taken over."""
        wait_for(lambda: any(is_idle(pid) for pid in self.workers()), "a worker that has taken over")

    def kill_settled(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Kill the worker once it has taken over, and so no more than the keeper allows. Returns its process id."""
        self.settle()
        pid = self.kill(number)
        assert pid is not None
        return pid

    async def go_on(self, pause: float) -> None:
        """Kill at random moments, pause seconds apart on average, until cancelled.

        Now and then the successor is killed as well, somewhere in its first 30 ms. Not a third one: what three die with
        is taken for their cause.
        """
        while True:
            await asyncio.sleep(self._random.uniform(0.4, 1.6) * pause)
            killed = self.kill()
            if killed is not None and self._random.random() < 0.2:
                await asyncio.sleep(self._random.uniform(0.0, 0.03))
                if killed not in self.workers():
                    self.kill()
