"""What is read off a fleet's samples.

The area under a footprint is linear in it, adds up over parts of the time, and lies between the least and the most.
The quantiles of guests are among them and in order. A fall's settle time is not negative, not longer than the run, and
there are no more of them than samples; a guest whose footprint never falls has none.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloonlab.fleet_timeline import FallWatch, Spread, gib_minutes

SIZES = st.integers(0, 1 << 40)
STEPS = st.lists(st.tuples(st.floats(0.01, 100), SIZES), min_size=2, max_size=30)


def points(steps: list[tuple[float, int]]) -> list[tuple[float, int]]:
    moment, result = 0.0, []
    for step, size in steps:
        moment += step
        result.append((moment, size))
    return result


@given(STEPS, st.integers(0, 5))
def test_area(steps: list[tuple[float, int]], factor: int) -> None:
    given_points = points(steps)
    area = gib_minutes(given_points)
    scaled = [(moment, size * factor) for moment, size in given_points]
    assert gib_minutes(scaled) == pytest.approx(area * factor, abs=1e-9)
    middle = len(given_points) // 2
    parts = gib_minutes(given_points[: middle + 1]) + gib_minutes(given_points[middle:])
    assert parts == pytest.approx(area, abs=1e-9)
    minutes = (given_points[-1][0] - given_points[0][0]) / 60 / (1 << 30)
    sizes = [size for _moment, size in given_points]
    assert min(sizes) * minutes <= area * (1 + 1e-9) + 1e-9
    assert area <= max(sizes) * minutes * (1 + 1e-9) + 1e-9


@given(st.lists(SIZES, min_size=1, max_size=50))
def test_spread(sizes: list[int]) -> None:
    spread = Spread.of(sizes)
    ordered = [
        spread.least_bytes,
        spread.quarter_bytes,
        spread.median_bytes,
        spread.three_quarters_bytes,
        spread.most_bytes,
    ]
    assert ordered == sorted(ordered)
    assert set(ordered) <= set(sizes)
    assert (ordered[0], ordered[-1]) == (min(sizes), max(sizes))


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=40))
def test_falls(life: list[tuple[int, int]]) -> None:
    watch = FallWatch(100)
    for second, (used, held) in enumerate(life):
        watch.sample(second, used, max(used, held))
    watch.end()
    assert len(watch.settle_seconds) <= len(life)
    assert all(0 < seconds <= len(life) for seconds in watch.settle_seconds)


@given(st.lists(st.integers(0, 100), max_size=40))
def test_no_falls_where_nothing_comes_back(life: list[int]) -> None:
    watch = FallWatch(100)
    for second, used in enumerate(life):
        watch.sample(second, used, 100)
    watch.end()
    assert watch.settle_seconds == []
