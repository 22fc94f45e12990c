"""What a person sees of a measurement: the table, the budgets, the verdict, what was not proved, and no guest's own tricks."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
from rich.console import Console

from balloonlab.measure.report import Check, Report, Run
from balloonlab.measure.screen import LINE_CHARACTERS, Screen
from balloonlab.progress import Progress
from tests import measured

FOLDER = Path("runs/x")
HOSTILE = "[/b] [red]x[/] \x1b]0;owned\x07\x1b[2J\nnext"
WIDE = 200


def shown_of(report: Report) -> str:
    output = io.StringIO()
    Screen(Progress(Console(file=output, width=WIDE)), 1, 1).conclude(report, FOLDER)
    return output.getvalue()


def shown_at_end_of(run: Run) -> list[str]:
    output = io.StringIO()
    Screen(Progress(Console(file=output, width=WIDE)), 1, 1).ended(run)
    return output.getvalue().splitlines()


def test_the_table_has_each_arm_and_the_verdict_comes_last() -> None:
    lines = [line.rstrip() for line in shown_of(measured.report()).splitlines() if line.strip()]
    assert lines[0].startswith("standard: Linux 6.12.95+deb12-cloud-amd64 (512 MiB, 1 CPU, q35, tcg)")
    assert lines[1].split() == ["figure", "ours", "qemu", "off"]
    assert "budget residual_bytes: kept" in lines
    assert lines[-1] == (f"passed: 9 runs, no budget broken. Figures, reports and pictures: {FOLDER}")


def test_a_broken_budget_says_by_how_much() -> None:
    lines = shown_of(measured.failed_report()).splitlines()
    assert any(line.endswith("the budget is at most 64 MiB: 35 MiB (55 %) over") for line in lines)


def test_names_and_kernels_are_shown_as_they_are_and_do_nothing() -> None:
    """A scenario is called as its file is, and a guest says what its kernel is."""
    scenario = msgspec.structs.replace(measured.SCENARIO, name=HOSTILE)
    shown = shown_of(measured.report([measured.run()], scenario=scenario, kernel=HOSTILE))
    assert "\x1b" not in shown
    escaped = r"[/b] [red]x[/] \x1b]0;owned\x07\x1b[2J\nnext"
    assert shown.count(escaped) == 2


def test_the_end_of_a_run_is_said_where_it_is_not_as_it_should_be() -> None:
    assert shown_at_end_of(measured.run()) == []
    hung = msgspec.structs.replace(measured.run(ending="hung"), why=HOSTILE + "x" * 10_000)
    (line,) = shown_at_end_of(hung)
    assert line.startswith("ours-1: the guest hung: [/b] [red]x[/] ")
    assert "\x1b" not in line
    assert len(line) == LINE_CHARACTERS


def test_checks_that_failed_or_were_skipped_are_said_also_of_a_run_that_passed() -> None:
    skipped = Check(name="verify-dump", outcome="skip", message="no room")
    run = msgspec.structs.replace(measured.run(), checks=[skipped])
    assert run.passed
    assert shown_at_end_of(run) == ["ours-1: verify-dump: not proved: no room"]
    failed = Check(name="verify-holes", outcome="fail", message="lost")
    run = msgspec.structs.replace(run, checks=[skipped, failed])
    assert "ours-1: verify-holes: lost" in shown_at_end_of(run)


def test_the_verdict_has_what_was_not_proved_and_why() -> None:
    skipped = Check(name="verify-dump", outcome="skip", message="a dump needs 512 MiB of disk")
    run = msgspec.structs.replace(measured.run(), checks=[skipped])
    last = shown_of(measured.report([run])).splitlines()[-1]
    assert last.startswith(
        "passed: 1 run, no budget broken; not proved: verify-dump (a dump needs 512 MiB of disk). "
    )
