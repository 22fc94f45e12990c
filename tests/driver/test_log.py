"""Whatever a guest does, as often as it likes, the log stays short, and says what it left out nothing of the first times."""

from __future__ import annotations

import fcntl
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostdev import control
from hostdev.driver import DEADLINE
from hostdev.frontend import Frontend
from hostdev.log_limit import BURST, PERIOD
from hostdev.wire.balloon import Role
from hostdev.wire.vhost_user import Request
from tests.control_process import control_process
from tests.device_program import listens, program, wait_for, works

RESETS = 60


def test_a_guest_that_resets_its_device_and_breaks_a_ring_again_and_again(tmp_path: Path) -> None:
    begun = time.monotonic()
    with program(tmp_path / "balloon.sock", "--once") as device:
        with Frontend(device.connect()) as guest:
            guest.start()
            for _ in range(RESETS):
                ring = guest.rings[Role.DEFLATE]
                ring.set_available_index(999)
                ring.notify()
                guest.request(Request.GET_FEATURES)
                bases = guest.stop()
                guest.resume(bases=bases)
            works(guest)
        said = device.wait()[1].splitlines()
    accepted = [line for line in said if "accepted" in line]
    broken = [line for line in said if "broken" in line]
    most = BURST + (time.monotonic() - begun) // PERIOD
    assert BURST <= len(accepted) <= most
    assert BURST <= len(broken) <= most
    assert len(said) < 6 * most


def test_the_control_process_writes_no_more_than_others(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whatever in it should write a line for each thing that a client does."""

    def run(_self: control.Control) -> None:
        for _ in range(3 * BURST):
            control.log.warning("a line of the control process")

    monkeypatch.setattr(control.Control, "run", run)
    with control_process(tmp_path / "socket"):
        pass
    assert capfd.readouterr().err.count("a line of the control process") == BURST


def test_a_log_that_nobody_reads_stops_nobody(tmp_path: Path) -> None:
    """A pipe that is full: keeper and worker go on, with --log-level=debug a line for each report."""
    path = tmp_path / "balloon.sock"
    command = [sys.executable, "-m", "hostdev.cli", f"--socket-path={path}", "--log-level=debug", "--once"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        fcntl.fcntl(process.stderr.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        wait_for(lambda: listens(path), "listening")
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        with Frontend(connection) as guest:
            guest.start()
            for _ in range(200):
                works(guest)
        assert process.wait(DEADLINE) == 0
        assert len(process.stderr.read()) <= 2 * 4096
