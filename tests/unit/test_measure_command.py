"""The measure command around its runs: options, order, what is kept and shown whatever happens. No guest is booted here."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from balloonlab.cli import main
from balloonlab.errors import DeviceError
from balloonlab.measure import command
from balloonlab.measure.outputs import STEP_SUMMARY
from balloonlab.measure.report import Run, read_report
from balloonlab.measure.runner import Order
from balloonlab.rig import Setup
from balloonlab.watcher import Watcher
from hostdev.errors import EXIT_PASS, EXIT_UNSUPPORTED, EXIT_USAGE
from tests import measured

WRITTEN = {"result.json", "junit.xml", "results.tap", "summary.md", "timeline.png", "report.html"}
SETUP = Setup(
    qemu=cast("Any", SimpleNamespace(version="11.1.0")),
    image=cast("Any", SimpleNamespace(kernel_version="6.12", suite="bookworm-backports")),
    memory_bytes=512 << 20,
)
Act = Callable[[Order], Awaitable[None]]
# Of the event loop, until what has ended has been taken notice of.
TURNS = 10


async def nothing(_order: Order) -> None:
    """What most runs do."""


class Lab:
    """In place of guests: each run ends at once and well, after act() was called with its order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.orders: list[Order] = []
        self.act: Act = nothing
        monkeypatch.setattr(command, "prepare", lambda *_spec, **_options: SETUP)
        monkeypatch.setattr(command, "Runner", self._runner)
        monkeypatch.delenv(STEP_SUMMARY, raising=False)

    def _runner(self, order: Order, _watcher: Watcher) -> SimpleNamespace:
        self.orders.append(order)
        return SimpleNamespace(run=partial(self._run, order))

    async def _run(self, order: Order) -> Run:
        for _ in range(TURNS):
            await asyncio.sleep(0)
        await self.act(order)
        made = measured.run(order.arm, order.number)
        return msgspec.structs.replace(made, folder=order.name, counted=not order.verify)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(monkeypatch)


def measure(folder: Path, *options: str) -> int:
    return main(["measure", "--jobs", "1", "--out", str(folder), *options])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def wrong(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit status and the message of a command line that cannot be; nothing is left of it."""
    status = main(["measure", "--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeat", "0"], "--repeat 0: give 1 to 1000"),
        (["--repeat", "1001"], "--repeat 1001: give 1 to 1000"),
        (["--jobs", "0"], "--jobs 0: give one or more"),
        (["--budget", "nonsense"], "'nonsense' is no budget"),
        (["--verify", "--arm", "qemu", "--arm", "off"], "there are qemu and off: add --arm ours"),
        (["no-such.toml"], "no-such.toml"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(
    options: list[str], message: str, lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = wrong(options, tmp_path, capsys)
    assert status == EXIT_USAGE
    assert message in said
    assert lab.orders == []


def test_a_guest_that_the_machine_has_no_memory_for_is_not_begun(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # More than there is at all: what is available comes and goes with others.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 + 4096
    status, said = wrong(["--memory", f"{memory}M"], tmp_path, capsys)
    assert status == EXIT_UNSUPPORTED
    assert "(MemAvailable): take a smaller --memory" in said
    assert lab.orders == []


@pytest.mark.parametrize(
    ("arms", "proved"),
    [((), "ours"), (("off",), "off"), (("off", "ours"), "ours"), (("qemu", "off", "ours"), "ours")],
)
def test_the_proof_is_of_our_device_in_a_run_after_all_others(
    arms: tuple[str, ...], proved: str, lab: Lab, tmp_path: Path
) -> None:
    named = [word for arm in arms for word in ("--arm", arm)]
    assert measure(tmp_path / "out", *named, "--repeat", "2", "--verify") == EXIT_PASS
    assert [order.verify for order in lab.orders] == [False] * 2 * max(1, len(arms)) + [True]
    last = lab.orders[-1]
    assert (last.arm, last.name, last.number) == (proved, f"{proved}-verify", 3)
    report = read_report(tmp_path / "out")
    assert [run.folder for run in report.runs if not run.counted] == [f"{proved}-verify"]
    assert all(spread.runs == 2 for arm in report.arms for spread in arm.figures.values())
    assert report.planned == len(lab.orders)


def test_guests_at_once_are_in_the_report_and_no_more_than_there_are_runs(lab: Lab, tmp_path: Path) -> None:
    options = ["measure", "--out"]
    assert main([*options, str(tmp_path / "a"), "--jobs", "3", "--repeat", "2", "--verify"]) == EXIT_PASS
    assert main([*options, str(tmp_path / "b"), "--jobs", "2", "--repeat", "3"]) == EXIT_PASS
    assert [read_report(tmp_path / name).jobs for name in ("a", "b")] == [2, 2]


def test_the_environment_is_that_of_before_the_runs(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments: list[str] = []

    def environment() -> dict[str, str]:
        moments.append("environment")
        return {"started": "then"}

    async def begin(order: Order) -> None:
        moments.append(order.name)

    monkeypatch.setattr(command, "environment", environment)
    lab.act = begin
    assert measure(tmp_path / "out") == EXIT_PASS
    assert moments == ["environment", "ours-1"]
    assert read_report(tmp_path / "out").environment == {"started": "then"}


def test_a_step_summary_that_cannot_be_written_fails_nothing(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(STEP_SUMMARY, str(tmp_path))
    assert measure(tmp_path / "out") == EXIT_PASS
    *_, verdict, warning = capsys.readouterr().out.splitlines()
    assert verdict.startswith("passed: 1 run")
    assert warning.startswith(f"warning: {STEP_SUMMARY}={tmp_path}: Is a directory")
    assert names(tmp_path / "out") == WRITTEN


def test_a_full_disk_is_one_line_and_the_verdict_is_shown_all_the_same(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("balloonlab.measure.outputs.write_json", full)
    assert measure(tmp_path / "out") == EXIT_USAGE
    shown = capsys.readouterr()
    assert "passed: 1 run, no budget broken" in shown.out
    assert shown.err == (
        f"balloonlab: {tmp_path / 'out'}: No space left on device: make room there, or name another with --out\n"
    )


def test_a_disk_that_is_full_while_a_guest_runs_is_one_line(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def full(_order: Order) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    lab.act = full
    assert measure(tmp_path / "out") == EXIT_USAGE
    assert "No space left on device: make room there" in capsys.readouterr().err


@pytest.mark.parametrize("error", [DeviceError("it is gone"), None])
def test_what_was_measured_is_written_out_whatever_ends_the_rest(
    error: DeviceError | None, lab: Lab, tmp_path: Path
) -> None:
    """None: SIGTERM."""

    async def second(order: Order) -> None:
        if order.number == 2:
            if error is not None:
                raise error
            signal.raise_signal(signal.SIGTERM)
            await asyncio.Event().wait()

    lab.act = second
    status = measure(tmp_path / "out", "--repeat", "3")
    assert status == (EXIT_USAGE if error is not None else 128 + signal.SIGTERM)
    assert names(tmp_path / "out") == WRITTEN
    report = read_report(tmp_path / "out")
    assert not report.passed
    assert [run.folder for run in report.runs] == ["ours-1"]
    assert report.planned == 3
    said = "2 of 3 runs not made: the measurement was ended before"
    assert said in (tmp_path / "out" / "junit.xml").read_text()
    assert said in (tmp_path / "out" / "results.tap").read_text()
