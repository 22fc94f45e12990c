"""A report as one HTML page that needs nothing else: no network, no file beside it, and for all but one picture no script.

Guests write some of the text: the page is made of elements (elements.py), and its own policy lets no script run but the
one that is in it, by its digest. Where a server forbids scripts, as Jenkins does, tables and dots are still there.

Used by outputs.py; page.css and page.js are parts of it, html_figures.py and html_runs.py make its sections.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from xml.etree.ElementTree import Element

import msgspec

from balloonlab.measure import words
from balloonlab.measure.cases import Case, cases
from balloonlab.measure.elements import Content, add, document, element, raw, table
from balloonlab.measure.evidence import Evidence
from balloonlab.measure.html_figures import arm_name, figures_table, latencies
from balloonlab.measure.html_runs import run_details, runs_table
from balloonlab.measure.page_data import drawn, embedded
from balloonlab.measure.report import ArmResult, Check, Outcome, Report
from balloonlab.printable import printable

_MESSAGE_CHARACTERS = 1000
_OUTCOMES: dict[Outcome, str] = {"pass": "passed", "fail": "failed", "skip": "skipped"}


def page(report: Report, evidence: Sequence[Evidence] = ()) -> str:
    """Return the page. evidence: of the runs whose footprint and consoles are to be in it."""
    data = drawn(report, evidence)
    body = element(
        "body", _header(report), element("p", printable(words.subject(report), 300), class_="quiet")
    )
    add(body, *_wrong(report), *_budgets(report), *_timeline(anything=bool(data.runs)), *_figures(report))
    add(body, *_latencies(report), *_runs(report, evidence), *_setting(report))
    script = _own("page.js")
    body.append(raw("script", embedded(data), id="data", type="application/json"))
    body.append(raw("script", script))
    return document(element("html", _head(report, script), body, lang="en"))


def _own(name: str) -> str:
    return resources.files("balloonlab.measure").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _head(report: Report, script: str) -> Element:
    style = _own("page.css")
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'; form-action 'none'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{printable(report.scenario.name, 80)}: {words.result(report)}"),
        raw("style", style),
    )


def _header(report: Report) -> Element:
    title = element("h1", f"balloonlab measure: {printable(report.scenario.name, 80)}")
    kind = "pass" if report.passed else "fail"
    return element("header", title, element("span", words.result(report), class_=f"verdict {kind}"))


def _wrong(report: Report) -> list[Content]:
    return [*_listed(report, "fail", "What is wrong"), *_listed(report, "skip", "What is not proved")]


def _listed(report: Report, outcome: Outcome, title: str) -> list[Content]:
    found = [case for case in cases(report) if case.outcome == outcome]
    return [element("h2", title), element("ul", *(_failed(case) for case in found))] if found else []


def _failed(case: Case) -> Element:
    name = f"run {case.run.number}" if case.ending and case.run is not None else printable(case.name, 200)
    message = printable(case.message, _MESSAGE_CHARACTERS)
    return element("li", arm_name(case.arm), f" {name}: ", element("span", message, class_=case.outcome))


def _timeline(*, anything: bool) -> list[Content]:
    title = element("h2", "What the host holds of guest RAM")
    if not anything:
        return [title, element("p", "No run has left a timeline.", class_="quiet")]
    missing = element(
        "p", "This picture needs JavaScript; timeline.png beside this page does not.", id="missing"
    )
    caption = (
        "The first run of each arm is bold. Point at the picture for values; with the keyboard, the arrows."
    )
    return [
        title,
        element("div", id="controls"),
        element(
            "figure", element("div", id="chart"), missing, element("figcaption", caption), class_="chart"
        ),
    ]


def _figures(report: Report) -> list[Content]:
    own, of_phases = words.figure_names(report)
    if not own:
        return []
    note = "Medians of the runs that were measured, with least and most below. A dot is a run, the bar the median."
    sections: list[Content] = [
        element("h2", "Figures"),
        element("p", note, class_="quiet"),
        figures_table(report, own),
    ]
    if of_phases:
        title = element("summary", "Figures of each phase")
        sections.append(element("details", title, figures_table(report, of_phases)))
    return sections


def _latencies(report: Report) -> list[Content]:
    drawn = latencies(report)
    if not drawn:
        return []
    note = "From taking a report to its answer: for so long the guest's pages were on their way."
    return [element("h2", "Release latency"), element("p", note, class_="quiet"), *drawn]


def _runs(report: Report, evidence: Sequence[Evidence]) -> list[Content]:
    consoles = {(of.run.arm, of.run.number): of.console for of in evidence}
    details = [run_details(run, consoles.get((run.arm, run.number), ())) for run in report.runs]
    return [element("h2", "Runs"), runs_table(report), *details]


def _budgets(report: Report) -> list[Content]:
    rows = [_budget(report, arm, check) for arm in report.arms for check in arm.checks]
    if not rows:
        return []
    head = ["arm", "check", "asks for", "measured", "outcome", "by how much"]
    return [element("h2", "Budgets"), table(head, rows)]


def _budget(report: Report, arm: ArmResult, check: Check) -> list[Content]:
    """One row; what it asks for, where the check is one of a budget and not of something else."""
    asked = {rule.figure: words.budget(rule) for rule in report.scenario.budgets}
    figure = check.name.removeprefix("budget ")
    spread = arm.figures.get(figure)
    return [
        arm_name(arm.arm),
        printable(check.name, 200),
        asked.get(figure, ""),
        words.value(figure, spread.median) if spread is not None else "",
        element("span", _OUTCOMES[check.outcome], class_=check.outcome),
        printable(check.message, _MESSAGE_CHARACTERS),
    ]


def _setting(report: Report) -> list[Content]:
    """The scenario and the machine, as result.json has them."""
    return [
        element("h2", "Scenario and machine"),
        *(
            element("details", element("summary", title), element("pre", _json(value)))
            for title, value in (("scenario", report.scenario), ("machine and versions", report.environment))
        ),
    ]


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
