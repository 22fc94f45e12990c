"""JUnit XML and TAP as others read them: a schema, junitparser, tap.py; none of it reads our own code."""

from __future__ import annotations

from pathlib import Path

import junitparser
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree
from tap.line import Line
from tap.parser import Parser

from balloonlab.measure.cases import cases
from balloonlab.measure.evidence import Evidence, read_evidence
from balloonlab.measure.junit import junit
from balloonlab.measure.report import Check, Report
from balloonlab.measure.tap import tap
from tests import measured

SCHEMA = etree.RelaxNG(file=str(Path(__file__).parents[1] / "junit.rng"))
# What is wrong in failed_report(), with the arm's name in front.
FAILED = [
    "ours run 2 ends as measured",
    "ours run 2 console",
    "ours run 3 console",
    "ours budget residual_bytes",
    "off run 2 ends as measured",
]


def valid(document: str) -> etree._Element:
    """Return the root of a document that the schema takes."""
    root = etree.fromstring(document.encode())
    SCHEMA.assertValid(root)
    return root


def parsed(document: str) -> list[Line]:
    """Return the lines of a TAP document; there is none that the parser does not know."""
    lines = list(Parser().parse_text(document))
    assert {line.category for line in lines} <= {"version", "plan", "test"}
    return lines


@pytest.fixture
def failed(tmp_path: Path) -> tuple[Report, list[Evidence]]:
    report = measured.failed_report()
    return report, read_evidence(report, measured.write_failed(tmp_path))


def test_junit_is_what_its_schema_and_its_readers_take(failed: tuple[Report, list[Evidence]]) -> None:
    document = junit(*failed)
    valid(document)
    suites = junitparser.JUnitXml.fromstring(document.encode())
    assert [suite.name for suite in suites] == ["standard ours", "standard off"]
    assert (suites.tests, suites.failures, suites.errors) == (18, len(FAILED), 0)
    for suite in suites:
        told = (suite.tests, suite.failures, suite.skipped)
        assert told == (len(list(suite)), sum(c.is_failure for c in suite), sum(c.is_skipped for c in suite))
    found = [f"{suite.name.split()[-1]} {case.name}" for suite in suites for case in suite if case.is_failure]
    assert found == FAILED


def test_junit_says_what_is_wrong_and_shows_the_console(failed: tuple[Report, list[Evidence]]) -> None:
    root = valid(junit(*failed))
    broken = root.xpath("//testcase[@name='budget residual_bytes']/failure/@message")
    assert broken == ["residual_bytes is 99 MiB, the budget is at most 64 MiB: 35 MiB (55 %) over"]
    skipped = root.xpath("//testcase[@name='verify-dump']/skipped/@message")
    assert skipped == ["no room for a dump # of | the <guest>"]
    console = root.xpath("string(//testcase[@name='run 2 ends as measured']/system-out)")
    assert (
        "panic at line 122 of console.log: [    9.146768] Kernel panic - not syncing: sysrq triggered crash"
        in console
    )
    assert console.splitlines()[-1] == measured.PANIC.splitlines()[-1]


def test_a_warning_is_shown_and_fails_nothing() -> None:
    run = measured.run(console="WARNING: CPU: 0 PID: 1 at mm/x.c:1")
    root = valid(junit(measured.report([run])))
    assert root.get("failures") == "0"
    assert "warning at line 1 of console.log: WARNING: CPU: 0" in root.xpath("string(//system-out)")


def test_figures_are_exact_properties() -> None:
    run = measured.run()
    exact = msgspec.structs.replace(run, figures={"peak_bytes": float((1 << 44) + 4096), "t90_seconds": None})
    root = valid(junit(measured.report([exact])))
    values = {p.get("name"): p.get("value") for p in root.xpath("//property")}
    assert float(values["run 1 peak_bytes"]) == (1 << 44) + 4096
    assert float(values["peak_bytes"]) == (1 << 44) + 4096
    assert "run 1 t90_seconds" not in values


