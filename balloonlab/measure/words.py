"""How results are called where people read them: arms, endings, figures with their values, the verdict.

Pure. Used by everything that shows a report, so that all of it says the same.
"""

from __future__ import annotations

from collections.abc import Iterable

from balloonlab.errors import UsageError
from balloonlab.measure.figures import FIGURES, Figure, find_figure, show
from balloonlab.measure.report import Ending, Finding, Report, Run, Spread
from balloonlab.measure.scenario import Arm, Budget
from balloonlab.printable import printable

# Of one reason within the verdict, which is a line; the check has all of it.
REASON_CHARACTERS = 200

ARM_NAMES: dict[Arm, str] = {
    "ours": "vhost-user-balloon",
    "qemu": "QEMU's virtio-balloon",
    "off": "no reporting",
}
ENDINGS: dict[Ending, str] = {
    "measured": "measured to the end",
    "panicked": "the guest panicked",
    "hung": "the guest hung",
    "no-driver": "the guest never loaded the balloon's driver",
    "out-of-memory": "the guest ran out of memory",
    "command-failed": "a command in the guest failed",
    "guest-ended": "the guest powered off before its time",
    "qemu-ended": "QEMU ended before its time",
    "device-ended": "the device ended before its time",
}


def ending(run: Run) -> str:
    """Return how a run ended, in words, with the reason where there is one."""
    words = ENDINGS[run.ending]
    return f"{words}: {run.why}" if run.why else words


def outcome(run: Run) -> str:
    """Return how a run ended and which of its checks failed."""
    failed = [check.name for check in run.checks if check.outcome == "fail"]
    return f"{ending(run)}; failed: {', '.join(failed)}" if failed else ending(run)


def run_name(run: Run) -> str:
    """Return which run of its arm it is; one that is no part of the figures says so."""
    return f"run {run.number}" if run.counted else f"run {run.number} (its figures do not count)"


def found(finding: Finding) -> str:
    """Return a finding in one line."""
    return f"{finding.kind} at line {finding.line} of {finding.file}: {finding.text}"


def figure_of(name: str) -> Figure | None:
    """Return the declaration of a figure; None for one that this version does not know."""
    try:
        return find_figure(name)
    except UsageError:
        return None


def value(name: str, number: float | None) -> str:
    """Return a figure's value as people read it."""
    figure = figure_of(name)
    if figure is not None:
        return show(figure, number)
    return "-" if number is None else f"{number:g}"


def ends(name: str, measured: Spread) -> str:
    """Return the least and the most of an arm; nothing where they look alike."""
    least, most = value(name, measured.least), value(name, measured.most)
    return "" if least == most else f"{least} to {most}"


def spread(name: str, measured: Spread | None) -> str:
    """Return the median of an arm, with the ends where they look different."""
    if measured is None:
        return "-"
    between = ends(name, measured)
    return value(name, measured.median) + (f" ({between})" if between else "")


def budget(rule: Budget) -> str:
    """Return what a budget asks for."""
    ends = (("at most", rule.most), ("at least", rule.least))
    return ", ".join(f"{word} {value(rule.figure, end)}" for word, end in ends if end is not None)


def ordered(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the figures of a run, in the order they are declared in, and those of phases, as they come."""
    known = {figure.name: rank for rank, figure in enumerate(FIGURES)}
    found = list(dict.fromkeys(names))
    own = [name for name in found if "." not in name]
    return sorted(own, key=lambda name: known.get(name, len(known))), [name for name in found if "." in name]


def figure_names(report: Report) -> tuple[list[str], list[str]]:
    """Return the names of all figures that some arm has: those of a run, those of phases."""
    return ordered(name for arm in report.arms for name in arm.figures)


def verdict(report: Report) -> str:
    """Return the first line of all that is written: passed or failed, of how much, and what was not proved."""
    skipped = unproved(report)
    return result(report) + (f"; not proved: {', '.join(skipped)}" if skipped else "")


def result(report: Report) -> str:
    """Return whether it passed or failed, and of how much."""
    runs = plural(len(report.runs), "run")
    if report.passed:
        return f"passed: {runs}, no budget broken"
    failed = sum(not run.passed for run in report.runs)
    broken = sum(check.outcome == "fail" for arm in report.arms for check in arm.checks)
    missing = max(0, report.planned - len(report.runs))
    parts = [f"{failed} of {runs}"] if failed else []
    parts += [f"{plural(broken, 'budget')} broken"] if broken else []
    parts += [f"{plural(missing, 'run')} not made"] if missing else []
    return f"failed: {', '.join(parts)}" if failed else f"failed: {', '.join(parts)} ({runs})"


def unproved(report: Report) -> list[str]:
    """Return the proofs of the runs that were asked for and not made, each with its reason."""
    return [
        f"{check.name} ({printable(check.message, REASON_CHARACTERS)})"
        for run in report.runs
        for check in run.checks
        if check.outcome == "skip"
    ]


def plural(number: int, what: str) -> str:
    """Return "1 run", "2 runs"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def subject(report: Report) -> str:
    """Return what was measured, on what."""
    guest = report.scenario.guest
    memory = show(find_figure("residual"), guest.memory)
    machine = f"{memory}, {plural(guest.cpus, 'CPU')}, {guest.machine}, {report.accelerator}"
    return f"{report.scenario.name}: Linux {report.kernel} ({machine}) on QEMU {report.qemu}, {report.seconds:.0f} s"
