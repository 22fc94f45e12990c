"""Fleets on the device's real processes: page checks, the memory limit, sabotage, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from balloonlab import cli
from balloonlab.errors import DeviceError
from balloonlab.fleet import FleetPlan, FleetRun, run_fleet
from balloonlab.fleet_results import FleetResult, result_of
from guest_images.free_lists import PAGE_SIZE
from guest_images.page_reporting import Parameters
from hostdev.discard import Discarder
from hostdev.driver import DriverRing
from hostdev.memory import Region

MIB = 1 << 20
GIB = 1 << 30
DEADLINE = 60.0
PLAN = FleetPlan(
    3, 128 * MIB, "staggered", Parameters(order=7), duration=60.0, resident_limit=GIB, sample_seconds=2.0
)


def live(plan: FleetPlan) -> FleetRun:
    return run_fleet(plan, lambda _sample: None)


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_devices_hold_what_the_account_says_and_no_more() -> None:
    run = live(PLAN)
    dry = live(replace(PLAN, resident_limit=0))
    assert run.failures == []
    assert run.digest == dry.digest
    assert (run.reports, run.reported_bytes) == (dry.reports, dry.reported_bytes)
    assert run.reports > 0
    for sample in run.samples:
        assert sample.resident_bytes is not None
        assert 0 <= sample.resident_bytes - sample.footprint_bytes <= PLAN.guests * 2 * MIB
    assert run.cpu_seconds > 0.0
    assert children() == []


def test_beyond_the_limit_memory_is_only_counted() -> None:
    """The same life by the account, in less memory."""
    limit = 40 * MIB
    run, free = live(replace(PLAN, resident_limit=limit)), live(PLAN)
    assert run.failures == []
    assert (run.digest, run.reported_bytes) == (free.digest, free.reported_bytes)
    held = max(sample.resident_bytes or 0 for sample in run.samples)
    assert limit / 2 < held <= limit + PLAN.guests * 2 * MIB
    assert max(sample.footprint_bytes for sample in run.samples) > 2 * limit
    assert free.uncharged_bytes == 0 < run.uncharged_bytes
    assert any("only counted" in note for note in result_of(run).notes)


def test_guests_beyond_the_devices_are_only_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balloonlab.fleet.MAX_DEVICES", 1)
    run = live(PLAN)
    assert run.plan.devices == 1
    assert run.digest == live(replace(PLAN, resident_limit=0)).digest
    assert any("2 guests beyond 1 have no device" in note for note in result_of(run).notes)


# Sabotage: the devices are forked from this process, so what is patched here is what they do.


def test_a_device_that_releases_one_page_too_many_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = Discarder.release

    def greedy(self: Discarder, region: Region, offset: int, length: int) -> None:
        release(self, region, offset, min(length + PAGE_SIZE, region.size - offset))

    monkeypatch.setattr(Discarder, "release", greedy)
    out = tmp_path / "run"
    words = ["--guests=2", "--memory=128M", "--order=6", "--capacity=8", "--workload=churn", "--duration=60s"]
    assert cli.main(["simulate", *words, f"--out={out}"]) == 1
    result = msgspec.json.decode((out / "result.json").read_bytes(), type=FleetResult)
    assert not result.passed
    assert "guest " in result.page_check_failures[0]
    assert "holds zeros" in result.page_check_failures[0]
    assert "A page did NOT hold what it must." in capsys.readouterr().out
    assert children() == []


def test_a_device_that_releases_nothing_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Discarder, "release", lambda *_arguments: None)
    run = live(PLAN)
    assert len(run.failures) == 1
    assert "the host holds" in run.failures[0]


def test_a_device_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers die one after the other, until the next has to wait: for longer than a guest waits, on a slow host too."""
    monkeypatch.setattr("hostdev.births.STARTS_SECONDS", 3600.0)
    wait_used = DriverRing.wait_used
    monkeypatch.setattr(DriverRing, "wait_used", lambda ring, head: wait_used(ring, head, 0.5))
    monkeypatch.setattr(Discarder, "release", lambda *_arguments: os._exit(1))
    with pytest.raises(DeviceError, match="a device does not answer"):
        live(PLAN)
    assert children() == []


def is_gone(group: int) -> bool:
    """Wait for the last process of a group to be gone, and reaped by whoever has to."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    """The whole process group is asked for, as a terminal does it; the group is empty afterwards."""
    words = ["simulate", "--guests=4", "--memory=128M", "--duration=1h", f"--out={tmp_path / 'run'}"]
    lab = subprocess.Popen(
        [sys.executable, "-m", "balloonlab.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
    )
    try:
        assert lab.stdout is not None
        for line in lab.stdout:
            if line.startswith("life"):
                break
        os.killpg(lab.pid, number)
        _output, error = lab.communicate(timeout=DEADLINE)
    finally:
        lab.kill()
        lab.wait()
    assert lab.returncode == 128 + number, error
    *others, last = error.splitlines()
    assert last.endswith("everything that was started has ended")
    assert others == []
    assert is_gone(lab.pid)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.full
@pytest.mark.timeout(700)
def test_a_hundred_guests_for_ten_minutes(tmp_path: Path) -> None:
    """No page check fails, and the run repeats; how long it took is printed."""
    plan = FleetPlan(100, 256 * MIB, "staggered", Parameters(), duration=600.0, resident_limit=10 * GIB)
    begun = time.monotonic()
    run = live(plan)
    print(f"{time.monotonic() - begun:.0f} s, {run.cpu_seconds:.0f} s of CPU in the devices")
    assert run.failures == []
    dry = live(replace(plan, resident_limit=0))
    assert (run.digest, run.reports, run.reported_bytes) == (dry.digest, dry.reports, dry.reported_bytes)
    assert children() == []
