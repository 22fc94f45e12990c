"""Measurements of real guests, recorded once: what was broken in them is found again, with the right exit status.

docs/scenarios/fragmented.toml on bookworm-backports under TCG: four runs with page_reporting_order 9; four with 10, which
gives memory that comes back in pieces of 5 MiB hardly back; one with virtio_balloon kept from being loaded.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from balloonlab.cli import main
from balloonlab.measure.exit_style import exit_status
from balloonlab.measure.report import read_report
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
