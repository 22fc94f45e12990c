"""What ended a run, from what was seen of it from outside and what its kernel said."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from balloonlab.errors import DeviceError, GuestEndedError, GuestHungError
from balloonlab.measure.meter import Meter
from balloonlab.measure.phases import PhaseError, Phases
from balloonlab.measure.ranges import Places
from balloonlab.measure.report import Ending, Finding, FindingKind, PhaseResult, Run
from balloonlab.measure.runner import WHY_CHARACTERS, Order, Runner, ending_of, explain
from balloonlab.measure.scenario import Idle, Scenario
from balloonlab.measure.tally import Ends
from balloonlab.rig import Setup
from balloonlab.timeline import Sample
from guest_images.build import GuestImage
from guest_images.errors import AgentGarbageError, AgentRefusedError, AgentTimeoutError
from qmp_glue.errors import DeadlineError, QemuExitedError, VmError
from qmp_glue.find import Qemu

IMAGE = GuestImage("own", "6.99", Path("/vmlinux"), Path("/initrd"), pvh=True)


def found(*kinds: FindingKind) -> list[Finding]:
    return [Finding(kind=kind, line=line, text=f"{kind} {line}") for line, kind in enumerate(kinds, 1)]


@pytest.mark.parametrize(
    ("ending", "why", "kinds", "expected"),
    [
        (
            "guest-ended",
            "it ended",
            ("warning", "oom-kill", "panic", "panic"),
            ("panicked", "panic 3; it ended"),
        ),
        ("measured", "", ("warning", "oom-kill", "oom-kill"), ("out-of-memory", "oom-kill 2")),
        ("no-driver", "no driver", ("oops", "oom-kill"), ("out-of-memory", "oom-kill 2; no driver")),
        ("out-of-memory", "no room", ("warning", "oom-kill"), ("out-of-memory", "no room")),
        ("measured", "", ("warning", "oops"), ("measured", "")),
        ("measured", "", ("panic",), ("measured", "")),
        ("device-ended", "it ended", ("panic",), ("device-ended", "it ended")),
        ("hung", "nothing said", ("stall",), ("hung", "nothing said")),
    ],
)
def test_why_is_the_line_that_decided(
    ending: Ending, why: str, kinds: tuple[FindingKind, ...], expected: tuple[Ending, str]
) -> None:
    assert explain(ending, why, found(*kinds)) == expected


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (PhaseError("out-of-memory", "no room"), "out-of-memory"),
        (GuestEndedError("it ended"), "guest-ended"),
        (GuestHungError("nothing said"), "hung"),
        (AgentTimeoutError("no answer"), "hung"),
        (AgentGarbageError("no answer"), "hung"),
        (AgentRefusedError("no memory to fork"), "command-failed"),
        (DeviceError("it ended"), "device-ended"),
        (QemuExitedError(1, []), "qemu-ended"),
        (VmError("its RAM cannot be looked at"), "qemu-ended"),
        (DeadlineError("QEMU does not answer"), "hung"),
    ],
)
def test_an_error_makes_an_ending(error: Exception, ending: Ending) -> None:
    assert ending_of(error) == ending


class Device:
    """One that only wrote its log."""

    def __init__(self, log: str) -> None:
        self.log = log

    @property
    def device(self) -> Device:
        return self

    def log_text(self) -> str:
        return self.log


def ended(folder: Path, log: str, why: str = "", *, settled: bool | None = None) -> Run:
    """A run that came to its end with our device, one phase, one report in its trace, and this log."""
    setup = Setup(Qemu(("qemu",)), IMAGE, 256 << 20, discard="dontneed")
    runner = Runner(Order(Scenario(name="own", phases=(Idle(name="floor"),)), setup, "ours", 1, folder))
    runner.samples = [Sample(9.0, "run", 1, 2, 3, 4096, 50)]
    runner._meter = Meter(folder / "device.trace", [], Places([]))
    runner._meter.latencies.seconds = [0.5]
    runner._argv = ([], [])
    runner._phases = Phases(cast("Any", None), cast("Any", None), folder)
    runner._phases.done = [
        PhaseResult(
            name="floor", do="idle", begin=0.0, seconds=60.0, footprint_gib_minutes=1.0, peak_bytes=2, end_bytes=1,
            settled=settled,
        )
    ]  # fmt: skip
    runner._check_trace(cast("Any", Device(log)))
    return runner._result("measured", why, [])


def test_a_trace_that_is_not_whole_fails_its_run_and_is_not_read_as_if_it_were(tmp_path: Path) -> None:
    run = ended(
        tmp_path, "[warning] the trace is full: No space left on device\x1b: nothing more is written\n"
    )
    (failed,) = [check for check in run.checks if check.outcome == "fail"]
    assert failed.name == "trace"
    assert "No space left on device\\x1b" in failed.message
    assert (run.figures["reports"], run.figures["released_bytes"]) == (50, 4096)
    assert (run.figures["release_p50_seconds"], run.release_latency) == (None, None)
    assert not run.passed


def test_a_trace_that_is_whole_needs_no_check(tmp_path: Path) -> None:
    run = ended(tmp_path, "all is well\n")
    assert [check.name for check in run.checks] == ["console"]
    assert (run.figures["reports"], run.figures["release_p50_seconds"]) == (1, 0.5)
    assert run.release_latency is not None
    assert run.figures["refault_bytes"] is None  # dontneed frees nothing
    assert run.passed


def test_why_is_bounded_and_printable(tmp_path: Path) -> None:
    why = ended(tmp_path, "", "it said:\n" + "\x1b[2J" * 5000).why
    assert why.startswith("it said:\n")
    assert len(why) <= WHY_CHARACTERS
    assert all(line.isprintable() for line in why.split("\n"))


def test_a_run_that_did_not_settle_has_not_passed(tmp_path: Path) -> None:
    assert ended(tmp_path, "", settled=True).passed
    run = ended(tmp_path, "", settled=False)
    assert not run.passed
    assert run.checks[-1].message == "still changing after 60 s: raise its deadline"


class Mute:
    """A guest that refuses to show its log, on a host that has measured it."""

    @property
    def agent(self) -> Mute:
        return self

    async def dmesg(self) -> str:
        raise AgentRefusedError("no memory to fork")

    async def whole_look(self) -> Sample:
        return Sample(9.0, "run", 1, 2)


def test_a_guest_that_refuses_its_log_is_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ends(_rig: object, last: Sample) -> Ends:
        return Ends(last, 1.0, 2, 3, 4, 5, 6.0, 7)

    monkeypatch.setattr("balloonlab.measure.tally.ends", ends)
    order = Order(Scenario(name="own"), Setup(Qemu(("qemu",)), IMAGE, 256 << 20), "off", 1, tmp_path)
    runner = Runner(order)
    asyncio.run(runner._end(cast("Any", Mute()), cast("Any", Mute())))
    assert runner._figures["guest_faults"] == 4