def test_a_run_that_does_not_count_is_judged_and_its_figures_are_no_properties() -> None:
    extra = msgspec.structs.replace(measured.run(number=2), counted=False)
    report = measured.report([measured.run(), extra])
    names = {of.get("name", "") for of in valid(junit(report)).xpath("//property")}
    assert any(name.startswith("run 1 ") for name in names)
    assert not any(name.startswith("run 2 ") for name in names)
    blocks = {line.description: line.yaml_block for line in parsed(tap(report)) if line.category == "test"}
    assert blocks["- ours run 1 ends as measured"]["figures"]
    assert blocks["- ours run 2 ends as measured"] is None


def test_tap_is_what_its_reader_takes(failed: tuple[Report, list[Evidence]]) -> None:
    document = tap(failed[0])
    version, plan, *tests = parsed(document)
    assert (version.category, plan.category) == ("version", "plan")
    assert plan.expected_tests == len(tests) == 18
    assert [test.number for test in tests] == list(range(1, 19))
    assert [test.description.removeprefix("- ") for test in tests if not test.ok] == FAILED
    assert [(test.description, test.directive.reason) for test in tests if test.skip] == [
        ("- ours verify-dump", "no room for a dump _ of | the <guest>")
    ]


def test_tap_has_the_figures_and_the_message(failed: tuple[Report, list[Evidence]]) -> None:
    by_name = {
        line.description: line.yaml_block for line in parsed(tap(failed[0])) if line.category == "test"
    }
    ending = by_name["- ours run 2 ends as measured"]
    assert ending["message"] == "the guest panicked: it said nothing for 60 s"
    assert ending["figures"] == failed[0].runs[1].figures
    broken = by_name["- ours budget residual_bytes"]
    assert broken["message"] == "residual_bytes is 99 MiB, the budget is at most 64 MiB: 35 MiB (55 %) over"


def test_the_console_of_a_run_is_a_case_whoever_judged_it() -> None:
    """A run's own check of that name stands; where there is none, the findings are judged."""
    run = measured.run(console=measured.PANIC)
    bare = msgspec.structs.replace(run, checks=[])
    own = msgspec.structs.replace(run, checks=[Check(name="console", outcome="skip", message="no console")])
    assert [case.outcome for case in cases(measured.report([bare])) if "console" in case.name] == ["fail"]
    assert [case.outcome for case in cases(measured.report([own])) if "console" in case.name] == ["skip"]


# Whatever a guest, or who names a scenario, writes: 1. JUnit is valid and has every case; 2. so has TAP, in the order of
# the cases, with their outcomes and their messages, and no line of its own making.
ANY = st.text(max_size=40) | st.sampled_from(
    [measured.HOSTILE, "not ok 1\nok 2", "]]>", "# SKIP", "\\#", "...", "\x85"]
)
CHECKS = st.builds(Check, name=ANY, outcome=st.sampled_from(["pass", "fail", "skip"]), message=ANY)


@st.composite
def reports(draw: st.DrawFn) -> Report:
    run = measured.run("ours", 1, ending=draw(st.sampled_from(["measured", "panicked"])), console=draw(ANY))
    own = msgspec.structs.replace(run, why=draw(ANY), checks=draw(st.lists(CHECKS, max_size=3)))
    changed = measured.report([own])
    scenario = msgspec.structs.replace(changed.scenario, name=draw(ANY))
    return msgspec.structs.replace(changed, scenario=scenario, kernel=draw(ANY))


@given(reports(), st.lists(ANY, max_size=3))
def test_junit_is_valid_whatever_is_in_it(report: Report, console: list[str]) -> None:
    root = valid(junit(report, [Evidence(report.runs[0], console=tuple(console))]))
    assert len(root.findall(".//testcase")) == int(root.get("tests", "")) == len(cases(report))


@given(reports())
def test_tap_is_whole_whatever_is_in_it(report: Report) -> None:
    _, plan, *tests = parsed(tap(report))
    counted = cases(report)
    assert plan.expected_tests == len(counted)
    assert [(test.ok, test.skip) for test in tests] == [
        (case.outcome != "fail", case.outcome == "skip") for case in counted
    ]
    messages = [test.yaml_block["message"] for test in tests if not test.ok]
    assert all(message.isprintable() for message in messages)
