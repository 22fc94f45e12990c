"""The device at a socket of its own, beside no QEMU: for a suite that brings its own front end.

device.py is the one beside a QEMU of ours. The fixture balloon_device hands this out.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from balloonlab.device import END_SECONDS, START_SECONDS, Counters, parse_counters
from balloonlab.errors import DeviceError
from balloonlab.measure.scenario import DeviceSpec
from balloonlab.testing.logs import HasLogs
from hostdev.listening import MAX_SOCKET_PATH
from qmp_glue.parent import die_with_parent
from qmp_glue.scratch import scratch_directory

POLL_SECONDS = 0.005
_SOCKET = "balloon.sock"
# __SO_ACCEPTCON (linux/net.h): of the flags in /proc/net/unix, the fourth of eight fields; the path is the last.
_LISTENS = 0x10000
_FLAGS, _PATH, _FIELDS = 3, 7, 8


class BalloonDevice(HasLogs):
    """A running vhost-user-balloon. start() first, close() last; end a QEMU before that, which does not survive it."""

    def __init__(self, spec: DeviceSpec, folder: Path) -> None:
        """folder: where its log and counters go, and its sockets where their paths have room."""
        self.folder = folder
        self._stack = contextlib.ExitStack()
        sockets = folder
        if len(os.fsencode(folder / _SOCKET)) > MAX_SOCKET_PATH:
            # What a killed run has left of such a folder is removed by the next one that needs one.
            sockets = self._stack.enter_context(scratch_directory(Path(tempfile.gettempdir()), "balloon"))
        self.socket_path = sockets / _SOCKET
        self.control_path = sockets / "control"
        self._metrics_file = folder / "balloon.prom"
        self._log_file = folder / "device.log"
        self._argv = [
            *(sys.executable, "-m", "hostdev.cli"),
            f"--socket-path={self.socket_path}",
            f"--control={self.control_path}",
            f"--metrics-file={self._metrics_file}",
            f"--discard={spec.discard}",
            f"--features={spec.features}",
            "--on-term=now",
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens. Raises DeviceError."""
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509
                process_group=0,  # Ctrl-C is for us: it ends with the test
            )
        end = time.monotonic() + START_SECONDS
        while not _listens(self.socket_path):
            if self.returncode is not None or time.monotonic() > end:
                raise self._error()
            time.sleep(POLL_SECONDS)

    @property
    def pid(self) -> int:
        """The keeper's process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.poll() if self._process is not None else None

    def _error(self) -> DeviceError:
        how = "does not listen" if self.returncode is None else f"ended with status {self.returncode}"
        said = "\n  ".join(self.log_text().splitlines()[-5:]) or "(it wrote nothing)"
        return DeviceError(f"the device {how}; put right what its last lines name:\n  {said}")

    def counters(self) -> Counters:
        """Return its counters, half a second old at most; all are 0 before the first front end."""
        try:
            return parse_counters(self._metrics_file.read_text())
        except FileNotFoundError:
            return Counters()

    def log_text(self) -> str:
        """Return what it wrote so far."""
        return self._log_file.read_text(errors="replace")

    def close(self) -> None:
        """End it, in order if it does so within END_SECONDS."""
        with self._stack:
            if self._process is not None:
                _end(self._process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


def _listens(path: Path) -> bool:
    """Whether somebody listens at a path, without connecting, which only one front end at a time may."""
    # A path may have spaces itself: only the fields before it are split off.
    rows = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]
    lines = (line.split(maxsplit=_FIELDS - 1) for line in rows)
    flags = [line[_FLAGS] for line in lines if len(line) == _FIELDS and line[_PATH] == str(path)]
    return any(int(flag, 16) & _LISTENS for flag in flags)
