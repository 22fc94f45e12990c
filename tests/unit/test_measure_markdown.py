"""The step summary as a Markdown reader that is not ours sees it, and its bounds.

Properties, whatever a guest or who names things writes: 1. it is LIMIT_BYTES at most; 2. the reader sees no HTML but our
own, and no table row with cells more or fewer than its head has; 3. a text that is escaped is seen as it was, printable.
Of fitting parts: 4. it stays below its limit where openings and closings do; 5. what fits is left as it is.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib
import msgspec
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from balloonlab.measure import words
from balloonlab.measure.cases import cases
from balloonlab.measure.evidence import Evidence, read_evidence
from balloonlab.measure.fitting import Part, fit, size
from balloonlab.measure.markdown import CONSOLES, LIMIT_BYTES, escape, summary
from balloonlab.measure.report import Check, Report
from balloonlab.measure.sparkline import sparkline
from balloonlab.printable import printable
from tests import measured

OURS = {"details", "summary", "pre", "code"}
# What Markdown itself makes of the rest.
RENDERED = OURS | {"html", "head", "body", "h2", "h3", "p", "ul", "li", "strong"} | {
    "table", "thead", "tbody", "tr", "th", "td"
}  # fmt: skip
ANY = st.text(max_size=60) | st.sampled_from(
    [
        measured.HOSTILE,
        "a|b",
        "```",
        "<b>x</b>",
        "&lt;",
        "[a](b)",
        "http://x.y",
        "$x$",
        "~~x~~",
        "</pre>",
        "\n\n# x",
    ]
)


def rendered(text: str) -> Element:
    """Return the page that a reader makes of Markdown, as a tree; what tags it has are checked."""
    page = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough").render(text)
    tree: Element = html5lib.parse(page, namespaceHTMLElements=False)
    assert {element.tag for element in tree.iter()} <= RENDERED
    return tree


def seen(tree: Element) -> str:
    return "".join(tree.itertext())


def test_the_verdict_comes_first_and_what_is_wrong_next() -> None:
    text = seen(rendered(summary(measured.failed_report())))
    lines = [line for line in text.splitlines() if line.strip()]
    assert lines[0] == "❌ balloonlab measure failed: 3 of 5 runs, 1 budget broken"
    assert lines[1].startswith(
        "Scenario standard: Linux 6.12.95+deb12-cloud-amd64 (512 MiB, 1 CPU, q35, tcg) on"
    )
    assert lines[2:4] == ["What is wrong", "ours run 2: the guest panicked: it said nothing for 60 s"]
    wrong = "ours budget residual_bytes: residual_bytes is 99 MiB, the budget is at most 64 MiB: 35 MiB (55 %) over"
    assert wrong in lines


def test_what_passed_has_nothing_wrong() -> None:
    text = summary(measured.report())
    assert text.startswith("## ✅ balloonlab measure passed: 9 runs, no budget broken\n")
    assert "What is wrong" not in text
    assert "<pre>" not in text


def test_the_verdict_says_what_of_it_was_not_as_it_should_be() -> None:
    run = measured.run()
    broken = [Check(name="budget t90_seconds", outcome="fail", message="x")]
    over = measured.report([run], passed=False, arms=[measured.arm_result("ours", [run], broken)])
    assert words.verdict(over) == "failed: 1 budget broken (1 run)"
    early = measured.report([run], passed=False, planned=3)
    assert words.verdict(early) == "failed: 2 runs not made (1 run)"
    assert words.verdict(measured.failed_report()) == "failed: 3 of 5 runs, 1 budget broken"


def test_what_was_not_proved_is_said_of_a_run_that_passed() -> None:
    """In the verdict, with its reason, and by itself; reasons have paths in them, and a path may be anything."""
    skipped = Check(name="verify-dump", outcome="skip", message="no room at /tmp/<b>`x`|")
    run = msgspec.structs.replace(measured.run(), checks=[skipped])
    text = seen(rendered(summary(measured.report([run]))))
    lines = [line for line in text.splitlines() if line.strip()]
    assert lines[0].endswith("no budget broken; not proved: verify-dump (no room at /tmp/<b>`x`|)")
    assert lines[2:4] == ["What is not proved", "ours run 1 verify-dump: no room at /tmp/<b>`x`|"]
    assert words.result(measured.report([run])) == "passed: 1 run, no budget broken"


def test_runs_that_were_not_made_are_a_case_that_failed() -> None:
    missing = [case for case in cases(measured.report([measured.run()], planned=3)) if case.outcome == "fail"]
    assert [(case.arm, case.name) for case in missing] == [("ours", "every planned run")]
    assert missing[0].message == "2 of 3 runs not made: the measurement was ended before"


def test_the_console_is_shown_where_there_is_something_to_see(tmp_path: Path) -> None:
    report = measured.failed_report()
    tree = rendered(summary(report, read_evidence(report, measured.write_failed(tmp_path))))
    titles = ["".join(title.itertext()) for title in tree.iter("summary")]
    assert titles == [
        "Figures of each phase",
        "ours run 2: the guest panicked: it said nothing for 60 s; failed: console; 4 findings",
        "ours run 3: measured to the end; failed: console; 2 findings",
        "off run 2: the guest hung: it said nothing for 60 s; 0 findings",
    ]
    panic, hostile, _ = ["".join(text.itertext()).splitlines() for text in tree.iter("pre")]
    assert panic[-1] == measured.PANIC.splitlines()[-1]
    assert "</pre></details><img src=x onerror=alert(1)>" in hostile


def test_a_summary_that_would_be_too_long_is_cut_where_it_is_longest() -> None:
    """Hundreds of runs whose consoles are full: verdict, what is wrong and figures are there, and it is said what is not."""
    console = tuple("<" * 400 for _ in range(80))
    runs = [measured.run("ours", number, ending="panicked") for number in range(1, 301)]
    report = measured.report(runs)
    text = summary(report, [Evidence(run, console=console) for run in runs])
    assert LIMIT_BYTES * 0.75 < len(text.encode()) <= LIMIT_BYTES
    assert len(list(rendered(text).iter("pre"))) == CONSOLES
    assert "lines are left out: report.html has them." in text
    assert f"{300 - CONSOLES} more runs have such consoles" in text
    assert text.startswith("## ❌ balloonlab measure failed: 300 of 300 runs")


CHECKS = st.builds(Check, name=ANY, outcome=st.just("fail"), message=ANY)


@st.composite
def reports(draw: st.DrawFn) -> Report:
    run = measured.run("ours", 1, ending=draw(st.sampled_from(["measured", "panicked"])), console=draw(ANY))
    figures = {draw(ANY): 1.5, "peak_bytes": 3.0}
    own = msgspec.structs.replace(
        run, why=draw(ANY), checks=draw(st.lists(CHECKS, max_size=3)), figures=figures
    )
    return measured.report([own], kernel=draw(ANY), qemu=draw(ANY))


@given(reports(), st.lists(ANY, max_size=4))
def test_no_text_gets_out_of_its_place(report: Report, console: list[str]) -> None:
    text = summary(report, [Evidence(report.runs[0], console=tuple(console))])
    assert len(text.encode()) <= LIMIT_BYTES
    tree = rendered(text)
    for table in tree.iter("table"):
        width = len(list(table.iter("th")))
        assert {len(list(row)) for row in table.iter("tr")} == {width}
    rows = [row for table in tree.iter("table") for row in table.iter("tr")]
    assert len(rows) == text.count("\n| ") - text.count("\n| ---")


@given(ANY)
def test_an_escaped_text_is_seen_as_it_was(text: str) -> None:
    tree = rendered(f"| a | b |\n| --- | --- |\n| x{escape(text)}x | y |\n")
    cells = ["".join(cell.itertext()) for cell in tree.iter("td")]
    assert cells == [f"x{printable(text, 300)}x", "y"]
    assert html.unescape(escape(text)) == printable(text, 300)


LINES = st.lists(st.text(max_size=100), max_size=50).map(tuple)
PARTS = st.lists(st.builds(Part, st.text(max_size=50), LINES, st.text(max_size=20)), min_size=1, max_size=6)
# Of an opening, a closing and a note, with four bytes a character.
LEAST = 6 * (4 * 70 + 100)


@given(PARTS, st.integers(LEAST, 20_000))
def test_what_is_fitted_is_below_the_limit(parts: Sequence[Part], limit: int) -> None:
    text = fit(parts, limit)
    assert len(text.encode()) <= limit
    assert all(part.opening in text and part.closing in text for part in parts)
    whole = sum(part.size for part in parts)
    assert ("Cut here" in text) == (whole > limit)


@given(PARTS)
def test_what_fits_is_left_as_it_is(parts: Sequence[Part]) -> None:
    kept = [text for part in parts for text in (part.opening, *part.lines, part.closing) if text]
    assert fit(parts, size(*kept)) == "".join(f"{text}\n" for text in kept)


def test_a_sparkline_is_as_wide_as_asked_for_and_as_high_as_the_footprint() -> None:
    run = measured.samples("off")
    top = max(sample.footprint_bytes for sample in run)
    line = sparkline(run, top, 40)
    assert len(line) == 40
    assert line[-1] == "█"
    assert line[:2] == " ▁"
    assert sparkline((), top, 40) == sparkline(run, 0, 40) == "-"
