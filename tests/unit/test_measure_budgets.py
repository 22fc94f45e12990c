"""Budgets: what is read, what is joined, and what is said of a broken one."""

from __future__ import annotations

import pytest

from balloonlab.errors import UsageError
from balloonlab.measure.budgets import joined, judge, parse_budget
from balloonlab.measure.figures import FIGURES, Figure
from balloonlab.measure.report import Check
from balloonlab.measure.scenario import Budget

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("residual=64M", Budget(figure="residual_bytes", most=64.0 * MIB)),
        ("returned >= 400 MiB", Budget(figure="returned_bytes", least=400.0 * MIB)),
        ("t90<=1.5s", Budget(figure="t90_seconds", most=1.5)),
        ("t90_seconds=100ms", Budget(figure="t90_seconds", most=0.1)),
        ("return.peak=1G", Budget(figure="return.peak_bytes", most=1024.0 * MIB)),
        ("footprint=0.25", Budget(figure="footprint_gib_minutes", most=0.25)),
        ("command_status>=-15", Budget(figure="command_status", least=-15.0)),
    ],
)
def test_what_is_read(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is no budget: write it like residual=128M or 'returned>=400M'"),
        ("=5", "'=5' is no budget"),
        ("residual", "'residual' is no budget"),
        ("residual>5", "'residual>5' is no budget"),
        ("residual=", "'' is no size"),
        ("residual=5s", "'5s' is no size"),
        ("t90=5G", "'5G' is no duration"),
        ("reports=5M", "'5M' is no reports: give a number"),
        ("reports=nan", "reports cannot be as much as that"),
        ("reports=1e30", "reports cannot be as much as that"),
        ("release=1s", "there is no figure 'release', did you mean released. choose one of"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_budget(text)


def test_two_ends_are_one_budget() -> None:
    parts = [Budget(figure="a", most=5.0), Budget(figure="b", most=1.0), Budget(figure="a", least=2.0)]
    assert joined(parts) == (Budget(figure="a", most=5.0, least=2.0), Budget(figure="b", most=1.0))
    with pytest.raises(UsageError, match="a has two budgets: give each end once"):
        joined([*parts, Budget(figure="a", least=2.0)])


@pytest.mark.parametrize(
    ("budget", "value", "said"),
    [
        (
            Budget(figure="residual_bytes", most=64.0 * MIB),
            133.0 * MIB,
            "residual_bytes is 133 MiB, the budget is at most 64 MiB: 69 MiB (108 %) over",
        ),
        (
            Budget(figure="returned_bytes", least=400.0 * MIB),
            100.0 * MIB,
            "returned_bytes is 100 MiB, the budget is at least 400 MiB: 300 MiB (75 %) under",
        ),
        (
            Budget(figure="return.peak_bytes", least=1.0 * MIB, most=2.0 * MIB),
            0.0,
            "return.peak_bytes is 0 bytes, the budget is at least 1.0 MiB and at most 2.0 MiB: 1.0 MiB (100 %) under",
        ),
        (
            Budget(figure="t90_seconds", most=2.0),
            2.02,
            "t90_seconds is 2.02 s, the budget is at most 2.00 s: 20.0 ms (1 %) over",
        ),
        (
            Budget(figure="command_status", most=0.0),
            1.0,
            "command_status is 1, the budget is at most 0: 1 over",
        ),
        (
            Budget(figure="reports", least=1.0),
            None,
            "reports was not measured, the budget is at least 1: our device answered no reports in this run",
        ),
    ],
)
def test_a_broken_budget_says_what_and_by_how_much(budget: Budget, value: float | None, said: str) -> None:
    name = f"budget {budget.figure}"
    assert judge([budget], {budget.figure: value}) == [Check(name=name, outcome="fail", message=said)]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_each_figure_has_a_reason_for_its_absence(figure: Figure) -> None:
    (check,) = judge([Budget(figure=figure.name, most=1.0)], {})
    assert check.outcome == "fail"
    assert " was not measured, the budget is at most " in check.message
    assert len(check.message.rpartition(": ")[2].split()) >= 4


def test_the_ends_are_within() -> None:
    budget = Budget(figure="peak_bytes", most=5.0, least=5.0)
    assert judge([budget], {"peak_bytes": 5.0}) == [Check(name="budget peak_bytes", outcome="pass")]
