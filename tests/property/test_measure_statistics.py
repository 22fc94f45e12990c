"""Properties of spreads and shifts.

1. A spread's values are in order, lie among the values, and do not depend on the values' order; its quartiles are those
   of the standard library.
2. A shift does not depend on the order of either side; what is added to all of new is added to estimate and interval.
3. With the sides exchanged it is the same, negated.
4. The interval holds the estimate; a higher confidence holds the interval of a lower one; it has the confidence asked
   for, or is the widest that there is.
5. The interval leaves 0 out exactly where the test of Mann and Whitney rejects, counted out over all orders.
6. How often each U comes is what counting all orders of so many runs gives.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from balloonlab.measure.statistics import interval_rank, shift, spread, u_counts

# Whole numbers, so that sums are exact; they are bytes, or microseconds.
VALUES = st.lists(st.integers(-(1 << 40), 1 << 40), min_size=1, max_size=8)
CONFIDENCES = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99])


@given(st.lists(st.floats(-1e15, 1e15), min_size=2, max_size=12))
def test_a_spread(values: list[float]) -> None:
    found = spread(values)
    assert found.least <= found.low <= found.median <= found.high <= found.most
    assert (found.least, found.most, found.runs) == (min(values), max(values), len(values))
    assert spread(reversed(values)) == spread(sorted(values)) == found
    expected = statistics.quantiles(values, n=4, method="inclusive")
    scale = max(map(abs, values))
    for one, other in zip((found.low, found.median, found.high), expected, strict=True):
        assert math.isclose(one, other, rel_tol=1e-9, abs_tol=scale * 1e-12)


@given(VALUES, VALUES, CONFIDENCES, st.integers(-(1 << 40), 1 << 40))
def test_what_is_added_is_found(old: list[int], new: list[int], confidence: float, added: int) -> None:
    before, after = shift(old, new, confidence), shift(old, [one + added for one in new], confidence)
    assert shift(old[::-1], sorted(new), confidence) == before
    assert after.estimate == before.estimate + added
    if before.interval is not None and after.interval is not None:
        assert after.interval.low == before.interval.low + added
        assert after.interval.high == before.interval.high + added
        assert after.interval.confidence == before.interval.confidence
    assert (before.interval is None) == (after.interval is None) == (1 in (len(old), len(new)))


@given(VALUES, VALUES, CONFIDENCES)
def test_the_other_way_round(old: list[int], new: list[int], confidence: float) -> None:
    there, back = shift(old, new, confidence), shift(new, old, confidence)
    assert back.estimate == -there.estimate
    if there.interval is not None and back.interval is not None:
        assert (back.interval.low, back.interval.high) == (-there.interval.high, -there.interval.low)


MORE = st.lists(st.integers(-50, 50), min_size=2, max_size=8)


@given(MORE, MORE, CONFIDENCES)
def test_intervals_are_nested(old: list[int], new: list[int], confidence: float) -> None:
    found = shift(old, new, confidence)
    wider = shift(old, new, 1 - (1 - confidence) / 3).interval
    assert found.interval is not None
    assert wider is not None
    assert wider.low <= found.interval.low <= found.estimate <= found.interval.high <= wider.high
    widest = interval_rank(len(old), len(new), confidence)[0] == 1
    assert found.interval.confidence >= confidence - 1e-9 or widest


@given(st.permutations(range(8)), st.integers(2, 6), st.integers(-8, 8), CONFIDENCES)
def test_an_interval_leaves_out_0_where_the_test_rejects(
    values: list[int], olds: int, added: int, confidence: float
) -> None:
    """By halves, so that no value of one side is one of the other: the test is exact without ties."""
    old, new = values[:olds], [one + added + 0.5 for one in values[olds:]]
    smaller = sum(before < after for before in old for after in new)
    u = min(smaller, len(old) * len(new) - smaller)
    counts = Counter(
        sum(place - rank for rank, place in enumerate(places))
        for places in combinations(range(len(values)), olds)
    )
    total = math.comb(len(values), olds)
    p = 2 * sum(count for value, count in counts.items() if value <= u) / total
    interval = shift(old, new, confidence).interval
    assert interval is not None
    assert (interval.low > 0 or interval.high < 0) == (p <= 1 - interval.confidence + 1e-9)


@given(st.integers(1, 6), st.integers(1, 6))
def test_how_often_each_u_comes(olds: int, news: int) -> None:
    counts = Counter(
        sum(place - rank for rank, place in enumerate(places))
        for places in combinations(range(olds + news), olds)
    )
    assert u_counts(olds, news) == [counts[u] for u in range(olds * news // 2 + 1)]
