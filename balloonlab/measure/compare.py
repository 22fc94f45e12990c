"""The command balloonlab compare: is the new report worse than the old one, with what confidence, and by how much.

Reads two run folders of balloonlab measure, starts nothing and writes nothing. differences.py has the verdicts.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import msgspec
from rich.table import Table

from balloonlab.errors import UsageError
from balloonlab.measure.conditions import measured_otherwise
from balloonlab.measure.differences import Bar, Comparison, Difference, compare
from balloonlab.measure.exit_style import SKIP, add_option, booted
from balloonlab.measure.figures import Figure, find_figure, full_name, show
from balloonlab.measure.report import NAME, Report, Spread, read_report
from balloonlab.measure.scenario import ARMS, Arm
from balloonlab.measure.statistics import reaches, runs_for
from balloonlab.options import Commands
from balloonlab.progress import Progress
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS

_HEADINGS = ("figure", "old", "new", "shift", "interval", "verdict")


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "compare",
        help="compare two results of balloonlab measure",
        description="Compare two results of balloonlab measure. Exit status: 0 nothing is worse, 1 a figure is, or is missing "
        "in NEW, or a run of NEW did not come to its end, or failed a check or a budget. Fewer figures need fewer runs: name "
        "those that matter.",
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="run folder, or its result.json")
    parser.add_argument("new", type=Path, metavar="NEW", help="the same")
    parser.add_argument(
        "--arm", choices=ARMS, help="which arm of both (default: ours, or the first that both have)"
    )
    parser.add_argument(
        "--figure",
        action="append",
        default=[],
        metavar="NAME",
        help="only this figure, such as residual or return.peak; may be repeated (default: all of the whole run)",
    )
    parser.add_argument(
        "--threshold",
        default="5%",
        metavar="PERCENT",
        help="a difference of less, of the old median, is none (default: 5%%)",
    )
    parser.add_argument(
        "--confidence",
        default="95%",
        metavar="PERCENT",
        help="of all figures together (default: 95%%; needs four runs on both sides for one figure, six for twenty)",
    )
    parser.add_argument(
        "--force", action="store_true", help="compare different scenarios or accelerators too"
    )
    parser.add_argument("--json", action="store_true", help="exact values")
    add_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Compare. Returns the exit status. Raises UsageError."""
    bar = Bar(_share(options.threshold, "--threshold"), _confidence(options.confidence))
    names = list(dict.fromkeys(map(full_name, options.figure)))
    old = read_report(options.old)
    bisecting = options.exit_style == "bisect"
    if bisecting and not (options.new / NAME if options.new.is_dir() else options.new).exists():
        progress.say(f"{options.new} has no result: this commit cannot be judged")
        return SKIP
    new = read_report(options.new)
    _refuse_other_scenario(old, new, options)
    arm = _arm(old, new, options.arm)
    if bisecting:
        came_up = [run for run in new.runs if run.arm == arm and booted(run)]
        new = msgspec.structs.replace(new, runs=came_up, planned=len(came_up))
        if not new.runs:
            progress.say("the guest of NEW never came up: this commit cannot be judged")
            return SKIP
    comparison = compare(old, new, arm, names, bar)
    if options.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(comparison), indent=2).decode() + "\n")
    else:
        _show(comparison, progress)
    return EXIT_CHECK_FAILED if comparison.regressed else EXIT_PASS


def _share(text: str, option: str) -> float:
    """Return the share that a percentage is. Raises UsageError."""
    matched = re.fullmatch(r"\s*([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*%?\s*", text)
    if matched is None:
        raise UsageError(f"{option} {text} is no percentage: write it like 5%")
    return float(matched[1]) / 100


def _confidence(text: str) -> float:
    """Return a confidence as a share, of 95% or 0.95. Raises UsageError."""
    share = _share(text, "--confidence")
    share = share if "%" in text else share * 100
    if not 0.5 <= share <= 0.999:
        raise UsageError(f"--confidence {text}: give 50% to 99.9%, or 0.5 to 0.999")
    return share


def _refuse_other_scenario(old: Report, new: Report, options: argparse.Namespace) -> None:
    differing = measured_otherwise(old, new)
    if differing and not options.force:
        raise UsageError(
            f"OLD and NEW did not measure the same ({'; '.join(differing)}): measure one of them again, "
            "or compare all the same with --force"
        )


