"""The HTML report as a reader that is not ours sees it: well formed, whole, in need of nothing, and closed to guests' text.

Properties, whatever a guest or who names things writes: 1. the page is well formed by HTML's own rules and has no element
and no attribute that a page of ours has not; 2. its text has what was written, printable; 3. its data are what was drawn.
Of thinning: 4. at most as many as asked for, in order, of those that were there; 5. first, last, least and most are kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloonlab.measure.elements import REPLACEMENT, clean, document, element
from balloonlab.measure.evidence import Evidence, console_tail, read_evidence
from balloonlab.measure.html import page
from balloonlab.measure.page_data import Drawn, drawn, embedded, thin
from balloonlab.measure.report import Check, Histogram, Report
from balloonlab.timeline import Sample
from tests import measured

ANY = st.text(max_size=40) | st.sampled_from(
    [
        measured.HOSTILE,
        "</script>",
        "<!--",
        "]]>",
        "\"'><svg onload=x>",
        "&amp;",
        "</pre>",
        "javascript:x",
        "\x00\r\f",
    ]
)


def parsed(text: str) -> Element:
    """Return the tree of a page that HTML's own rules find no fault with."""
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    tree: Element = parser.parse(text)
    return tree


def shape(tree: Element) -> set[tuple[str, str]]:
    """The kinds of elements with the names of their attributes."""
    names = [(str(of.tag), str(name)) for of in tree.iter() for name in ["", *of.attrib]]
    return set(names)


def find(tree: Element, tag: str, **wanted: str) -> list[Element]:
    return [
        of for of in tree.iter(tag) if all(of.get(name.rstrip("_")) == text for name, text in wanted.items())
    ]


def text_of(of: Element) -> str:
    return " ".join("".join(of.itertext()).split())


@pytest.fixture
def failed(tmp_path: Path) -> tuple[Report, list[Evidence]]:
    report = measured.failed_report()
    return report, read_evidence(report, measured.write_failed(tmp_path))


def test_the_page_needs_nothing_but_itself(failed: tuple[Report, list[Evidence]]) -> None:
    tree = parsed(page(*failed))
    assert {name for _, name in shape(tree)}.isdisjoint({"src", "href", "style", "srcset", "action"})
    assert {tag for tag, _ in shape(tree)}.isdisjoint({"link", "img", "iframe", "object", "base"})
    css = text_of(find(tree, "style")[0])
    assert "url(" not in css
    assert "@import" not in css


