"""Budgets: how people write them, and what is said when one is broken.

Pure. Budgets are a scenario's (scenario_file.py reads them) or the command line's (--budget); command.py judges each arm
by the medians of its runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from balloonlab.durations import parse_duration
from balloonlab.errors import UsageError
from balloonlab.measure.figures import Figure, find_figure, full_name, show
from balloonlab.measure.report import Check
from balloonlab.measure.scenario import Budget
from balloonlab.sizes import parse_size

_WRITTEN = re.compile(r"\s*([^<>=\s]+)\s*(<=|>=|=)\s*(.*?)\s*", re.DOTALL)
_HOW = {
    "bytes": "a size, such as 64M, or bytes",
    "seconds": "a duration, such as 2s, or seconds",
    "GiB min": "a number of GiB min",
    "count": "a number",
}
# No figure is as large; and a float has each whole number up to 2**53 exactly.
_LIMIT = 1 << 63


def amount(figure: Figure, value: object) -> float:
    """Return a value as people write it in the figure's own unit: bytes, seconds, GiB min or a count. Raises UsageError."""
    number: object = value
    if isinstance(value, str):
        number = _parsed(figure, value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise UsageError(f"{figure.name} is counted in {figure.unit}: give {_HOW[figure.unit]}")
    if not abs(number) < _LIMIT:  # NaN is not below anything either
        raise UsageError(f"{figure.name} cannot be as much as that: give {_HOW[figure.unit]}")
    return float(number)


def _parsed(figure: Figure, text: str) -> float:
    if figure.unit == "bytes":
        return parse_size(text)
    if figure.unit == "seconds":
        return parse_duration(text)
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text!r} is no {figure.name}: give {_HOW[figure.unit]}") from None


def parse_budget(text: str) -> Budget:
    """Return the budget of "residual=64M", at most that, or "returned>=400M", at least. Raises UsageError."""
    matched = _WRITTEN.fullmatch(text)
    if matched is None:
        raise UsageError(f"{text!r} is no budget: write it like residual=128M or 'returned>=400M'")
    name, sign, value = matched.groups()
    limit = amount(find_figure(name), value)
    if sign == ">=":
        return Budget(figure=full_name(name), least=limit)
    return Budget(figure=full_name(name), most=limit)


def joined(budgets: Sequence[Budget]) -> tuple[Budget, ...]:
    """Join budgets with one end each to one budget a figure, in the order of their first mention. Raises UsageError."""
    found: dict[str, Budget] = {}
    for one in budgets:
        other = found.get(one.figure, Budget(figure=one.figure))
        if (one.most is not None and other.most is not None) or (
            one.least is not None and other.least is not None
        ):
            raise UsageError(f"{one.figure} has two budgets: give each end once")
        found[one.figure] = Budget(
            figure=one.figure,
            most=one.most if one.most is not None else other.most,
            least=one.least if one.least is not None else other.least,
        )
    return tuple(found.values())


def judge(budgets: Sequence[Budget], figures: Mapping[str, float | None]) -> list[Check]:
    """Return a check for each budget; a broken one says what is over, and by how much.

    figures: by their full names. What was not measured breaks its budget. Raises UsageError for an unknown figure.
    """
    return [_check(budget, figures.get(budget.figure)) for budget in budgets]


def _check(budget: Budget, value: float | None) -> Check:
    figure = find_figure(budget.figure)
    name = f"budget {budget.figure}"
    if value is None:
        text = f"{budget.figure} was not measured, the budget is {_limits(budget, figure)}: {_absent(figure)}"
        return Check(name=name, outcome="fail", message=text)
    if budget.most is not None and value > budget.most:
        return Check(name=name, outcome="fail", message=_broken(budget, figure, value, budget.most))
    if budget.least is not None and value < budget.least:
        return Check(name=name, outcome="fail", message=_broken(budget, figure, value, budget.least))
    return Check(name=name, outcome="pass")


def _broken(budget: Budget, figure: Figure, value: float, limit: float) -> str:
    off = abs(value - limit)
    share = f" ({100 * off / abs(limit):.0f} %)" if limit else ""
    way = "over" if value > limit else "under"
    return (
        f"{budget.figure} is {show(figure, value)}, the budget is {_limits(budget, figure)}: "
        f"{show(figure, off)}{share} {way}"
    )


def _limits(budget: Budget, figure: Figure) -> str:
    ends = (("at least", budget.least), ("at most", budget.most))
    return " and ".join(f"{words} {show(figure, limit)}" for words, limit in ends if limit is not None)


def _absent(figure: Figure) -> str:
    """Say why a figure may have no value."""
    match figure.name:
        case "t50_seconds" | "t90_seconds" | "returned_bytes":
            return "nothing came back after the last free, or the run ended before it"
        case "command_seconds" | "command_status":
            return "no command ran to its end"
        case name if name.startswith(("release_", "refault_")) or name in ("reports", "released_bytes"):
            return "our device answered no reports in this run"
        case name if name.startswith("device_"):
            return "our device was not there, or the run ended before its end"
        case _:
            return "the run ended before it could be"
