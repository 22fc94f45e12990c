"""A report as JUnit XML, which Jenkins, GitLab and most pipelines show: a suite an arm, its cases from cases.py.

The form is that of Jenkins' xunit plugin (junit-10.xsd), which pytest calls xunit2: no properties in a case, text of a
run in its first case. Figures are properties of the suite, in their own units. Guests write some of the text: what XML 1.0
has no place for is replaced, and everything is bounded.

Pure. Used by outputs.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from balloonlab.measure import words
from balloonlab.measure.cases import Case, arms, cases
from balloonlab.measure.evidence import Evidence
from balloonlab.measure.report import Report, Run
from balloonlab.measure.scenario import Arm

# XML 1.0, 2.2: Char. References to the others are no way round it.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
REPLACEMENT = "\ufffd"
# A message is one line in a pipeline's list.
MESSAGE_CHARACTERS = 1000


def junit(report: Report, evidence: Sequence[Evidence] = ()) -> str:
    """Return the XML document. evidence: of the runs whose consoles are to be in it."""
    counted = cases(report)
    root = ElementTree.Element("testsuites", name=_text(f"balloonlab measure {report.scenario.name}"))
    root.attrib.update(_counts(counted), time=_seconds(report.seconds))
    consoles = {(of.run.arm, of.run.number): of.console for of in evidence}
    for arm in arms(report):
        suite = _suite(report, arm, [case for case in counted if case.arm == arm])
        for case in counted:
            if case.arm == arm:
                suite.append(_case(report, case, consoles))
        root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(report: Report, arm: Arm, counted: Sequence[Case]) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name=_text(f"{report.scenario.name} {arm}"))
    runs = [run for run in report.runs if run.arm == arm]
    suite.attrib.update(_counts(counted), skipped=str(_number(counted, "skip")))
    suite.attrib["time"] = _seconds(sum(_length(run) for run in runs))
    started = report.environment.get("started")
    if isinstance(started, str):
        suite.attrib["timestamp"] = _text(started)
    properties = ElementTree.SubElement(suite, "properties")
    for name, text in _properties(report, arm, runs):
        ElementTree.SubElement(properties, "property", name=_text(name), value=_text(text))
    return suite


def _properties(report: Report, arm: Arm, runs: Iterable[Run]) -> Iterable[tuple[str, str]]:
    """What was measured, the medians by the figures' names, and each run's by its number."""
    yield from (("kernel", report.kernel), ("qemu", report.qemu), ("accelerator", report.accelerator))
    for judged in report.arms:
        if judged.arm == arm:
            yield from ((name, f"{spread.median:.15g}") for name, spread in judged.figures.items())
    for run in (run for run in runs if run.counted):
        for name, value in run.figures.items():
            if value is not None:
                yield f"run {run.number} {name}", f"{value:.15g}"


def _counts(counted: Sequence[Case]) -> dict[str, str]:
    return {"tests": str(len(counted)), "failures": str(_number(counted, "fail")), "errors": "0"}


def _number(counted: Sequence[Case], outcome: str) -> int:
    return sum(case.outcome == outcome for case in counted)


def _case(
    report: Report, case: Case, consoles: dict[tuple[Arm, int], tuple[str, ...]]
) -> ElementTree.Element:
    element = ElementTree.Element("testcase", name=_text(case.name))
    element.attrib["classname"] = _text(f"{report.scenario.name}.{case.arm}")
    element.attrib["time"] = _seconds(_length(case.run) if case.ending and case.run is not None else 0.0)
    message = _text(case.message)[:MESSAGE_CHARACTERS]
    if case.outcome == "fail":
        kind = case.run.ending if case.ending and case.run is not None else case.name.split()[-1]
        failure = ElementTree.SubElement(element, "failure", message=message, type=_text(kind))
        failure.text = _text(case.message)
    elif case.outcome == "skip":
        ElementTree.SubElement(element, "skipped", message=message)
    if case.ending and case.run is not None:
        _add_console(element, case.run, consoles.get((case.run.arm, case.run.number), ()))
    return element


def _add_console(element: ElementTree.Element, run: Run, console: Sequence[str]) -> None:
    found = [words.found(finding) for finding in run.findings]
    tail = ["the end of the console:", *console] if console else []
    if found or tail:
        ElementTree.SubElement(element, "system-out").text = _text("\n".join([*found, *tail]))


def _length(run: Run) -> float:
    return sum(phase.seconds for phase in run.phases)


def _seconds(seconds: float) -> str:
    return f"{max(0.0, seconds):.3f}"


def _text(text: str) -> str:
    """Return what XML can hold, in one spelling of line ends."""
    return _NO_XML.sub(REPLACEMENT, text).replace("\r", REPLACEMENT)