def _arm(old: Report, new: Report, chosen: Arm | None) -> Arm:
    """Return the arm to compare. Raises UsageError where not both have it."""
    there = [arm for arm in ARMS if all(any(run.arm == arm for run in one.runs) for one in (old, new))]
    if not there:
        raise UsageError(
            "OLD and NEW have no arm in common: measure one of them again with the other's --arm"
        )
    if chosen is not None and chosen not in there:
        raise UsageError(f"--arm {chosen} is not in both: choose one of {', '.join(there)}")
    return chosen or there[0]


def _show(comparison: Comparison, progress: Progress) -> None:
    rows = [_row(one, comparison.confidence) for one in comparison.figures]
    if progress.console.is_terminal:
        table = Table(*_HEADINGS, box=None, pad_edge=False)
        for one, row in zip(comparison.figures, rows, strict=True):
            table.add_row(*row, style=_STYLES.get(one.verdict))
        progress.console.print(table)
    else:
        widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
        for row in (_HEADINGS, *rows):
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
            progress.say("  ".join(cells).rstrip())
    for line in _sentences(comparison):
        progress.say(line)


_STYLES = {"worse": "red", "better": "green", "same": "dim", "not-measured": "dim"}


def _row(one: Difference, asked: float) -> tuple[str, ...]:
    figure = find_figure(one.figure)
    if one.difference is None or one.old is None:
        return (one.figure, _median(figure, one.old), _median(figure, one.new), "-", "-", one.verdict)
    change = _signed(figure, one.difference) if one.difference else "none"
    if one.difference and one.old.median:
        change += f" ({100 * one.difference / abs(one.old.median):+.1f} %)"
    return (
        one.figure,
        _median(figure, one.old),
        _median(figure, one.new),
        change,
        _interval(figure, one),
        one.verdict,
    )


def _median(figure: Figure, values: Spread | None) -> str:
    return "-" if values is None else show(figure, values.median)


def _signed(figure: Figure, value: float) -> str:
    return f"{'+' if value > 0 else ''}{show(figure, value)}"


def _interval(figure: Figure, one: Difference) -> str:
    if one.low is None or one.high is None or one.confidence is None:
        return "one run: none"
    return f"{_signed(figure, one.low)} to {_signed(figure, one.high)} at {100 * one.confidence:.0f} %"


def _sentences(comparison: Comparison) -> list[str]:
    """Return what else is to be said, the verdict last."""
    lines = [f"differs     {line}" for line in comparison.conditions]
    lines += [f"note        {line}" for line in _notes(comparison)]
    lines += [f"failure     {line}" for line in comparison.failures]
    worse = [one.figure for one in comparison.figures if one.verdict == "worse"]
    if not comparison.regressed:
        open_ones = [one.figure for one in comparison.figures if _is_open(one)]
        if not open_ones:
            return [*lines, "NEW is no worse than OLD."]
        return [
            *lines,
            f"Nothing shows that NEW is worse than OLD; without confidence: {', '.join(open_ones)}.",
        ]
    return [*lines, f"NEW is WORSE than OLD: {', '.join(worse) or comparison.failures[0]}."]


def _is_open(one: Difference) -> bool:
    return one.verdict == "no-confidence" and find_figure(one.figure).better != "neither"


def _notes(comparison: Comparison) -> list[str]:
    """Return which confidence the runs could not give, and what comes of it."""
    reached = [one.confidence for one in comparison.figures if one.difference is not None]
    least = min((one for one in reached if one is not None), default=1.0)
    if None in reached:
        text = "one run on a side gives no confidence"
    elif reaches(least, comparison.each):
        return []
    else:
        text = f"so few runs give {100 * least:.4g} % at most, not {100 * comparison.each:.4g} %"
    if comparison.judged == 1:
        return [f"{text}: measure with --repeat {runs_for(comparison.each)}"]
    return [
        f"{text}: of what was not named, only a shift that runs of one guest never had is called better or worse",
        f"measure with --repeat {runs_for(comparison.each)} for {100 * comparison.confidence:.4g} % of all together",
    ]
