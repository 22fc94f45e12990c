"""A vhost-user-balloon that listens at a path, as a process of its own, for tests of what connects to it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostdev.driver import DEADLINE
from tests.device_program import listens, wait_for


@dataclass(frozen=True)
class Device:
    """A running device, and what it wrote so far."""

    path: Path
    log: Path

    def said(self, words: str) -> int:
        """How often its log has these words."""
        return self.log.read_text().count(words)

    def connections(self) -> int:
        """How many front ends have come."""
        return self.said("front end connected")

    def wait_said(self, words: str, times: int) -> None:
        """Wait until the log has these words so often."""
        wait_for(lambda: self.said(words) >= times, f"{words} x {times}")

    def wait_served(self, times: int) -> None:
        """Wait until that many front ends have come and gone."""
        self.wait_said("front end has gone", times)


@contextlib.contextmanager
def device_on_path(folder: Path) -> Iterator[Device]:
    """Start a device; afterwards it must end in order and leave no socket."""
    path, log = folder / "device.sock", folder / "device.log"
    command = [sys.executable, "-m", "hostdev.cli", f"--socket-path={path}"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for(lambda: process.poll() is not None or listens(path), "listening")
        assert process.poll() is None, log.read_text()
        yield Device(path, log)
    finally:
        process.terminate()
        status = process.wait(DEADLINE)
        print(log.read_text())
        assert status == 0
        assert not path.exists()
