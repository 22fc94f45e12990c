"""From runs to arms and to whether all passed: what is counted, what is judged, what fails."""

from __future__ import annotations

import msgspec
import pytest

from balloonlab.measure.report import Check, Ending, Run
from balloonlab.measure.scenario import Budget
from balloonlab.measure.summary import arm_results, passed
from tests import measured

MIB = 1 << 20
BUDGET = (Budget(figure="residual_bytes", most=100.0),)


def run(number: int = 1, residual: float | None = 90.0, **changes: object) -> Run:
    one = msgspec.structs.replace(
        measured.run("ours", number), figures={"residual_bytes": residual, "t90_seconds": None}
    )
    return msgspec.structs.replace(one, **changes)


def test_medians_are_of_the_runs_of_an_arm_that_are_whole_and_count() -> None:
    runs = [
        run(1, 10.0),
        run(2, 20.0),
        run(3, 90.0, ending="no-driver"),
        run(4, 1000.0, ending="hung"),
        run(5, 1000.0, counted=False),
        run(6, None),
        run(7, 1000.0, arm="off"),
    ]
    ours, qemu, off = arm_results(("ours", "qemu", "off"), runs, BUDGET)
    assert [ours.arm, qemu.arm, off.arm] == ["ours", "qemu", "off"]
    assert list(ours.figures) == ["residual_bytes"]
    spread = ours.figures["residual_bytes"]
    assert (spread.median, spread.least, spread.most, spread.runs) == (20.0, 10.0, 90.0, 3)
    assert (qemu.figures, off.figures["residual_bytes"].median) == ({}, 1000.0)


def test_budgets_are_for_the_first_arm_and_by_its_median() -> None:
    runs = [run(1, 90.0), run(2, 95.0), run(3, 400.0), run(1, 500.0, arm="off")]
    ours, off = arm_results(("ours", "off"), runs, BUDGET)
    assert [check.outcome for check in ours.checks] == ["pass"]
    assert off.checks == []
    (first, _) = arm_results(("off", "ours"), runs, BUDGET)
    assert [check.outcome for check in first.checks] == ["fail"]


def test_what_nothing_measured_breaks_its_budget() -> None:
    (ours,) = arm_results(("ours",), [], BUDGET)
    assert [check.outcome for check in ours.checks] == ["fail"]


FAILED = Check(name="verify-holes", outcome="fail", message="lost")
SKIPPED = Check(name="verify-dump", outcome="skip", message="no room")


@pytest.mark.parametrize(
    ("ending", "checks", "counted", "expected"),
    [
        ("measured", [], True, True),
        ("measured", [SKIPPED], True, True),
        ("measured", [FAILED], True, False),
        ("measured", [FAILED], False, False),
        ("no-driver", [], True, False),
        ("hung", [], False, False),
    ],
)
def test_each_run_has_to_be_measured_with_no_check_failed(
    ending: Ending, checks: list[Check], counted: bool, expected: bool
) -> None:
    runs = [run(1), run(2, ending=ending, checks=checks, counted=counted)]
    assert passed(runs, arm_results(("ours",), runs, BUDGET), 2) is expected


def test_a_run_that_is_missing_and_a_budget_that_is_broken_fail() -> None:
    runs = [run(1)]
    assert passed(runs, arm_results(("ours",), runs, BUDGET), 1)
    assert not passed(runs, arm_results(("ours",), runs, BUDGET), 2)
    over = [run(1, 101.0)]
    assert not passed(over, arm_results(("ours",), over, BUDGET), 1)
