"""How long reports take: from a chain that was taken to its answer, as the device's trace has them.

Pure. The guest keeps what it reported isolated until the answer, so this is how long it lacks that memory. Times of a
trace are whole microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from balloonlab.decode import Record
from balloonlab.measure.report import Histogram
from hostdev.wire.balloon import Role
from hostdev.wire.trace import Kind

# From what an empty report takes to a report of 128 MiB that is resident, three bounds a decade.
BOUNDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Latencies:
    """Takes records one after another. seconds: of each report that was answered; others are under way or forgotten."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.released_bytes = 0
        self._taken: dict[tuple[int | None, int], float] = {}

    def take(self, record: Record) -> None:
        """Take one record."""
        match record.kind:
            case Kind.CHAIN if record.value.role == Role.REPORTING:
                self._taken[record.ring, record.value.head] = record.seconds
            case Kind.ANSWER if (record.ring, record.value.head) in self._taken:
                self.seconds.append(record.seconds - self._taken.pop((record.ring, record.value.head)))
            case Kind.RELEASE:
                self.released_bytes += record.value.length
            case Kind.RING_STARTED | Kind.GUEST:
                self._forget(record.ring)

    def _forget(self, ring: int | None) -> None:
        """Forget what was under way on a ring, or on all: it comes again, or never."""
        self._taken = {
            key: began for key, began in self._taken.items() if ring is not None and key[0] != ring
        }


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value that so large a share of all does not exceed; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


def histogram(values: Sequence[float], bounds: Sequence[float] = BOUNDS) -> Histogram:
    """Count values by the first bound that they are below."""
    counts = [0] * (len(bounds) + 1)
    for value in values:
        counts[sum(value >= bound for bound in bounds)] += 1
    return Histogram(bounds=list(bounds), counts=counts)
