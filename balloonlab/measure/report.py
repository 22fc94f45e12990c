"""What measuring leaves behind: result.json, as declared values with exact bytes and seconds.

Declarations only; docs/schema/ has the JSON Schema that follows from them, as python -m balloonlab.measure.report prints
it. schema counts up when a field changes its meaning or goes; new fields alone do not change it. Written by command.py; read by compare.py and everything that shows
results.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from balloonlab.errors import UsageError
from balloonlab.measure.scenario import Arm, Scenario

SCHEMA = 1
NAME = "result.json"

# How a run ended. measured: all phases came to their end. The others are results too, with what was measured until then.
Ending: TypeAlias = Literal[
    "measured", "panicked", "hung", "no-driver", "out-of-memory", "command-failed", "guest-ended", "qemu-ended", "device-ended"
]  # fmt: skip
FindingKind: TypeAlias = Literal["panic", "oops", "oom-kill", "stall", "warning"]
Outcome: TypeAlias = Literal["pass", "fail", "skip"]


class Histogram(msgspec.Struct, frozen=True, kw_only=True):
    """How many values were below each bound, in seconds, and not below the one before it; the last count has no bound."""

    bounds: list[float]
    counts: list[int]


class PhaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """One phase. begin: seconds of the run. settled: it came to a plateau; None where none was waited for."""

    name: str
    do: str
    begin: float
    seconds: float
    footprint_gib_minutes: float
    peak_bytes: int
    end_bytes: int
    settled: bool | None = None


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a kernel said on its console or in its log. line: of the file, from 1."""

    kind: FindingKind
    line: int
    text: str
    file: Literal["console.log", "dmesg.log"] = "console.log"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that had to hold. name: unique within its run. message: what, and by how much; a pass need not have one."""

    name: str
    outcome: Outcome
    message: str = ""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One guest from boot to end. number: from 1, of its arm. folder: relative to result.json.

    figures: by the names of figures.py, PHASE.NAME for those of a phase; None: there was nothing to measure.
    ending, why: how it ended, and in words where that is not "measured". device_argv, qemu_argv: what was started.
    counted: False for a run that was made to prove something: its guest holds memory for that, so its figures are its own.
    """

    arm: Arm
    number: int
    folder: str
    ending: Ending
    why: str = ""
    kernel: str = ""
    figures: dict[str, float | None] = {}
    phases: list[PhaseResult] = []
    release_latency: Histogram | None = None
    findings: list[Finding] = []
    checks: list[Check] = []
    counted: bool = True
    qemu_argv: list[str] = []
    device_argv: list[str] = []

    @property
    def passed(self) -> bool:
        """True if nothing that had to hold did not."""
        return self.ending == "measured" and all(check.outcome != "fail" for check in self.checks)


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """One figure over the runs of an arm: median, quartiles, ends, and how many runs had it."""

    median: float
    low: float
    high: float
    least: float
    most: float
    runs: int


class ArmResult(msgspec.Struct, frozen=True, kw_only=True):
    """One arm: its figures over its measured runs, and the budgets, judged by the medians."""

    arm: Arm
    figures: dict[str, Spread]
    checks: list[Check]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of a measurement. passed: all runs that were planned, and every budget.

    planned: how many runs there should be; fewer are there if it was interrupted. environment: as runs.environment() has
    it. seconds: from the first run's beginning to the last one's end. jobs: how many guests ran at once.
    files: of scenario.guest.files, path in the guest -> digest of what was there, as guest_images.overlay has it.
    """

    schema: int
    passed: bool
    scenario: Scenario
    environment: dict[str, Any]
    kernel: str
    qemu: str
    accelerator: str
    seconds: float
    arms: list[ArmResult]
    runs: list[Run]
    planned: int = 0
    jobs: int = 1
    files: dict[str, str] = {}


def json_schema() -> str:
    """Return the JSON Schema (2020-12) of result.json, as it is published."""
    schema = msgspec.json.schema(Report)
    # A reader of this schema is not to break at a field that is newer than it.
    title = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"balloonlab measure, schema {SCHEMA}",
    }
    return msgspec.json.format(msgspec.json.encode(title | schema), indent=2).decode() + "\n"


def read_report(folder: Path) -> Report:
    """Read the report of a run folder, or a result.json itself. Raises UsageError."""
    path = folder / NAME if folder.is_dir() else folder
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: name a run folder of balloonlab measure") from error
    except msgspec.DecodeError as error:
        raise UsageError(
            f"{path} is no result of balloonlab measure ({error}): name its run folder"
        ) from error
    if report.schema != SCHEMA:
        raise UsageError(f"{path} has schema {report.schema}, this version reads {SCHEMA}: measure again")
    return report


if __name__ == "__main__":
    sys.stdout.write(json_schema())
