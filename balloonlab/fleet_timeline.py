"""What many guests held over time, and what can be read off it: GiB·min, quantiles, settle times, a CSV.

Pure: fleet.py takes the samples. Times are seconds of simulated time since the start of the run.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

# A guest has let go of memory, or taken some, when its use changes by one part in so many between two samples.
STEP_SHARE = 16
# A fall has settled when this much of it has come.
SETTLED_SHARE = 0.9
_GIB_MINUTE = float(60 << 30)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value at a share of an ordered sequence, the nearest rank; 0 of nothing."""
    return ordered[round(share * (len(ordered) - 1))] if ordered else 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """How the guests differ: quantiles 0, 0.25, 0.5, 0.75 and 1 of what is held of each, in bytes."""

    least_bytes: int
    quarter_bytes: int
    median_bytes: int
    three_quarters_bytes: int
    most_bytes: int

    @classmethod
    def of(cls, footprints: Sequence[int]) -> Spread:
        """The quantiles of so many bytes, in any order."""
        ordered = sorted(footprints)
        return cls(*(int(quantile(ordered, share)) for share in (0, 0.25, 0.5, 0.75, 1)))


@dataclass(frozen=True, slots=True)
class FleetSample:
    """One moment. footprint_bytes: what a host with enough memory holds of all guests, by the account.

    resident_bytes: what this host does hold, measured; None without devices. used_bytes: not free in the guests.
    reports, reported_bytes: so far.
    """

    seconds: float
    footprint_bytes: int
    resident_bytes: int | None
    used_bytes: int
    spread: Spread
    reports: int
    reported_bytes: int


def gib_minutes(points: Sequence[tuple[float, int]]) -> float:
    """Integral over (seconds, bytes) by the trapezoid rule, in GiB·min."""
    area = sum((later - sooner) * (low + high) / 2 for (sooner, low), (later, high) in pairwise(points))
    return area / _GIB_MINUTE


COLUMNS = (
    *(field.name for field in fields(FleetSample) if field.name != "spread"),
    *(field.name for field in fields(Spread)),
)


class FallWatch:
    """How long one guest's falls took: from the guest's letting go until 90 % of the fall had come.

    A fall begins where the guest's use drops by 1/16 of its memory between two samples, at the first of them. It ends
    where the use drops or rises so again, or with the run. Falls of less than that are not counted.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.settle_seconds: list[float] = []
        self._step = memory_bytes // STEP_SHARE
        self._last: tuple[float, int, int] | None = None
        self._fall: list[tuple[float, int]] = []

    def sample(self, seconds: float, used_bytes: int, footprint_bytes: int) -> None:
        """Take a sample."""
        if self._last is not None:
            before, used, footprint = self._last
            if abs(used_bytes - used) >= self._step:
                self.end()
                if used_bytes < used:
                    self._fall = [(before, max(footprint, used))]
        if self._fall:
            self._fall.append((seconds, footprint_bytes))
        self._last = (seconds, used_bytes, footprint_bytes)

    def end(self) -> None:
        """Count the fall that goes on, if one does."""
        fall, self._fall = self._fall, []
        if not fall:
            return
        begun, high = fall[0]
        drop = high - min(footprint for _seconds, footprint in fall)
        if drop >= self._step:
            enough = high - SETTLED_SHARE * drop
            reached = next(seconds for seconds, footprint in fall if footprint <= enough)
            self.settle_seconds.append(reached - begun)


def write_csv(samples: Sequence[FleetSample], path: Path) -> None:
    """Write one row a sample; what was not measured is left empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for sample in samples:
            row = asdict(sample)
            spread = row.pop("spread")
            writer.writerow({**row, **spread, "seconds": f"{sample.seconds:.3f}"})
