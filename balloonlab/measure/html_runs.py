"""The HTML report's runs: a table of all, and for each what it did phase by phase, what was checked, and its console.

Pure. Used by html.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from balloonlab.measure import words
from balloonlab.measure.elements import Content, element, table
from balloonlab.measure.html_figures import arm_name
from balloonlab.measure.report import PhaseResult, Report, Run
from balloonlab.printable import printable

_COLUMNS = (
    "boot_seconds",
    "floor_bytes",
    "peak_bytes",
    "residual_bytes",
    "t90_seconds",
    "footprint_gib_minutes",
)
_TEXT_CHARACTERS = 1000
_WORDS = {None: "-", True: "yes", False: "no"}


def runs_table(report: Report) -> Element:
    """Return one row a run, with the figures that a run is known by."""
    heads = [name.rpartition("_")[0].replace("_gib", "").replace("_", " ") for name in _COLUMNS]
    rows: list[list[Content]] = [
        [
            element("span", arm_name(run.arm), f" {words.run_name(run)}"),
            _words_cell(words.outcome(run), passed=run.passed),
            *(words.value(name, run.figures.get(name)) for name in _COLUMNS),
        ]
        for run in report.runs
    ]
    return table(["run", "ended", *heads], rows, class_="numbers runs")


def _words_cell(text: str, *, passed: bool) -> Element:
    return element("span", printable(text, _TEXT_CHARACTERS), class_="pass" if passed else "fail")


def run_details(run: Run, console: Sequence[str]) -> Element:
    """Return all that is known of a run, closed unless it failed."""
    made = element(
        "details", element("summary", arm_name(run.arm), f" {words.run_name(run)}: ", _summary(run))
    )
    if not run.passed:
        made.set("open", "")
    for section in (_phases(run), _checks(run), _findings(run), *_console(console), *_command_lines(run)):
        made.append(section)
    return made


def _summary(run: Run) -> Element:
    found = words.plural(len(run.findings), "finding")
    return _words_cell(f"{words.outcome(run)}; {found}", passed=run.passed)


def _phases(run: Run) -> Element:
    if not run.phases:
        return element("p", "No phase came to its end.")
    head = ["phase", "does", "begins", "takes", "footprint", "peak", "at its end", "settled"]
    return table(head, [_phase(phase) for phase in run.phases], class_="numbers")


def _phase(phase: PhaseResult) -> list[Content]:
    return [
        printable(phase.name, 80),
        phase.do,
        f"{phase.begin:.2f} s",
        words.value("phase.seconds", phase.seconds),
        words.value("phase.footprint_gib_minutes", phase.footprint_gib_minutes),
        words.value("phase.peak_bytes", phase.peak_bytes),
        words.value("phase.end_bytes", phase.end_bytes),
        _WORDS[phase.settled],
    ]


def _checks(run: Run) -> Element:
    made = element("ul")
    for check in run.checks:
        outcome = element("span", check.outcome, class_=check.outcome)
        message = f": {printable(check.message, _TEXT_CHARACTERS)}" if check.message else ""
        made.append(element("li", outcome, f" {printable(check.name, 200)}{message}"))
    return made


def _findings(run: Run) -> Element:
    made = element("ul")
    for finding in run.findings:
        kind = element("span", finding.kind, class_="skip" if finding.kind == "warning" else "fail")
        made.append(
            element("li", kind, f" at line {finding.line} of {finding.file}: ", element("code", finding.text))
        )
    return made


def _console(console: Sequence[str]) -> list[Element]:
    if not console:
        return [element("p", "The console is empty.", class_="quiet")]
    return [
        element("p", "The end of the console:", class_="quiet"),
        element("pre", "\n".join(console), class_="console"),
    ]


def _command_lines(run: Run) -> list[Element]:
    lines = [shlex.join(argv) for argv in (run.qemu_argv, run.device_argv) if argv]
    return [element("p", element("code", line)) for line in lines]
