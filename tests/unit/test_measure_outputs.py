"""What is written into a run folder, what is read from there for it, and what is said where that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from balloonlab.errors import UsageError
from balloonlab.measure.console import findings
from balloonlab.measure.evidence import (
    CONSOLE,
    CONSOLE_BYTES,
    CONSOLE_CHARACTERS,
    CONSOLE_LINES,
    SEARCHED_BYTES,
    TIMELINE,
    console_tail,
    read_evidence,
    read_findings,
)
from balloonlab.measure.outputs import STEP_SUMMARY, write_outputs
from tests import measured

WRITTEN = {"junit.xml", "results.tap", "summary.md", "timeline.png", "report.html"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def no_warning(text: str) -> None:
    pytest.fail(text)


def test_all_of_it_is_written_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STEP_SUMMARY, raising=False)
    report = measured.failed_report()
    before = names(measured.write_failed(tmp_path))
    write_outputs(report, tmp_path, no_warning)
    assert names(tmp_path) - before == WRITTEN
    assert all((tmp_path / name).stat().st_size > 1000 for name in WRITTEN)


def test_writing_again_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STEP_SUMMARY, raising=False)
    report = measured.failed_report()
    measured.write_failed(tmp_path)
    write_outputs(report, tmp_path, no_warning)
    first = {name: (tmp_path / name).read_bytes() for name in WRITTEN}
    write_outputs(report, tmp_path, no_warning)
    assert {name: (tmp_path / name).read_bytes() for name in WRITTEN} == first


def test_the_step_summary_is_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = tmp_path / "step"
    step.write_text("what another command said\n")
    monkeypatch.setenv(STEP_SUMMARY, str(step))
    report = measured.report([measured.run()])
    folder = measured.write(report, tmp_path / "run")
    write_outputs(report, folder, no_warning)
    assert step.read_text() == f"what another command said\n{(folder / 'summary.md').read_text()}\n"


def test_a_step_summary_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STEP_SUMMARY, str(tmp_path))
    report = measured.report([measured.run()])
    folder = measured.write(report, tmp_path / "run")
    warnings: list[str] = []
    write_outputs(report, folder, warnings.append)
    assert warnings == [f"{STEP_SUMMARY}={tmp_path}: Is a directory: correct or unset it"]
    assert names(folder) >= WRITTEN


def test_a_run_that_left_nothing_is_shown_with_nothing(tmp_path: Path) -> None:
    report = measured.report([measured.run()])
    (evidence,) = read_evidence(report, tmp_path)
    assert (evidence.run, evidence.samples, evidence.console) == (report.runs[0], (), ())


def test_samples_and_the_end_of_the_console_are_read(tmp_path: Path) -> None:
    report = measured.report([measured.run()])
    measured.write(report, tmp_path, consoles={"ours-1": measured.PANIC})
    (evidence,) = read_evidence(report, tmp_path)
    assert list(evidence.samples) == measured.samples()
    assert evidence.console == tuple(
        line.expandtabs(1).rstrip() for line in measured.PANIC.splitlines()[-CONSOLE_LINES:]
    )


def test_a_console_of_any_size_is_read_as_its_bounded_end(tmp_path: Path) -> None:
    report = measured.report([measured.run()])
    measured.write(report, tmp_path)
    console = tmp_path / "ours-1" / CONSOLE
    console.write_bytes(b"first\n" + b"\xff" * (1 << 20) + b"\nlast\r\n\r\n")
    (evidence,) = read_evidence(report, tmp_path)
    assert evidence.console == ("last",)
    console.write_bytes(b"".join(b"%d\n" % number for number in range(CONSOLE_BYTES)))
    (evidence,) = read_evidence(report, tmp_path)
    assert evidence.console == tuple(str(number) for number in range(CONSOLE_BYTES))[-CONSOLE_LINES:]


def test_a_console_is_shown_in_printable_bounded_lines() -> None:
    assert console_tail("a\x1b[1mb\r\nc\x00\n\n") == (r"a\x1b[1mb", r"c\x00")
    assert [len(line) for line in console_tail("x" * 10_000)] == [CONSOLE_CHARACTERS]
    assert console_tail("cut\nwhole", cut=True) == ("whole",)
    assert console_tail("") == console_tail("\r\n\n") == ()


def test_findings_of_a_file_are_those_of_its_text(tmp_path: Path) -> None:
    path = tmp_path / CONSOLE
    assert read_findings(path) == []
    for content in (b"", b"\xffBUG: a", measured.PANIC.encode(), b"x\n" * 9 + b"BUG: a\n"):
        path.write_bytes(content)
        assert read_findings(path) == findings(content.decode(errors="replace"))


@pytest.mark.parametrize("line", [b"x" * 4095 + b"\n", b"\n", b"x"])
def test_a_console_without_end_is_searched_at_both_ends(tmp_path: Path, line: bytes) -> None:
    """Of any size between, and with lines of any length; the number of a line is right all the same."""
    path = tmp_path / CONSOLE
    for size in (SEARCHED_BYTES - 1, 2 * SEARCHED_BYTES, 2 * SEARCHED_BYTES + 1, 3 * SEARCHED_BYTES + 12345):
        middle = line * (size // len(line))
        path.write_bytes(b"BUG: first\n" + middle + b"\nKernel panic - not syncing: last")
        found = [(finding.kind, finding.line) for finding in read_findings(path)]
        assert found == [("oops", 1), ("panic", 3 + middle.count(b"\n"))]


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STEP_SUMMARY, raising=False)
    report = measured.report([measured.run()])
    measured.write(report, tmp_path)
    timeline = tmp_path / "ours-1" / TIMELINE
    timeline.write_text("seconds,phase\n1,boot\n")
    wanted = r"timeline\.csv, line 1: it does not begin with .*: timeline\.csv cannot be shown, remove it or measure"
    with pytest.raises(UsageError, match=wanted):
        write_outputs(report, tmp_path, no_warning)
    timeline.unlink()
    (tmp_path / "junit.xml").mkdir()
    with pytest.raises(UsageError, match="Is a directory: make room there, or name another with --out"):
        write_outputs(report, tmp_path, no_warning)
    assert not [name for name in names(tmp_path) if name.endswith(".new")]
