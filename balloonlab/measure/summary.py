"""From runs to a report: figures over the runs of each arm, budgets, and whether all of it passed. Pure.

Budgets are for the first arm, which is what is measured; the other arms are there to compare with. Used by command.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from balloonlab.measure.budgets import judge
from balloonlab.measure.report import ArmResult, Ending, Run, Spread
from balloonlab.measure.scenario import Arm, Budget
from balloonlab.measure.statistics import spread

# Runs that came to the end of their last phase, so that their figures are whole.
WHOLE: tuple[Ending, ...] = ("measured", "no-driver")


def arm_results(arms: Sequence[Arm], runs: Sequence[Run], budgets: Sequence[Budget]) -> list[ArmResult]:
    """Return what each arm comes to. arms: in the order in which they were named."""
    results = []
    for place, arm in enumerate(arms):
        figures = spreads([run for run in runs if run.arm == arm and run.counted and run.ending in WHOLE])
        medians = {name: one.median for name, one in figures.items()}
        checks = judge(budgets, medians) if place == 0 else []
        results.append(ArmResult(arm=arm, figures=figures, checks=checks))
    return results


def spreads(runs: Sequence[Run]) -> dict[str, Spread]:
    """Return each figure over the runs that have it."""
    names = dict.fromkeys(name for run in runs for name in run.figures)
    columns = {
        name: [value for run in runs if (value := run.figures.get(name)) is not None] for name in names
    }
    return {name: spread(values) for name, values in columns.items() if values}


def passed(runs: Sequence[Run], arms: Sequence[ArmResult], planned: int) -> bool:
    """Return whether all that was planned was measured, and nothing that had to hold did not."""
    whole = len(runs) == planned and all(run.passed for run in runs)
    return whole and all(check.outcome != "fail" for arm in arms for check in arm.checks)
