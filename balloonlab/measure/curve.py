"""What can be read off a run's footprint over time: its integral, its peak, how fast it fell.

Pure, on the samples of timeline.py. Between two samples the footprint is what the earlier one says.
"""

from __future__ import annotations

from collections.abc import Sequence

from balloonlab.measure.figures import BLOCK_BYTES
from balloonlab.timeline import Sample

_GIB_MINUTE = (1 << 30) * 60.0


def gib_minutes(samples: Sequence[Sample], begin: float, end: float) -> float:
    """Return the footprint over time from begin to end, seconds of the run, in GiB times minutes."""
    area = 0.0
    for sample, until in zip(samples, [*(sample.seconds for sample in samples[1:]), end], strict=True):
        area += sample.footprint_bytes * max(0.0, min(until, end) - max(sample.seconds, begin))
    return area / _GIB_MINUTE


def peak(samples: Sequence[Sample], begin: float, end: float) -> int:
    """Return the most that was held from begin to end; 0 if there was no look."""
    return max((sample.footprint_bytes for sample in samples if begin <= sample.seconds <= end), default=0)


def seconds_to(
    samples: Sequence[Sample], begin: float, end: float, share: float, before: int
) -> float | None:
    """Return the seconds from begin until so large a share of what came back by end was back.

    before: the footprint that it came back from. None if less than a block came back: then there is nothing to time.
    """
    during = [sample for sample in samples if begin <= sample.seconds <= end]
    if not during:
        return None
    after = during[-1].footprint_bytes
    if before - after < BLOCK_BYTES:
        return None
    level = before - share * (before - after)
    return next(sample.seconds - begin for sample in during if sample.footprint_bytes <= level)
