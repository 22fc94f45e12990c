"""The HTML report's figures: tables with every run as a dot, and how long releases took. Needs no script.

Pure. Used by html.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from balloonlab.measure import words
from balloonlab.measure.elements import Content, element, table
from balloonlab.measure.report import ArmResult, Histogram, Report, Run, Spread
from balloonlab.measure.scenario import Arm
from balloonlab.printable import printable

_STRIP_WIDTH, _STRIP_HEIGHT, _STRIP_MARGIN = 140, 14, 6
_BARS_WIDTH, _BARS_HEIGHT, _BARS_FOOT, _BARS_HEAD = 640, 170, 22, 16
_NAME_CHARACTERS = 80


def arm_name(arm: Arm) -> Element:
    """Return an arm's name behind its colour."""
    return element("span", element("span", class_=f"key {arm}"), words.ARM_NAMES[arm], class_="arm")


def figures_table(report: Report, names: Sequence[str]) -> Element:
    """Return the named figures by arm: the median and the ends in words, and below them a dot a run, all to one scale."""
    budgets = {rule.figure: words.budget(rule) for rule in report.scenario.budgets}
    head: list[Content] = ["figure", *(arm_name(arm.arm) for arm in report.arms), "budget"]
    rows = [_figure(report, name, budgets.get(name, "")) for name in names]
    return table(head, rows, class_="numbers figures")


def _figure(report: Report, name: str, budget: str) -> list[Content]:
    figure = words.figure_of(name)
    title = element("span", element("code", printable(name, _NAME_CHARACTERS)))
    if figure is not None and "." not in name:
        title.append(element("small", figure.meaning))
    values = [value for run in _counted(report) if (value := run.figures.get(name)) is not None]
    cells = [
        _arm_cell(report, name, arm, (min(values, default=0), max(values, default=0))) for arm in report.arms
    ]
    return [title, *cells, budget]


def _counted(report: Report) -> list[Run]:
    return [run for run in report.runs if run.counted]


def _arm_cell(report: Report, name: str, arm: ArmResult, ends: tuple[float, float]) -> Element:
    spread = arm.figures.get(name)
    if spread is None:
        return element("span", "-")
    cell = element("span", words.value(name, spread.median), element("small", words.ends(name, spread)))
    if spread.runs > 1 and ends[0] < ends[1]:
        runs = [run for run in _counted(report) if run.arm == arm.arm]
        cell.append(_strip(name, runs, spread, ends))
    return cell


def _strip(name: str, runs: Sequence[Run], spread: Spread, ends: tuple[float, float]) -> Element:
    middle = str(_STRIP_HEIGHT // 2)
    strip = element(
        "svg",
        element("line", class_="axis", x1="0", x2=str(_STRIP_WIDTH), y1=middle, y2=middle),
        viewBox=f"0 0 {_STRIP_WIDTH} {_STRIP_HEIGHT}",
        width=str(_STRIP_WIDTH),
        class_="strip",
        role="img",
        aria_label="every run",
    )
    shown = element("g", class_=runs[0].arm)
    for run in runs:
        if (value := run.figures.get(name)) is not None:
            title = element("title", f"run {run.number}: {words.value(name, value)}")
            shown.append(element("circle", title, cx=_place(value, ends), cy=middle, r="4"))
    at = _place(spread.median, ends)
    shown.append(element("line", x1=at, x2=at, y1="1", y2=str(_STRIP_HEIGHT - 1)))
    strip.append(shown)
    return strip


def _place(value: float, ends: tuple[float, float]) -> str:
    room = _STRIP_WIDTH - 2 * _STRIP_MARGIN
    share = min(1.0, max(0.0, (value - ends[0]) / (ends[1] - ends[0])))
    return f"{_STRIP_MARGIN + share * room:.1f}"


def latencies(report: Report) -> list[Element]:
    """Return a histogram of release latencies for each arm that has them, its runs added up."""
    drawn = []
    for arm in dict.fromkeys(run.arm for run in report.runs):
        histograms = [
            run.release_latency for run in _counted(report) if run.arm == arm and run.release_latency
        ]
        if summed := _sum(histograms):
            caption = element(
                "figcaption", f"{sum(summed.counts):,} reports of {words.plural(len(histograms), 'run')}"
            )
            drawn.append(element("figure", element("p", arm_name(arm)), _bars(arm, summed), caption))
    return drawn


def _sum(histograms: Sequence[Histogram]) -> Histogram | None:
    """Add up those that have the bounds of the first; None where nothing was counted."""
    alike = [histogram for histogram in histograms if histogram.bounds == histograms[0].bounds]
    counts = [sum(column) for column in zip(*(histogram.counts for histogram in alike), strict=False)]
    return Histogram(bounds=alike[0].bounds, counts=counts) if any(counts) else None


def _bars(arm: Arm, histogram: Histogram) -> Element:
    width = _BARS_WIDTH / len(histogram.counts)
    bars = element("g", class_=arm)
    texts = element("g")
    for number, count in enumerate(histogram.counts):
        height = count / max(histogram.counts) * (_BARS_HEIGHT - _BARS_FOOT - _BARS_HEAD)
        top = _BARS_HEIGHT - _BARS_FOOT - height
        bars.append(
            element(
                "rect",
                element("title", f"{_between(histogram.bounds, number)}: {count:,}"),
                x=f"{number * width + 2:.1f}",
                y=f"{top:.1f}",
                width=f"{max(1.0, width - 4):.1f}",
                height=f"{height:.1f}",
            )
        )
        middle = f"{(number + 0.5) * width:.1f}"
        if count:
            texts.append(element("text", f"{count:,}", x=middle, y=f"{top - 4:.1f}", text_anchor="middle"))
    for number, bound in enumerate(histogram.bounds[: len(histogram.counts) - 1], start=1):
        at = f"{number * width:.1f}"
        texts.append(element("text", _short(bound), x=at, y=str(_BARS_HEIGHT - 6), text_anchor="middle"))
    foot = str(_BARS_HEIGHT - _BARS_FOOT)
    axis = element("line", class_="axis", x1="0", x2=str(_BARS_WIDTH), y1=foot, y2=foot)
    box = f"0 0 {_BARS_WIDTH} {_BARS_HEIGHT}"
    return element("svg", axis, bars, texts, class_="bars", viewBox=box, width=str(_BARS_WIDTH), role="img")


def _between(bounds: Sequence[float], number: int) -> str:
    if number == 0:
        return f"below {_short(bounds[0])}" if bounds else "all"
    if number >= len(bounds):
        return f"{_short(bounds[-1])} and more"
    return f"{_short(bounds[number - 1])} to {_short(bounds[number])}"


def _short(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds >= 1
        else f"{seconds * 1000:.3g} ms"
        if seconds >= 0.001
        else f"{seconds * 1e6:.3g} µs"
    )
