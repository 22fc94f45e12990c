"""Reports as balloonlab measure leaves them, made without a guest: for what compares, judges and bisects them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from balloonlab.measure.report import NAME, SCHEMA, ArmResult, Check, Ending, PhaseResult, Report, Run
from balloonlab.measure.scenario import Arm, Scenario
from balloonlab.measure.scenario_file import STANDARD
from balloonlab.measure.statistics import spread

MIB = 1 << 20
FIGURES: Mapping[str, float | None] = {
    "boot_seconds": 5.0,
    "floor_bytes": 160.0 * MIB,
    "residual_bytes": 164.0 * MIB,
    "returned_bytes": 256.0 * MIB,
    "t90_seconds": 4.0,
    "reports": 90.0,
    "return.peak_bytes": 420.0 * MIB,
}
# What a kernel leaves that does not report free pages any more.
KEPT: Mapping[str, float | None] = {
    **FIGURES,
    "residual_bytes": 410.0 * MIB,
    "returned_bytes": 10.0 * MIB,
    "t90_seconds": None,
}


def made_run(
    number: int = 1,
    figures: Mapping[str, float | None] = FIGURES,
    *,
    arm: Arm = "ours",
    ending: Ending = "measured",
    checks: Sequence[Check] = (),
) -> Run:
    """One run; where it has figures its guest came up."""
    phases = ["boot", "idle"] if figures else []
    return Run(
        arm=arm,
        number=number,
        folder=f"{arm}-{number}",
        ending=ending,
        why="" if ending == "measured" else f"the guest {ending} in a test",
        kernel="6.12.1",
        figures=dict(figures),
        phases=[
            PhaseResult(
                name=do, do=do, begin=0.0, seconds=1.0, footprint_gib_minutes=0.1, peak_bytes=MIB, end_bytes=MIB
            )
            for do in phases
        ],
        checks=list(checks),
    )  # fmt: skip


def made_report(
    *runs: Run, scenario: Scenario = STANDARD, kernel: str = "6.12.1", budgets: Sequence[Check] = ()
) -> Report:
    """A report of these runs; budgets: the checks of each of its arms."""
    arms = []
    for arm in dict.fromkeys(run.arm for run in runs):
        measured = [run for run in runs if run.arm == arm and run.ending == "measured"]
        values = {
            name: [value for run in measured if (value := run.figures.get(name)) is not None]
            for name in FIGURES
        }
        spreads = {name: spread(found) for name, found in values.items() if found}
        arms.append(ArmResult(arm=arm, figures=spreads, checks=list(budgets)))
    broken = any(check.outcome == "fail" for check in budgets)
    return Report(
        schema=SCHEMA,
        passed=all(run.passed for run in runs) and not broken,
        scenario=scenario,
        environment={
            "versions": {"vhost-user-balloon": "1.0"},
            "host": {"cpus": 2, "settings": {"swappiness": "60"}},
        },
        kernel=kernel,
        qemu="11.1.0",
        accelerator="tcg",
        seconds=60.0,
        arms=arms,
        runs=list(runs),
    )


def repeated(figure: str, values: Sequence[float], *, arm: Arm = "ours") -> Report:
    """A report of runs that have one figure different, and are equal in all others."""
    runs = [made_run(number, {**FIGURES, figure: value}, arm=arm) for number, value in enumerate(values, 1)]
    return made_report(*runs)


def leave(report: Report, folder: Path) -> Path:
    """Write a report as a run folder."""
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(msgspec.json.encode(report))
    return folder
