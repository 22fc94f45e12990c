"""A report as Markdown, for a pipeline's step summary and for pasting: the verdict first, then what is wrong, then figures.

GitHub's flavour: tables, <details>, <pre>. Guests write some of the text, so everything that is not ours is escaped as
character references, which no Markdown reader takes for markup.

Pure. Used by outputs.py.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from balloonlab.measure import words
from balloonlab.measure.cases import Case, cases
from balloonlab.measure.evidence import Evidence
from balloonlab.measure.fitting import Part, fit
from balloonlab.measure.report import ArmResult, Report, Run
from balloonlab.measure.sparkline import sparkline
from balloonlab.printable import printable

# A step's summary is dropped above 1 MiB, and a step may measure more than once.
LIMIT_BYTES = 256 << 10
# What is said of one thing; escaping makes up to six times as much of it.
CELL_CHARACTERS = 300
VERDICT_CHARACTERS = 1000
# Consoles of more runs than anybody opens; the number bounds what cutting cannot.
CONSOLES = 30
SPARKLINE_CHARACTERS = 40

# Within a line: an underscore inside a word is none. And what would become a link by itself.
_MARKUP = re.compile(r"[\\`*\[\]<>&|~$@\"']|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
_RUN_FIGURES = ("boot_seconds", "floor_bytes", "peak_bytes", "residual_bytes", "t90_seconds")


def summary(report: Report, evidence: Sequence[Evidence] = ()) -> str:
    """Return the Markdown, of at most LIMIT_BYTES in UTF-8; where it would be longer, the longest parts are cut."""
    parts = [
        _verdict(report),
        _wrong(report),
        _unproved(report),
        _figures(report),
        _runs(report, evidence),
        _phases(report),
    ]
    return fit([*parts, *_consoles(report, evidence)], LIMIT_BYTES)


def escape(text: str, most: int = CELL_CHARACTERS) -> str:
    """Return text, bounded and in one line, as Markdown that shows it and does nothing else."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", printable(text, most))


def _verdict(report: Report) -> Part:
    mark = "✅" if report.passed else "❌"
    return Part(
        f"## {mark} balloonlab measure {escape(words.verdict(report), VERDICT_CHARACTERS)}\n\nScenario {escape(words.subject(report))}\n"
    )


def _wrong(report: Report) -> Part:
    failed = [case for case in cases(report) if case.outcome == "fail"]
    if not failed:
        return Part("")
    return Part("### What is wrong\n", tuple(_failed(case) for case in failed), "\n")


def _unproved(report: Report) -> Part:
    skipped = [case for case in cases(report) if case.outcome == "skip"]
    if not skipped:
        return Part("")
    return Part("### What is not proved\n", tuple(_failed(case) for case in skipped), "\n")


def _failed(case: Case) -> str:
    name = f"run {case.run.number}" if case.ending and case.run is not None else case.name
    return f"- **{case.arm}** {escape(name)}: {escape(case.message)}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(cells: Sequence[str], texts: int = 1) -> str:
    """texts: how many columns are not of numbers."""
    return f"{_row(cells)}\n{_row(['---'] * texts + ['---:'] * (len(cells) - texts))}"


def _figures(report: Report) -> Part:
    names, _ = words.figure_names(report)
    if not names:
        return Part("")
    budgets = {rule.figure: words.budget(rule) for rule in report.scenario.budgets}
    head = ["figure", *(words.ARM_NAMES[arm.arm] for arm in report.arms), *(["budget"] if budgets else [])]
    rows = [
        _row([*_figure(name, report.arms), *([escape(budgets.get(name, ""))] if budgets else [])])
        for name in names
    ]
    title = "### Figures\n\nMedians; least and most of the runs in brackets.\n"
    return Part(f"{title}\n{_head(head)}", tuple(rows), "\n")


def _figure(name: str, arms: Sequence[ArmResult]) -> list[str]:
    return [
        f"<code>{escape(name)}</code>",
        *(escape(words.spread(name, arm.figures.get(name))) for arm in arms),
    ]


def _runs(report: Report, evidence: Sequence[Evidence]) -> Part:
    samples = {(of.run.arm, of.run.number): of.samples for of in evidence}
    top = max((sample.footprint_bytes for taken in samples.values() for sample in taken), default=0)
    head = [
        "run",
        "ended",
        *(name.rpartition("_")[0].replace("_", " ") for name in _RUN_FIGURES),
        "footprint",
    ]
    rows = [
        _row(
            [*_run(run), f"`{sparkline(samples.get((run.arm, run.number), ()), top, SPARKLINE_CHARACTERS)}`"]
        )
        for run in report.runs
    ]
    scale = f", drawn up to {escape(words.value('peak_bytes', top))}" if top else ""
    title = f"### Runs\n\nFootprint: what the host holds of guest RAM, boot to end{scale}.\n"
    return Part(f"{title}\n{_head(head, 2)}", tuple(rows), "\n")


def _run(run: Run) -> list[str]:
    mark = "✅" if run.passed else "❌"
    values = [words.value(name, run.figures.get(name)) for name in _RUN_FIGURES]
    return [
        f"{mark} {run.arm} {words.run_name(run)}",
        escape(words.outcome(run)),
        *(escape(value) for value in values),
    ]


def _phases(report: Report) -> Part:
    _, names = words.figure_names(report)
    if not names:
        return Part("")
    head = _head(["figure", *(words.ARM_NAMES[arm.arm] for arm in report.arms)])
    opening = f"<details><summary>Figures of each phase</summary>\n\n{head}"
    return Part(opening, tuple(_row(_figure(name, report.arms)) for name in names), "\n</details>\n")


def _consoles(report: Report, evidence: Sequence[Evidence]) -> list[Part]:
    consoles = {(of.run.arm, of.run.number): of.console for of in evidence}
    of_interest = [run for run in report.runs if run.findings or run.ending != "measured"]
    parts = [_console(run, consoles.get((run.arm, run.number), ())) for run in of_interest[:CONSOLES]]
    left = len(of_interest) - len(parts)
    return [*parts, Part(f"{left} more runs have such consoles: report.html has them." if left else "")]


def _console(run: Run, console: Sequence[str]) -> Part:
    """One line of a <pre> each: nothing is markup there but what has an ampersand or an angle bracket."""
    title = (
        f"{run.arm} {words.run_name(run)}: {words.outcome(run)}; {words.plural(len(run.findings), 'finding')}"
    )
    found = [words.found(finding) for finding in run.findings]
    tail = ["the end of the console:", *console] if console else ["the console is empty"]
    opening = f"<details><summary>{escape(title)}</summary>\n\n<pre>"
    lines = tuple(html.escape(printable(line, 2 * CELL_CHARACTERS)) for line in [*found, *tail])
    return Part(opening, lines, "</pre>\n\n</details>\n")
