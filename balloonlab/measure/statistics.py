"""A figure over repeated runs, and how far two sets of runs are apart. Pure; used by command.py and compare.py.

Runs are few (three to ten), their times have long tails and their bytes come in blocks with ties, so nothing here assumes a
distribution. The difference of two sides is Hodges and Lehmann's: the median of all differences between a value of one
and a value of the other. Its interval goes with it: the k-th smallest to the k-th largest of these differences, k by the
exact distribution of Mann and Whitney's U (Hollander and Wolfe, Nonparametric Statistical Methods, chapter 4). It holds
the true shift at least as often as it says, with ties more often, and it leaves 0 out exactly where that test rejects. A
bootstrap of five values does not: it draws from 126 resamples and promises more than it keeps.

With few runs not every confidence is to be had: three and three give 90 % at most, four and four 97 %. Then the widest
interval is taken, and its own confidence said. With one run on a side nothing is known of how runs differ: there is no
interval.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, count

from balloonlab.measure.report import Spread

# The exact distribution costs the third power of the runs: 10 ms here. R's wilcox.test changes over at 50 as well.
EXACT_RUNS = 50
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Interval:
    """The ends, both included, and the share of experiments in which such an interval holds the true value."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Shift:
    """How much larger a value of the new side is than one of the old. interval: None with one value on a side."""

    estimate: float
    interval: Interval | None


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile of values in order by linear interpolation, as numpy and R (type 7) have it."""
    place = share * (len(ordered) - 1)
    before = math.floor(place)
    if before == place:
        return ordered[before]
    low, high = ordered[before], ordered[before + 1]
    # Rounding must not carry it out of its two neighbours.
    return min(max(low + (high - low) * (place - before), low), high)


def spread(values: Iterable[float]) -> Spread:
    """Return median, quartiles and ends of one value or more. Raises ValueError for none."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("there is no spread of no values")
    median, low, high = (quantile(ordered, share) for share in (0.5, 0.25, 0.75))
    return Spread(median=median, low=low, high=high, least=ordered[0], most=ordered[-1], runs=len(ordered))


def shift(old: Sequence[float], new: Sequence[float], confidence: float) -> Shift:
    """Return how far new is from old, with an interval of this confidence or the most that there is.

    Both have one value or more. confidence: above 0 and below 1.
    """
    differences = sorted(after - before for before in old for after in new)
    estimate = statistics.median(differences)
    if min(len(old), len(new)) == 1:
        return Shift(estimate, None)
    rank, reached = interval_rank(len(old), len(new), confidence)
    return Shift(estimate, Interval(differences[rank - 1], differences[-rank], reached))


def interval_rank(olds: int, news: int, confidence: float) -> tuple[int, float]:
    """Return k, from 1, and the confidence of the interval from the k-th smallest to the k-th largest difference.

    The largest k that has the confidence asked for, and 1 where none has it.
    """
    if max(olds, news) > EXACT_RUNS:
        return _normal_rank(olds, news, confidence), confidence
    total = math.comb(olds + news, olds)
    # In fractions: three and three runs have 90 % exactly, and 1 - 0.9 is a little less than a tenth.
    allowed = (1 - Fraction(confidence).limit_denominator(1000000)) * total / 2
    tails = list(accumulate(u_counts(olds, news)))
    rank = max(1, bisect_right(tails, allowed))
    return rank, 1 - 2 * tails[rank - 1] / total


def reaches(reached: float | None, asked: float) -> bool:
    """Return whether an interval has a confidence, but for rounding. None: there is no interval."""
    return reached is not None and reached > asked - _ROUNDING


def runs_for(confidence: float) -> int:
    """Return how many runs on both sides have an interval of this confidence."""
    return next(runs for runs in count(2) if reaches(interval_rank(runs, runs, confidence)[1], confidence))


def _normal_rank(olds: int, news: int, confidence: float) -> int:
    """Return k by the normal approximation of U, with half a step for its being a whole number."""
    deviation = math.sqrt(olds * news * (olds + news + 1) / 12)
    wide = statistics.NormalDist().inv_cdf((1 + confidence) / 2) * deviation
    return max(1, math.floor((olds * news + 1) / 2 - wide))


def u_counts(olds: int, news: int) -> list[int]:
    """Return in how many of the orders of so many olds and news U is 0, 1 and so on, up to its middle.

    The coefficients of the Gaussian binomial: the product of (1 - x^(news + i)) / (1 - x^i) for i of 1 to olds.
    """
    length = olds * news // 2 + 1
    counts = [1] + [0] * (length - 1)
    for i in range(1, olds + 1):
        for power in range(length - 1, news + i - 1, -1):
            counts[power] -= counts[power - news - i]
        for power in range(i, length):
            counts[power] += counts[power - i]
    return counts