def test_only_its_own_script_and_style_may_run(failed: tuple[Report, list[Evidence]]) -> None:
    tree = parsed(page(*failed))
    (policy,) = [meta.get("content", "") for meta in tree.iter("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'; ")
    data, script = tree.iter("script")
    assert (data.get("type"), script.get("type")) == ("application/json", None)
    (style,) = tree.iter("style")
    digests = [
        base64.b64encode(hashlib.sha256((of.text or "").encode()).digest()).decode() for of in (style, script)
    ]
    assert re.findall(r"'sha256-([^']+)'", policy) == digests


def test_the_page_says_what_is_wrong_first(failed: tuple[Report, list[Evidence]]) -> None:
    tree = parsed(page(*failed))
    assert text_of(find(tree, "header")[0]).endswith("failed: 3 of 5 runs, 1 budget broken")
    wrong = [text_of(item) for item in find(tree, "ul")[0]]
    assert wrong[0] == "vhost-user-balloon run 2: the guest panicked: it said nothing for 60 s"
    assert wrong[-2].endswith("residual_bytes is 99 MiB, the budget is at most 64 MiB: 35 MiB (55 %) over")
    heads = [text_of(title) for title in tree.iter("h2")]
    assert heads == [
        "What is wrong",
        "What is not proved",
        "Budgets",
        "What the host holds of guest RAM",
        "Figures",
        "Release latency",
        "Runs",
        "Scenario and machine",
    ]


def test_every_run_is_shown_and_those_that_failed_are_open(failed: tuple[Report, list[Evidence]]) -> None:
    report, evidence = failed
    tree = parsed(page(report, evidence))
    (runs,) = find(tree, "table", class_="numbers runs")
    assert len(list(runs.iter("tr"))) == 1 + len(report.runs)
    opened = [text_of(details[0]) for details in tree.iter("details") if details.get("open") is not None]
    assert opened == [
        "vhost-user-balloon run 2: the guest panicked: it said nothing for 60 s; failed: console; 4 findings",
        "vhost-user-balloon run 3: measured to the end; failed: console; 2 findings",
        "no reporting run 2: the guest hung: it said nothing for 60 s; 0 findings",
    ]
    consoles = [(of.text or "").splitlines() for of in find(tree, "pre", class_="console")]
    assert consoles[1][-1] == measured.PANIC.splitlines()[-1]
    assert "</pre></details><img src=x onerror=alert(1)>" in consoles[2]


def test_figures_have_a_dot_for_every_run_that_was_measured() -> None:
    report = measured.report()
    (own, of_phases) = find(parsed(page(report)), "table", class_="numbers figures")
    assert len(list(of_phases.iter("tr"))) == 1 + 4
    (row,) = [row for row in own.iter("tr") if text_of(row).startswith("residual_bytes")]
    assert [sum(1 for _ in cell.iter("{http://www.w3.org/2000/svg}circle")) for cell in row] == [
        0,
        3,
        3,
        3,
        0,
    ]
    assert text_of(row).endswith("at most 64 MiB")


def test_a_run_that_does_not_count_is_shown_but_not_among_the_others() -> None:
    extra = msgspec.structs.replace(measured.run(number=3), counted=False)
    report = measured.report([measured.run(), measured.run(number=2), extra])
    evidence = [Evidence(run, tuple(measured.samples("ours", run.number))) for run in report.runs]
    tree = parsed(page(report, evidence))
    (own, _) = find(tree, "table", class_="numbers figures")
    (row,) = [row for row in own.iter("tr") if text_of(row).startswith("residual_bytes")]
    assert sum(1 for _ in row.iter("{http://www.w3.org/2000/svg}circle")) == 2
    assert [run.number for run in drawn(report, evidence).runs] == [1, 2]
    assert "vhost-user-balloon run 3 (its figures do not count)" in text_of(tree)


def test_latencies_are_added_up_and_a_run_without_any_is_none() -> None:
    text = text_of(parsed(page(measured.report())))
    assert "192 reports of 3 runs" in text
    empty = msgspec.structs.replace(measured.run(), release_latency=Histogram(bounds=[0.1], counts=[0, 0]))
    assert "Release latency" not in text_of(parsed(page(measured.report([empty]))))


def test_the_drawn_data_are_the_samples(failed: tuple[Report, list[Evidence]]) -> None:
    report, evidence = failed
    (data,) = find(parsed(page(report, evidence)), "script", id="data")
    shown = msgspec.json.decode(data.text or "", type=Drawn)
    assert shown == drawn(report, evidence)
    assert shown.align == "return"
    assert [run.ended for run in shown.runs] == ["", "", "", "the guest panicked", "the guest hung"]
    assert shown.runs[0].times == [round(sample.seconds * 1000) for sample in evidence[0].samples]
    assert shown.runs[0].held == [sample.footprint_bytes // 1024 for sample in evidence[0].samples]


def test_a_report_without_anything_is_a_page() -> None:
    text = text_of(parsed(page(measured.report([]))))
    assert "No run has left a timeline." in text


CHECKS = st.builds(Check, name=ANY, outcome=st.sampled_from(["pass", "fail", "skip"]), message=ANY)
PLAIN = measured.report(
    [
        msgspec.structs.replace(
            measured.run(ending="panicked", console="BUG: x"),
            checks=[Check(name="a", outcome="fail", message="b")],
        )
    ]
)
SAMPLES = tuple(measured.samples(until="floor")[:20])
PLAIN_SHAPE = shape(parsed(page(PLAIN, [Evidence(PLAIN.runs[0], SAMPLES, ("x",))])))


@st.composite
def reports(draw: st.DrawFn) -> Report:
    """What PLAIN is, with other texts."""
    run = measured.run(ending="panicked", console="BUG: " + draw(ANY))
    checks = [Check(name=draw(ANY), outcome="fail", message=draw(ANY))]
    own = msgspec.structs.replace(
        run, why=draw(ANY), checks=checks, figures={draw(ANY): 1.0}, kernel=draw(ANY)
    )
    phases = [msgspec.structs.replace(phase, name=draw(ANY)) for phase in run.phases]
    own = msgspec.structs.replace(own, phases=phases, qemu_argv=[draw(ANY)])
    changed = measured.report([own], kernel=draw(ANY), environment={"a": draw(ANY)})
    return msgspec.structs.replace(
        changed, scenario=msgspec.structs.replace(changed.scenario, name=draw(ANY))
    )


@given(reports(), ANY)
def test_no_text_becomes_markup(report: Report, console: str) -> None:
    made = page(report, [Evidence(report.runs[0], SAMPLES, console_tail(console))])
    tree = parsed(made)
    assert shape(tree) <= PLAIN_SHAPE
    assert len(list(tree.iter("script"))) == 2
    (data,) = find(tree, "script", id="data")
    assert json.loads(data.text or "")["runs"][0]["arm"] == "ours"
    assert re.search(r"[^\n\S ]|[\x00-\x08\x7f-\x9f]", made) is None


@given(st.text())
def test_a_text_is_seen_as_it_was_or_marked(text: str) -> None:
    made = document(
        element(
            "html", element("head", element("title", "t")), element("body", element("p", text, title=text))
        )
    )
    (paragraph,) = parsed(made).iter("p")
    assert (paragraph.text or "") == paragraph.get("title") == clean(text)
    assert all(b in (a, REPLACEMENT) for a, b in zip(text, clean(text), strict=True))


@given(ANY)
def test_embedded_data_cannot_end_their_script(name: str) -> None:
    made = embedded(Drawn(arms={"ours": name}, align=name, runs=[]))
    assert re.search("[<>&]", made) is None
    assert msgspec.json.decode(made)["align"] == name


RUNS = st.lists(st.integers(0, 1 << 30), min_size=1, max_size=200).map(
    lambda held: [Sample(float(number), "x", bytes_) for number, bytes_ in enumerate(held)]
)


@given(RUNS, st.integers(4, 60))
def test_a_thinned_run_has_what_matters(run: list[Sample], most: int) -> None:
    kept = thin(run, most)
    assert len(kept) <= most
    assert kept == [sample for sample in run if sample in kept]
    assert (kept[0], kept[-1]) == (run[0], run[-1])
    held = [sample.footprint_bytes for sample in run]
    assert {min(held), max(held)} <= {sample.footprint_bytes for sample in kept}


@pytest.mark.full
def test_a_browser_draws_every_run(failed: tuple[Report, list[Evidence]], tmp_path: Path) -> None:
    """Headless Chromium, where there is one: it is no part of what this project needs."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("not run: there is no Chromium here")
    path = tmp_path / "report.html"
    path.write_text(page(*failed))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, *options, profile, path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout
    assert len(re.findall(r'<path d="M[^"]+" class="run ', shown)) == len(failed[0].runs)
    assert len(re.findall(r'class="early"', shown)) == 2
    assert "This picture needs JavaScript" not in shown
    assert "<title>standard: failed: 3 of 5 runs, 1 budget broken</title>" in shown
