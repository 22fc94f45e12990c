"""The device as a process of its own beside QEMU: started, watched, its counters read, ended.

It gets its front end's connection as an inherited socket, so there is no path to choose or remove. It ends by itself
when QEMU closes the other end; close() makes sure. Used by rig.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from balloonlab import process
from balloonlab.errors import DeviceError
from hostdev.metrics import PREFIX
from hostdev.wire.balloon import Feature
from qmp_glue.errors import MonitorClosedError
from qmp_glue.monitor import DEVICE_SERVES, Monitor, open_monitor

# Seconds from QEMU's end to the device's: it finishes a slice and unmaps.
END_SECONDS = 5.0
# Seconds from the start of the device to its control socket, and to a greeting there: 0.15 s when idle.
START_SECONDS = 30.0
CONTROL_POLL_SECONDS = 0.01

# What Python is to run: the device that is installed. Tests run others, which do something wrong.
PROGRAM = ("-m", "hostdev.cli")

_SAMPLE = re.compile(rf"^{PREFIX}_(\w+?)(?:\{{(.*)\}})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Counters:
    """The device's counters at one moment, as its metrics file has them."""

    samples: tuple[tuple[str, tuple[tuple[str, str], ...], float], ...] = ()

    def total(self, family: str, **labels: str) -> int:
        """Sum the samples of a family that carry these labels."""
        wanted = set(labels.items())
        return int(sum(value for name, have, value in self.samples if name == family and wanted <= set(have)))

    @property
    def released_bytes(self) -> int:
        """Bytes given back, by any method and for any cause."""
        return self.total("released_bytes_total")

    @property
    def named_bytes(self) -> int:
        """Bytes that the guest named, whether they were given back or withheld."""
        return self.released_bytes + self.total("withheld_bytes_total")

    @property
    def reports(self) -> int:
        """Reports answered: chains on the reporting queue."""
        return self.total("chains_total", queue="reporting")

    @property
    def buffers(self) -> int:
        """Entries (page blocks) in those reports."""
        return self.total("buffers_total", queue="reporting")

    @property
    def features(self) -> Feature:
        """What the guest's driver accepted."""
        return Feature(self.total("negotiated_features"))


def parse_counters(text: str) -> Counters:
    """Read the Prometheus text that the device writes."""
    return Counters(
        tuple(
            (matched[1], tuple(_LABEL.findall(matched[2] or "")), float(matched[3]))
            for matched in _SAMPLE.finditer(text)
        )
    )


class DeviceProcess:
    """A running vhost-user-balloon with one front end."""

    def __init__(
        self,
        folder: Path,
        *,
        discard: str,
        features: str = "",
        trace: bool = False,
        control: bool = False,
        options: Sequence[str] = (),
        name: str = "device",
        program: Sequence[str] = PROGRAM,
    ) -> None:
        """folder: where its log, counters, trace and control socket go. discard, features: its options of that name.

        options: further ones, as they stand on its command line. program: what Python runs, with these options.
        """
        self._program = program
        self.control_path = folder / f"{name}.qmp"
        self.trace_file = folder / f"{name}.trace"
        self._metrics_file = folder / f".{name}.prom"
        self._log_file = folder / f"{name}.log"
        self._options = [
            f"--discard={discard}",
            f"--features={features}",
            f"--metrics-file={self._metrics_file}",
            *options,
        ]
        if trace:
            self._options.append(f"--trace={self.trace_file}")
        if control:
            self._options.append(f"--control={self.control_path}")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> socket.socket:
        """Start the device. Returns the end of the connection that QEMU is to inherit."""
        ours, theirs = socket.socketpair()
        with ours, self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self.argv(ours.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(ours.fileno(),),
                process_group=0,  # Ctrl-C is for us: the device must not end before QEMU
            )
        return theirs

    def argv(self, number: int) -> list[str]:
        """The command line, for a connection with this descriptor number."""
        return [sys.executable, *self._program, f"--fd={number}", *self._options]

    @property
    def pid(self) -> int:
        """The keeper's process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How the keeper ended; None while it runs or was never started."""
        return self._process.poll() if self._process is not None else None

    def pids(self) -> list[int]:
        """Process ids of the keeper and of its children at the moment: a worker that dies is replaced."""
        return [self.pid, *process.children(self.pid)]

    def cpu_seconds(self) -> float:
        """User and system time of keeper and workers, their start included, and workers that were replaced."""
        return process.family_seconds(self.pid)

    def proportional_bytes(self) -> int:
        """PSS of all its processes."""
        return sum(process.proportional_bytes(pid) for pid in self.pids())

    def counters(self) -> Counters:
        """Read the counters; they are at most half a second old."""
        try:
            return parse_counters(self._metrics_file.read_text())
        except FileNotFoundError:
            return Counters()

    @contextlib.asynccontextmanager
    async def control(self) -> AsyncIterator[Monitor]:
        """Talk to its control socket, as soon as that is there. Raises MonitorClosedError if it does not come."""
        end = time.monotonic() + START_SECONDS
        async with contextlib.AsyncExitStack() as stack:
            while True:
                try:
                    opening = open_monitor(self.control_path, seconds=START_SECONDS, fix=DEVICE_SERVES)
                    monitor = await stack.enter_async_context(opening)
                    break
                except MonitorClosedError:
                    if time.monotonic() > end or self.returncode is not None:
                        raise
                await asyncio.sleep(CONTROL_POLL_SECONDS)
            yield monitor

    def log_text(self) -> str:
        """Return what it wrote so far."""
        return self._log_file.read_text(errors="replace")

    def error(self) -> DeviceError:
        """Return the error that says how the device ended."""
        lines = self.log_text().splitlines()[-5:]
        said = "\n  ".join(lines) or "(it wrote nothing)"
        return DeviceError(
            f"the device ended with status {self.returncode}; put right what its last lines name:\n  {said}"
        )

    async def close(self) -> None:
        """Wait for the device's end, which QEMU's brings about; help it on if that takes too long."""
        if self._process is None:
            return
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, END_SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the device whatever it does. Its workers end with their channels to the keeper."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._metrics_file.unlink(missing_ok=True)
