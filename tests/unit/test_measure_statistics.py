"""Spreads and shifts against numbers of scipy 1.17 and numpy, and what few runs can say."""

from __future__ import annotations

import pytest

from balloonlab.measure import statistics
from balloonlab.measure.report import Spread
from balloonlab.measure.statistics import Interval, Shift, interval_rank, runs_for, shift, spread

OLD = [4.21, 4.35, 4.18, 4.60, 4.27]
NEW = [4.71, 4.52, 4.93, 4.40, 4.66]


def test_spreads() -> None:
    """numpy.percentile(OLD, [0, 25, 50, 75, 100])."""
    assert spread(OLD) == Spread(median=4.27, low=4.21, high=4.35, least=4.18, most=4.6, runs=5)
    four = spread([10.1, 10.4, 9.8, 10.9])
    assert (four.low, four.median, four.high) == pytest.approx((10.025, 10.25, 10.525))
    assert spread([7]) == Spread(median=7, low=7, high=7, least=7, most=7, runs=1)
    with pytest.raises(ValueError, match="no spread of no values"):
        spread([])


def test_quartiles_stay_between_their_neighbours() -> None:
    """0.1 + (0.3 - 0.1) * 1.0 is no problem; a third of the way between two equal ones must be the same number."""
    assert spread([0.1] * 6) == Spread(median=0.1, low=0.1, high=0.1, least=0.1, most=0.1, runs=6)


def test_a_shift() -> None:
    """numpy.median(numpy.subtract.outer(NEW, OLD)); mannwhitneyu(OLD, NEW, method="exact") has p = 0.0317."""
    found = shift(OLD, NEW, 0.95)
    assert found.estimate == pytest.approx(0.33)
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((0.05, 0.66))
    assert found.interval.confidence == pytest.approx(0.96825397)
    # mannwhitneyu rejects at 5 %, and not at 1 %.
    wider = shift(OLD, NEW, 0.99).interval
    assert wider is not None
    assert wider.low < 0 < wider.high


@pytest.mark.parametrize(
    ("runs", "confidence", "rank", "below"),
    [
        ((4, 4), 0.95, 1, 0.014285714285714285),
        ((5, 5), 0.95, 3, 0.015873015873015872),
        ((5, 8), 0.95, 7, 0.022533022533022536),
        ((10, 10), 0.95, 24, 0.021628526272489117),
        ((20, 12), 0.95, 70, 0.024119985381290208),
    ],
)
def test_ranks_have_the_tail_that_scipy_counts(
    runs: tuple[int, int], confidence: float, rank: int, below: float
) -> None:
    """below: scipy's exact P(U <= rank - 1) for so many runs."""
    found, reached = interval_rank(*runs, confidence)
    assert found == rank
    assert reached == pytest.approx(1 - 2 * below)


@pytest.mark.parametrize(
    ("runs", "most"), [((2, 2), 2 / 3), ((3, 3), 0.9), ((2, 5), 1 - 2 / 21), ((4, 3), 1 - 2 / 35)]
)
def test_few_runs_give_so_much_confidence_and_no_more(runs: tuple[int, int], most: float) -> None:
    rank, reached = interval_rank(*runs, 0.95)
    assert rank == 1
    assert reached == pytest.approx(most)
    found = shift([0.0, 1.0, 2.0], [5.0, 9.0, 7.0], 0.9)
    assert found == Shift(6.0, Interval(3.0, 9.0, 0.9))


@pytest.mark.parametrize(("confidence", "runs"), [(0.5, 2), (0.9, 3), (0.95, 4), (0.99, 5), (0.9975, 6)])
def test_so_many_runs_give_a_confidence(confidence: float, runs: int) -> None:
    assert runs_for(confidence) == runs
    assert interval_rank(runs, runs, confidence)[1] >= confidence


def test_one_run_gives_none() -> None:
    assert shift([5.0], [7.0], 0.95) == Shift(2.0, None)
    assert shift([5.0], [7.0, 9.0, 8.0], 0.95) == Shift(3.0, None)
    assert shift([4.0, 5.0], [7.0], 0.5) == Shift(2.5, None)


def test_many_runs_are_approximated_within_ranks_of_thousands(monkeypatch: pytest.MonkeyPatch) -> None:
    for confidence in (0.8, 0.9, 0.95, 0.99):
        exact, _ = interval_rank(50, 40, confidence)
        with monkeypatch.context() as patch:
            patch.setattr(statistics, "EXACT_RUNS", 39)
            about, reached = interval_rank(50, 40, confidence)
        assert abs(about - exact) <= 2
        assert reached == confidence
