"""Runs the guest's agent on this machine, over a socket pair in place of the virtio-serial port."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from guest_images import agent

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class RunningAgent:
    channel: socket.socket
    pid: int

    def children(self) -> list[int]:
        """Return the agent's child processes (proc(5): the parent is the second field after the name)."""
        stats = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                stats[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        return [pid for pid, fields in stats.items() if int(fields[1]) == self.pid]


@contextlib.contextmanager
def running_agent() -> Iterator[RunningAgent]:
    """Yield a running agent; kill and reap it afterwards."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            theirs.setblocking(False)
            agent.Agent(theirs.fileno()).loop()
        finally:
            os._exit(0)
    theirs.close()
    try:
        yield RunningAgent(ours, pid)
    finally:
        ours.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
