"""A run as samples over time, and what can be read off them: settled or not, how long it took, a CSV and back.

Pure: sampler.py takes the samples. Times are seconds since the run's start.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

# So many passes of Linux page reporting without a change: nothing more will come.
QUIET_PASSES = 3
# Of the kernel's own passes, 2 s each (PAGE_REPORTING_DELAY).
QUIET_SECONDS = 6.0
# A guest of 8 GiB and more needs about 30 s for all of its free memory; after 60 s it will not settle any more.
SETTLE_SECONDS = 60.0
# The same where a guest's own delay makes a plateau longer: what settles at all does so in some passes.
SETTLE_QUIETS = 4
# What a guest at rest changes by itself: its agent, timers and logs touch a few hundred KiB.
TOLERANCE_BYTES = 1 << 20
# A block that the agent's own allocations split and gave back is reported again: noise, up to two of 4 MiB a pass.
NOISE_BYTES = 8 << 20


@dataclass(frozen=True)
class Sample:
    """One moment. footprint_bytes: what the host holds of guest RAM. None: not looked at in this sample."""

    seconds: float
    phase: str
    footprint_bytes: int
    guest_memfree_bytes: int | None = None
    named_bytes: int | None = None
    released_bytes: int | None = None
    reports: int | None = None


COLUMNS = tuple(field.name for field in fields(Sample))


def quiet_seconds(delay_ms: float | None) -> float:
    """Return how long nothing may change before a guest has settled, by its page_reporting_delay_ms; None: the kernel's own."""
    return max(QUIET_SECONDS, QUIET_PASSES * (delay_ms or 0) / 1000)


def has_settled(samples: Sequence[Sample], since: float, quiet: float = QUIET_SECONDS) -> bool:
    """True if for so many seconds, all after since, neither the footprint changed nor the guest named pages.

    Judged by what the guest names and not only by the footprint: a device that frees nothing settles as late as one
    that does.
    """
    if not samples:
        return False
    start = samples[-1].seconds - quiet
    if start < since:
        return False
    footprints = _from([(sample.seconds, sample.footprint_bytes) for sample in samples], start)
    named = _from(
        [(sample.seconds, sample.named_bytes) for sample in samples if sample.named_bytes is not None], start
    )
    if not footprints or not named:
        return False
    return max(footprints) - min(footprints) <= TOLERANCE_BYTES and named[-1] - named[0] <= NOISE_BYTES


def _from(values: Sequence[tuple[float, int]], start: float) -> list[int]:
    """Return what held at start and what was seen since; nothing if start is before the first look."""
    before = [value for seconds, value in values if seconds <= start]
    return [*before[-1:], *(value for seconds, value in values if seconds > start)] if before else []


def settle_seconds(samples: Sequence[Sample], since: float) -> float:
    """Seconds from since until the footprint stayed within TOLERANCE_BYTES of its last value."""
    after = [sample for sample in samples if sample.seconds >= since]
    if not after:
        return 0.0
    last = after[-1].footprint_bytes
    moving = [sample.seconds for sample in after if abs(sample.footprint_bytes - last) > TOLERANCE_BYTES]
    return max(moving) - since if moving else 0.0


def write_csv(samples: Sequence[Sample], path: Path) -> None:
    """Write one row a sample; what a sample did not look at is left empty."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for sample in samples:
            seconds, *rest = astuple(sample)
            writer.writerow([f"{seconds:.3f}", *rest])


def read_csv(path: Path) -> list[Sample]:
    """Read what write_csv wrote. Raises OSError, and ValueError for a file that is something else."""
    with path.open(newline="") as file:
        rows = csv.reader(file)
        try:
            return _samples(rows)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from error


def _samples(rows: Iterator[list[str]]) -> list[Sample]:
    if tuple(next(rows, ())) != COLUMNS:
        raise ValueError(f"it does not begin with the columns of a timeline: {', '.join(COLUMNS)}")
    return [_sample(row) for row in rows]


def _sample(row: list[str]) -> Sample:
    """Return the sample of a row. Raises ValueError."""
    if len(row) != len(COLUMNS):
        raise ValueError(f"a row of {len(row)} columns is none of a timeline, which has {len(COLUMNS)}")
    seconds, phase, footprint, *rest = row
    memfree, named, released, reports = (int(cell) if cell else None for cell in rest)
    return Sample(float(seconds), phase, int(footprint), memfree, named, released, reports)
