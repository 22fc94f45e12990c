"""A run's footprint as one line of text. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from balloonlab.progress import bars
from balloonlab.timeline import Sample


def sparkline(samples: Sequence[Sample], top: float, width: int) -> str:
    """Return the footprint over time in width block characters, full at top bytes; a dash where there are no samples."""
    if not samples or top <= 0:
        return "-"
    return bars(_at_even_times(samples, width), top, width, 1)[0]


def _at_even_times(samples: Sequence[Sample], number: int) -> list[float]:
    """What was last seen at so many moments from the first sample to the last one: samples are not evenly spaced."""
    begin, end = samples[0].seconds, samples[-1].seconds
    values, position = [], 0
    for moment in range(number):
        seconds = begin + (end - begin) * (moment + 1) / number
        while position + 1 < len(samples) and samples[position + 1].seconds <= seconds:
            position += 1
        values.append(float(samples[position].footprint_bytes))
    return values
