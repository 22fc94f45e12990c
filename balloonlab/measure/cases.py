"""A report as the cases that pipelines count: how each run ended, each check of it, each budget of an arm.

Pure. JUnit and TAP are two ways to write these, so that they always agree on what passed. A case's name is the same
from one measurement to the next, for pipelines keep its history by it.
"""

from __future__ import annotations

from dataclasses import dataclass

from balloonlab.measure import words
from balloonlab.measure.console import CHECK, console_check
from balloonlab.measure.report import Check, Outcome, Report, Run
from balloonlab.measure.scenario import Arm


@dataclass(frozen=True)
class Case:
    """One case. name: unique within its arm. run: whose it is; None for an arm's. ending: it is about the run's end."""

    arm: Arm
    name: str
    outcome: Outcome
    message: str
    run: Run | None = None
    ending: bool = False


def cases(report: Report) -> list[Case]:
    """Return all cases, arm by arm: the runs in their order, each with its checks, and then the budgets."""
    found = [case for arm in arms(report) for case in _of_arm(report, arm)]
    return [*_missing(report), *found]


def arms(report: Report) -> list[Arm]:
    """Return the arms that were run or judged, each once."""
    return list(dict.fromkeys([arm.arm for arm in report.arms] + [run.arm for run in report.runs]))


def _missing(report: Report) -> list[Case]:
    """What pipelines see of runs that there should be: nothing that was not made has a case of its own."""
    missing = report.planned - len(report.runs)
    if missing <= 0 or not arms(report):
        return []
    message = f"{missing} of {words.plural(report.planned, 'run')} not made: the measurement was ended before"
    return [Case(arms(report)[0], "every planned run", "fail", message)]


def _of_arm(report: Report, arm: Arm) -> list[Case]:
    runs = [case for run in report.runs if run.arm == arm for case in _of_run(run)]
    budgets = [check for judged in report.arms if judged.arm == arm for check in judged.checks]
    return runs + [Case(arm, check.name, check.outcome, check.message) for check in budgets]


def _of_run(run: Run) -> list[Case]:
    outcome: Outcome = "pass" if run.ending == "measured" else "fail"
    ending = Case(run.arm, f"run {run.number} ends as measured", outcome, words.ending(run), run, ending=True)
    checks = [
        Case(run.arm, f"run {run.number} {check.name}", check.outcome, check.message, run)
        for check in _checks(run)
    ]
    return [ending, *checks]


def _checks(run: Run) -> list[Check]:
    """The checks of a run, its console's among them even where the run has not put it there."""
    if any(check.name == CHECK for check in run.checks):
        return run.checks
    return [*run.checks, console_check(run.findings)]
