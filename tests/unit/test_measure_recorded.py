"""Measurements of real guests, recorded once: what was broken in them is found again, with the right exit status.

docs/scenarios/fragmented.toml on bookworm-backports under TCG: four runs with page_reporting_order 9; four with 10, which
gives memory that comes back in pieces of 5 MiB hardly back; one with virtio_balloon kept from being loaded. And the
standard scenario on the same kernel, twice ten runs on a quiet machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations
from pathlib import Path

import pytest
from msgspec.structs import replace

from balloonlab.cli import main
from balloonlab.measure.differences import Bar
from balloonlab.measure.differences import compare as judged
from balloonlab.measure.exit_style import exit_status
from balloonlab.measure.figures import FIGURES
from balloonlab.measure.report import Report, Run, read_report
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS

RECORDED = Path(__file__).parent / "recorded" / "measure"
GOOD, CRIPPLED, MISSING = (RECORDED / f"{name}.json" for name in ("order-9", "order-10", "no-driver"))


def compare(old: Path, new: Path, *options: str) -> int:
    # A scenario with another knob is another scenario: that is what was broken here on purpose.
    return main(["compare", str(old), str(new), "--force", *options])


@pytest.mark.parametrize("style", ["default", "bisect"])
@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (GOOD, GOOD, EXIT_PASS),
        (GOOD, CRIPPLED, EXIT_CHECK_FAILED),
        (GOOD, MISSING, EXIT_CHECK_FAILED),
        (CRIPPLED, GOOD, EXIT_PASS),
    ],
    ids=["same", "crippled", "no-driver", "mended"],
)
def test_compare_finds_what_is_worse(old: Path, new: Path, status: int, style: str) -> None:
    assert compare(old, new, "--exit-style", style) == status


def test_it_says_which_figure_and_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(GOOD, CRIPPLED, "--figure", "residual") == EXIT_CHECK_FAILED
    said = capsys.readouterr().out
    assert "254 MiB" in said
    assert "288 MiB" in said
    assert "+34 MiB" in said
    assert "worse" in said


@pytest.mark.parametrize(
    ("recorded", "over"), [(CRIPPLED, "16 MiB (6 %) over"), (MISSING, "20 MiB (7 %) over")]
)
def test_the_budget_was_broken_and_says_by_how_much(recorded: Path, over: str) -> None:
    report = read_report(recorded)
    (budget,) = report.arms[0].checks
    assert budget.outcome == "fail"
    assert "the budget is at most 272 MiB" in budget.message
    assert budget.message.endswith(over)
    assert exit_status("default", report) == exit_status("bisect", report) == EXIT_CHECK_FAILED


def test_the_good_ones_kept_theirs() -> None:
    report = read_report(GOOD)
    assert report.passed
    assert exit_status("bisect", report) == EXIT_PASS


# A kernel and itself

STANDARD, AGAIN = (RECORDED / f"{name}.json" for name in ("standard", "standard-again"))


def of_runs(report: Report, runs: Sequence[Run]) -> Report:
    arms = [replace(arm, checks=[]) for arm in report.arms]
    return replace(report, runs=list(runs), planned=len(runs), arms=arms)


def splits(size: int, *paths: Path) -> Iterator[tuple[Report, Report]]:
    """Yield every choice of so many runs and as many others, of the same guest."""
    report = read_report(paths[0])
    runs = [run for path in paths for run in read_report(path).runs]
    for old in combinations(range(len(runs)), size):
        for new in combinations([place for place in range(len(runs)) if place not in old], size):
            before, after = (of_runs(report, [runs[place] for place in side]) for side in (old, new))
            yield before, after


@pytest.mark.parametrize(
    ("size", "paths"),
    [(1, (STANDARD, AGAIN)), (1, (GOOD,)), (2, (GOOD,)), (1, (CRIPPLED,)), (2, (CRIPPLED,))],
)
def test_a_kernel_is_no_worse_than_itself(size: int, paths: tuple[Path, ...]) -> None:
    wrong = {
        (one.figure, one.verdict)
        for old, new in splits(size, *paths)
        for one in judged(old, new, "ours", [], Bar()).figures
        if one.verdict in ("worse", "better")
    }
    assert not wrong


def test_one_run_of_a_figure_that_is_named_is_no_coin_toss() -> None:
    first, second = (read_report(path) for path in (STANDARD, AGAIN))
    names = [figure.name for figure in FIGURES if first.runs[0].figures.get(figure.name) is not None]
    # The slowest boot and the quickest, and those next to them.
    runs = sorted([*first.runs, *second.runs], key=lambda run: run.figures["boot_seconds"] or 0.0)
    for old, new in permutations([*runs[:3], *runs[-3:]], 2):
        assert not judged(of_runs(first, [old]), of_runs(first, [new]), "ours", names, Bar()).regressed


def test_ten_runs_of_a_kernel_and_ten_more_are_the_same() -> None:
    assert compare(STANDARD, AGAIN) == compare(AGAIN, STANDARD) == EXIT_PASS


def test_one_run_on_each_side_is_enough_for_what_was_broken() -> None:
    good, crippled = read_report(GOOD), read_report(CRIPPLED)
    for old in good.runs:
        for new in crippled.runs:
            found = judged(of_runs(good, [old]), of_runs(crippled, [new]), "ours", [], Bar())
            assert "residual_bytes" in [one.figure for one in found.figures if one.verdict == "worse"]
