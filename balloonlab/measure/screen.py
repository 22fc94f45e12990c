"""What a person sees of a measurement: a line a phase, or the chart of one guest, and a table at the end.

Only shows. Several guests at once share the screen by lines that say whose they are. Used by command.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.table import Table

from balloonlab.measure import words
from balloonlab.measure.report import ArmResult, Report, Run
from balloonlab.measure.runner import Order
from balloonlab.measure.scenario import Scenario
from balloonlab.printable import printable
from balloonlab.progress import Progress
from balloonlab.rig import Setup
from balloonlab.sizes import human
from balloonlab.timeline import Sample
from balloonlab.watcher import Watcher

# Of a run's end in one line: guests write a part of it.
LINE_CHARACTERS = 2000


class _Lines:
    """The watcher of one guest of several: lines that name it."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name
        self._phase = ""
        self._began = 0.0

    def begin(self, phase: str) -> None:
        """A phase begins."""
        self._phase, self._began = phase, time.monotonic()

    def end(self, text: str) -> None:
        """The phase has ended."""
        seconds = time.monotonic() - self._began
        self._progress.say(f"{self._name:<8}  {self._phase:<12} {seconds:6.1f} s  {text}")

    def sample(self, sample: Sample) -> None:
        """Nothing to show."""


class Screen:
    """The screen of one measurement."""

    def __init__(self, progress: Progress, jobs: int, runs: int) -> None:
        """jobs: guests at once. runs: in all."""
        self._progress = progress
        self._is_shared = min(jobs, runs) > 1
        self._runs = runs
        self._begun = 0

    def begin(self, scenario: Scenario, setup: Setup) -> None:
        """Say what is measured."""
        self._say(
            f"{scenario.name}: QEMU {setup.qemu.version} ({setup.accelerator}), Linux {setup.image.kernel_version} "
            f"({setup.image.suite}), {human(setup.memory_bytes)} of memory"
        )

    @contextmanager
    def run(self, order: Order) -> Iterator[Watcher]:
        """Show one run while it goes on."""
        if self._is_shared:
            yield _Lines(self._progress, order.name)
            return
        self._begun += 1
        if self._runs > 1:
            self._progress.say(f"{order.name} ({self._begun} of {self._runs})")
        with self._progress.run(order.setup.memory_bytes):
            yield self._progress

    def ended(self, run: Run) -> None:
        """Say how a run has ended, if not as it should, and what it was to prove and did not."""
        if not run.passed:
            self._say(f"{run.folder}: {words.ending(run)}")
        for check in run.checks:
            if check.outcome != "pass":
                unproved = "not proved: " if check.outcome == "skip" else ""
                self._say(f"{run.folder}: {check.name}: {unproved}{check.message}")

    def conclude(self, report: Report, folder: Path) -> None:
        """Print the table, the budgets and the verdict."""
        self._progress.say("")
        self._say(words.subject(report))
        if any(arm.figures for arm in report.arms):
            self._progress.console.print(_table(report))
        for check in (check for arm in report.arms for check in arm.checks):
            self._say(f"{check.name}: {check.message or 'kept'}")
        self._say(f"{words.verdict(report)}. Figures, reports and pictures: {folder}")

    def warn(self, text: str) -> None:
        """Say what went wrong beside the measurement."""
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        self._progress.say(printable(text, LINE_CHARACTERS))


def _table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("figure", no_wrap=True)
    for arm in report.arms:
        table.add_column(arm.arm, justify="right")
    for name in words.figure_names(report)[0]:
        table.add_row(name, *(_cell(arm, name) for arm in report.arms))
    return table


def _cell(arm: ArmResult, name: str) -> str:
    return words.spread(name, arm.figures.get(name))
