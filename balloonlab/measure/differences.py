"""What is different between two reports: each figure with its interval and a verdict, and what else makes NEW worse.

Pure; compare.py reads the reports and shows this, conditions.py has what else is not the same. A figure is worse if the
interval of its shift leaves 0 out, and the shift is more than the figure's own noise and more than the threshold, a share
of the old median. It is the same if all of the interval is within these.

The confidence is that of the whole comparison. Of twenty figures at 95 % each, one would be worse in four of ten comparisons
of a kernel with itself, were it not for noise and threshold. So what may go wrong is shared among the figures that can be
worse (Bonferroni: 99.75 % each), which holds however they depend on each other.

Where there are too few runs for that, a figure is judged if

- it was asked for by name, and there are two runs on both sides: by the widest interval that they give; or
- two runs of one guest are known not to lie as far apart (Figure.apart): this alone decides where there is one run on a side; or
- all of the interval is ten times over noise and threshold, and has the confidence of the whole by itself.

Otherwise there is no confidence: one run on a side of a figure that differs by what it likes is a coin toss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from balloonlab.errors import UsageError
from balloonlab.measure.conditions import conditions
from balloonlab.measure.figures import FIGURES, Figure, find_figure
from balloonlab.measure.report import Check, Report, Run, Spread
from balloonlab.measure.scenario import Arm
from balloonlab.measure.statistics import Shift, reaches, shift, spread
from balloonlab.measure.summary import WHOLE

SCHEMA = 1
# changed: of a figure of which neither way is better. no-confidence: it may be another, but runs are too few or too different.
Verdict: TypeAlias = Literal["better", "worse", "same", "changed", "no-confidence", "not-measured"]
# So many times noise and threshold is what nobody calls one of many chances.
FAR = 10
# mm/page_reporting.c waits so long between two passes (PAGE_REPORTING_DELAY); Figure.apart is of guests that do.
PASS_MS = 2000
_OF_PASSES = ("t50_seconds", "t90_seconds")


@dataclass(frozen=True)
class Bar:
    """What a difference must be over.

    threshold: a share of the old median. confidence: of all figures together, above 0 and below 1.
    """

    threshold: float = 0.05
    confidence: float = 0.95


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One figure, in its own unit. confidence: of low to high; None, as these, with one run on a side."""

    figure: str
    verdict: Verdict
    old: Spread | None
    new: Spread | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two reports of one arm. failures: what makes NEW worse whatever the figures say. conditions: what else differs.

    regressed: a figure is worse, or there is a failure. confidence: of all together; each: what that asks of one figure.
    judged: how many figures can be better or worse.
    """

    schema: int
    regressed: bool
    arm: Arm
    threshold: float
    confidence: float
    each: float
    judged: int
    failures: list[str]
    conditions: list[str]
    figures: list[Difference]


def compare(old: Report, new: Report, arm: Arm, named: Sequence[str], bar: Bar) -> Comparison:
    """Compare two reports. named: full names of figures, which must have been measured; none: all that were.

    Raises UsageError where OLD has nothing to compare with.
    """
    before, after = _measured(old, arm), _measured(new, arm)
    if not before:
        raise UsageError(f"OLD has no run of arm {arm} that was measured to its end: name one that has")
    names = named or [figure.name for figure in FIGURES]
    values = {name: (_values(before, name), _values(after, name)) for name in names}
    judged = [name for name in names if find_figure(name).better != "neither" and all(values[name])]
    judge = _Judge(bar, len(judged), named=bool(named), passes=max(_passes(old), _passes(new)))
    found = [_difference(name, *values[name], judge) for name in names]
    failures = [*_endings(new, arm), *_failed(new, arm), *(_missing(found, named) if after or named else [])]
    shown = [one for one in found if named or one.old is not None or one.new is not None]
    return Comparison(
        schema=SCHEMA,
        regressed=bool(failures) or any(one.verdict == "worse" for one in shown),
        arm=arm,
        threshold=bar.threshold,
        confidence=bar.confidence,
        each=judge.each,
        judged=len(judged),
        failures=failures,
        conditions=conditions(old, new),
        figures=shown,
    )


def _measured(report: Report, arm: Arm) -> list[Run]:
    return [run for run in report.runs if run.arm == arm and run.counted and run.ending in WHOLE]


def _values(runs: Sequence[Run], name: str) -> list[float]:
    return [value for run in runs if (value := run.figures.get(name)) is not None]


def _endings(report: Report, arm: Arm) -> list[str]:
    """Return which runs did not come to their end, or were not made."""
    missing = report.planned - len(report.runs)
    cut = [f"NEW was interrupted, {missing} of its {report.planned} runs are missing"] if missing > 0 else []
    return cut + [
        f"run {run.number} of NEW ended {run.ending}" + (f": {run.why}" if run.why else "")
        for run in report.runs
        if run.arm == arm and run.ending != "measured"
    ]


def _failed(report: Report, arm: Arm) -> list[str]:
    """Return what did not hold in the runs, and which budgets they broke."""
    runs = [
        (f"run {run.number} of NEW: ", check) for run in report.runs if run.arm == arm for check in run.checks
    ]
    budgets = [("NEW: ", check) for result in report.arms if result.arm == arm for check in result.checks]
    return [f"{where}{_said(check)}" for where, check in (*runs, *budgets) if check.outcome == "fail"]


def _said(check: Check) -> str:
    return f"{check.name}: {check.message}" if check.message else f"{check.name} failed"


def _missing(found: Sequence[Difference], named: Sequence[str]) -> list[str]:
    """Return which figures of OLD NEW lacks. Raises UsageError for one that was asked for and OLD lacks."""
    for one in found:
        if one.figure in named and one.old is None:
            raise UsageError(f"OLD has no {one.figure}, it was not measured there: compare another figure")
    return [
        f"{one.figure} was measured in OLD, and not in NEW"
        for one in found
        if one.old is not None and one.new is None
    ]


def _passes(report: Report) -> float:
    """Return how many times as long as usual the guest waits between two passes of page reporting."""
    return max(1.0, (report.scenario.guest.page_reporting_delay_ms or 0) / PASS_MS)


@dataclass(frozen=True)
class _Judge:
    """What all figures of a comparison are judged by. judged: how many can be better or worse. passes: see _passes()."""

    bar: Bar
    judged: int
    named: bool
    passes: float

    @property
    def each(self) -> float:
        return 1 - (1 - self.bar.confidence) / max(1, self.judged)

    def verdict(self, figure: Figure, found: Shift, old: float) -> Verdict:
        """Return what a shift of a figure from its old median says."""
        share = self.bar.threshold * abs(old)
        over = max(figure.noise, share)
        if self._reaches(found, self.each) or (self.named and found.interval is not None):
            return verdict(figure, found, over, over)
        if figure.apart is not None:
            apart = figure.apart * (self.passes if figure.name in _OF_PASSES else 1)
            return verdict(figure, found, over, max(apart, share))
        return verdict(figure, found, over, over if self._is_far(found, over) else math.inf)

    def _is_far(self, found: Shift, over: float) -> bool:
        """Return whether all of the interval is many times over noise and threshold, and has the confidence of the whole."""
        if found.interval is None or not self._reaches(found, self.bar.confidence):
            return False
        return found.interval.low > FAR * over or found.interval.high < -FAR * over

    def _reaches(self, found: Shift, confidence: float) -> bool:
        return reaches(found.interval.confidence if found.interval else None, confidence)


def _difference(name: str, old: Sequence[float], new: Sequence[float], judge: _Judge) -> Difference:
    before, after = (spread(values) if values else None for values in (old, new))
    if before is None or after is None:
        return Difference(figure=name, verdict="not-measured", old=before, new=after)
    found = shift(old, new, judge.each)
    interval = found.interval
    return Difference(
        figure=name,
        verdict=judge.verdict(find_figure(name), found, before.median),
        old=before,
        new=after,
        difference=found.estimate,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        confidence=interval.confidence if interval else None,
    )


def verdict(figure: Figure, found: Shift, noise: float, surely: float) -> Verdict:
    """Return what a shift says. noise: within it is nothing. surely: what it must be over as well, to be better or worse."""
    low, high = (found.interval.low, found.interval.high) if found.interval else (found.estimate,) * 2
    if abs(found.estimate) <= noise:
        return "same" if -noise <= low and high <= noise else "no-confidence"
    if figure.better == "neither":
        return "changed" if low > 0 or high < 0 else "no-confidence"
    if abs(found.estimate) <= surely or low <= 0 <= high:
        return "no-confidence"
    return "worse" if (found.estimate > 0) == (figure.better == "less") else "better"
