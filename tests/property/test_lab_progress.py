"""Properties of the chart on the terminal.

1. It has as many rows as asked for, each as wide as there are values, at most as wide as asked for.
2. Every column is filled from the bottom: below a block that is not empty all blocks are full.
3. A column's height is its value's share of the top, within a sixteenth of a row; more than the top is the top.
4. A larger value never gives a lower column.
5. The newest value is the rightmost column, also where there are more values than columns.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from balloonlab.progress import bars

EIGHTHS = " ▁▂▃▄▅▆▇█"
TOP = 1000.0
VALUES = st.lists(st.floats(0, 2 * TOP), min_size=1, max_size=60)
WIDTHS = st.integers(1, 40)
ROWS = st.integers(1, 12)


def columns(drawn: list[str]) -> list[list[int]]:
    """Eighths of each column's blocks, the bottom one first."""
    return [[EIGHTHS.index(block) for block in reversed(column)] for column in zip(*drawn, strict=True)]


@given(st.lists(st.floats(0, 2 * TOP), max_size=60), st.integers(-2, 40), ROWS)
def test_it_fits(values: list[float], width: int, rows: int) -> None:
    drawn = bars(values, TOP, width, rows)
    assert [len(row) for row in drawn] == [min(len(values), max(width, 0))] * rows


@given(VALUES, WIDTHS, ROWS)
def test_columns_are_filled_from_the_bottom(values: list[float], width: int, rows: int) -> None:
    for column in columns(bars(values, TOP, width, rows)):
        reached = next((row for row, eighths in enumerate(column) if eighths < 8), rows)
        assert all(eighths == 0 for eighths in column[reached + 1 :])


@given(VALUES, ROWS)
def test_heights_are_shares_of_the_top(values: list[float], rows: int) -> None:
    heights = [sum(column) for column in columns(bars(values, TOP, len(values), rows))]
    assert all(
        abs(height - min(value, TOP) / TOP * rows * 8) <= 0.5
        for value, height in zip(values, heights, strict=True)
    )


@given(st.floats(0, 2 * TOP), st.floats(0, 2 * TOP), ROWS)
def test_more_is_never_lower(one: float, other: float, rows: int) -> None:
    low, high = columns(bars(sorted((one, other)), TOP, 2, rows))
    assert sum(low) <= sum(high)


@given(VALUES, WIDTHS, ROWS)
def test_the_newest_is_at_the_right(values: list[float], width: int, rows: int) -> None:
    assert columns(bars(values, TOP, width, rows))[-1] == columns(bars(values[-1:], TOP, 1, rows))[0]


def test_without_a_top_there_is_nothing_to_draw() -> None:
    assert bars([1.0], 0.0, 10, 3) == ["", "", ""]
