"""Counts what one step of a device does: looks into guest memory, descriptors read, pieces given back or kept.

Not a test. Work is counted, never timed: a count is the same on every machine.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

from hostdev import virtqueue
from hostdev.balloon import SLICE_CALLS
from hostdev.chains import MAX_PFN_BYTES
from hostdev.giver import SLICE_BYTES, Giver
from hostdev.memory import MAX_REGIONS, MemoryTable, Part
from hostdev.rings import Step
from hostdev.virtqueue import MAX_DIRECT, MAX_INDIRECT
from hostdev.wire.trace import Cause
from hostdev.wire.virtqueue import DESCRIPTOR_SIZE, DESCRIPTOR_STRUCT
from tests.in_process import InProcess

MAX_ENTRIES = MAX_DIRECT + MAX_INDIRECT


@dataclass(frozen=True, slots=True)
class Work:
    """What was done. looked_up: ranges of guest memory, and the regions that they were found in. bytes: given or kept."""

    descriptors: int = 0
    reads: int = 0
    read_bytes: int = 0
    looked_up: int = 0
    pieces: int = 0
    bytes: int = 0


# What one step may do. Each entry of a chain is read once, and its bytes are looked up once, in one region and mostly no more:
# entries that are given back are joined first, so all regions are found once. A slice ends with the piece that fills it.
MOST = Work(
    descriptors=MAX_ENTRIES,
    reads=MAX_ENTRIES + 1,
    read_bytes=MAX_PFN_BYTES + MAX_INDIRECT * DESCRIPTOR_SIZE,
    looked_up=2 * MAX_ENTRIES + SLICE_CALLS + 1 + 2 * MAX_REGIONS,
    pieces=SLICE_CALLS,
    bytes=2 * SLICE_BYTES - 1,
)


@dataclass
class Meter:
    """Runs the steps of a guest's device, each within MOST. worst: the largest count of each kind in one step."""

    guest: InProcess
    steps: int = 0
    worst: Work = field(default_factory=Work)
    total: Work = field(default_factory=Work)

    def step(self, index: int) -> Step:
        """Do one step of a ring."""
        counts: dict[str, int] = dict.fromkeys(Work.__dataclass_fields__, 0)
        with _counted(counts):
            step = self.guest.step(index)
        self.steps += 1
        for name, count in counts.items():
            assert count <= getattr(MOST, name), f"{count} {name} in one step"
        self.worst = Work(**{name: max(count, getattr(self.worst, name)) for name, count in counts.items()})
        self.total = Work(**{name: count + getattr(self.total, name) for name, count in counts.items()})
        return step

    def run(self, index: int) -> None:
        """Serve a ring until it is idle."""
        while self.step(index).more:
            pass


class _CountedStruct:
    """DESCRIPTOR_STRUCT for the queue."""

    def __init__(self, counts: dict[str, int]) -> None:
        self._counts = counts

    def unpack_from(self, table: memoryview | bytes, offset: int) -> tuple[int, ...]:
        self._counts["descriptors"] += 1
        return struct.Struct.unpack_from(DESCRIPTOR_STRUCT, table, offset)


@contextlib.contextmanager
def _counted(counts: dict[str, int]) -> Iterator[None]:
    split, read, give = MemoryTable.split, MemoryTable.read, Giver.give

    def counting_split(table: MemoryTable, address: int, length: int) -> Iterator[Part]:
        counts["looked_up"] += 1
        for part in split(table, address, length):
            counts["looked_up"] += 1
            yield part

    def counting_read(table: MemoryTable, address: int, length: int) -> bytes | None:
        counts["reads"] += 1
        counts["read_bytes"] += length
        return read(table, address, length)

    def counting_give(giver: Giver, index: int, cause: Cause, part: Part) -> None:
        counts["pieces"] += 1
        counts["bytes"] += part.length
        give(giver, index, cause, part)

    with (
        mock.patch.object(MemoryTable, "split", counting_split),
        mock.patch.object(MemoryTable, "read", counting_read),
        mock.patch.object(Giver, "give", counting_give),
        mock.patch.object(virtqueue, "DESCRIPTOR_STRUCT", _CountedStruct(counts)),
    ):
        yield
