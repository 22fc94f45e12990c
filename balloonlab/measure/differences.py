"""What is different between two reports: each figure with its interval and a verdict, and what else is not the same.

Pure; compare.py reads the reports and shows this. A figure is worse if the interval of its shift leaves 0 out, and the
shift is more than the figure's own noise and more than the threshold, a share of the old median. With one run on a side
there is no interval, and noise and threshold decide alone; with too few for the confidence asked for, the widest interval.
But times and counts differ by 10 % and more from run to run, and memory hardly: where there are too few runs, nothing but
bytes and figures that were asked for by name is called better or worse.

The confidence is that of the whole comparison. Of twenty figures at 95 % each, one would be worse in four of ten comparisons
of a kernel with itself, were it not for noise and threshold. So what may go wrong is shared among the figures that can be
worse (Bonferroni: 99.75 % each), which holds however they depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from balloonlab.errors import UsageError
from balloonlab.measure.figures import FIGURES, Figure, find_figure
from balloonlab.measure.report import Report, Run, Spread
from balloonlab.measure.scenario import Arm, Scenario
from balloonlab.measure.statistics import Shift, reaches, shift, spread
from balloonlab.measure.summary import WHOLE

SCHEMA = 1
# changed: of a figure of which neither way is better. no-confidence: far apart, but the runs differ as much among themselves.
Verdict: TypeAlias = Literal["better", "worse", "same", "changed", "no-confidence", "not-measured"]


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
    each = 1 - (1 - bar.confidence) / max(1, len(judged))
    found = [_difference(name, *values[name], bar.threshold, each) for name in names]
    if not named:
        found = [_cautious(one, each) for one in found]
    failures = [*_endings(new, arm), *_missing(found, named)]
    shown = [one for one in found if named or one.old is not None or one.new is not None]
    return Comparison(
        schema=SCHEMA,
        regressed=bool(failures) or any(one.verdict == "worse" for one in shown),
        arm=arm,
        threshold=bar.threshold,
        confidence=bar.confidence,
        each=each,
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


def _missing(found: Sequence[Difference], named: Sequence[str]) -> list[str]:
    """Return which of the figures that were asked for NEW lacks. Raises UsageError for one that OLD lacks."""
    asked = [one for one in found if one.figure in named]
    for one in asked:
        if one.old is None:
            raise UsageError(f"OLD has no {one.figure}, it was not measured there: compare another figure")
    return [f"{one.figure} was measured in OLD, and not in NEW" for one in asked if one.new is None]


def _difference(
    name: str, old: Sequence[float], new: Sequence[float], threshold: float, confidence: float
) -> Difference:
    before, after = (spread(values) if values else None for values in (old, new))
    if before is None or after is None:
        return Difference(figure=name, verdict="not-measured", old=before, new=after)
    found = shift(old, new, confidence)
    interval = found.interval
    return Difference(
        figure=name,
        verdict=verdict(find_figure(name), found, before.median, threshold),
        old=before,
        new=after,
        difference=found.estimate,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        confidence=interval.confidence if interval else None,
    )


def _cautious(one: Difference, confidence: float) -> Difference:
    """Return a difference without its verdict where it is no memory and there were too few runs for the confidence."""
    sure = find_figure(one.figure).unit == "bytes" or reaches(one.confidence, confidence)
    return one if sure or one.verdict not in ("better", "worse") else replace(one, verdict="no-confidence")


def verdict(figure: Figure, found: Shift, old: float, threshold: float) -> Verdict:
    """Return what a shift of a figure from its old median says."""
    if abs(found.estimate) <= max(figure.noise, threshold * abs(old)):
        return "same"
    if found.interval is not None and found.interval.low <= 0 <= found.interval.high:
        return "no-confidence"
    if figure.better == "neither":
        return "changed"
    return "worse" if (found.estimate > 0) == (figure.better == "less") else "better"


def scenarios_differ(old: Scenario, new: Scenario) -> list[str]:
    """Return what two scenarios have different that changes what is measured: not kernel, budgets, name or folders."""
    return list(_differing(msgspec.to_builtins(_bare(old)), msgspec.to_builtins(_bare(new)), ""))


def _bare(scenario: Scenario) -> Scenario:
    files = {inside: Path(outside).name for inside, outside in scenario.guest.files.items()}
    guest = replace(scenario.guest, kernel="", flavour="", modules=None, files=files)
    return replace(scenario, name="", budgets=(), guest=guest)


def conditions(old: Report, new: Report) -> list[str]:
    """Return what else than the scenario is not the same: kernel, QEMU, our version, the machine."""
    return list(_differing(_conditions(old), _conditions(new), ""))


def _conditions(report: Report) -> dict[str, Any]:
    versions = report.environment.get("versions")
    return {
        "kernel": report.kernel,
        "qemu": report.qemu,
        "accelerator": report.accelerator,
        "vhost-user-balloon": versions.get("vhost-user-balloon") if isinstance(versions, dict) else None,
        "host": report.environment.get("host"),
    }


def _differing(old: Any, new: Any, path: str) -> Iterator[str]:  # noqa: ANN401  (any value that JSON has)
    """Yield each place where two values are different, with both."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differing(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True), 1):
            yield from _differing(one, other, f"{path}[{number}]")
    elif old != new:
        yield f"{path}: {_text(old)} in OLD, {_text(new)} in NEW"


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)} of them"
    return "nothing" if value is None or value == "" else str(value)
