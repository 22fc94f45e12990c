"""Reads, while a run goes on, what its device's trace and the RAM files tell together: latencies and refaults.

It only looks, twice a second: the trace since the last look, then the map of each RAM file, in this order, so that what a
look finds was there after all that it knows to be released. Used by runner.py; arms without our device have no trace.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path

from balloonlab.decode import Record, TraceReader
from balloonlab.measure.latency import Latencies
from balloonlab.measure.refault import Refaults
from balloonlab.measure.spans import in_file
from hostdev.pages import Span
from hostdev.wire.trace import Kind
from qmp_glue import ram
from qmp_glue.ram import Section

LOOK_SECONDS = 0.5


class Meter:
    """Of one run. latencies, refault_bytes: so far."""

    def __init__(self, trace: Path, files: list[Path], sections: list[Section]) -> None:
        """sections: where the guest sees which bytes of files."""
        self.latencies = Latencies()
        self._reader = TraceReader(trace)
        self._files = files
        self._sections = sections
        self._refaults = [Refaults() for _ in files]
        # Released in the name of a ring's chain that was not answered when last looked: it may not have happened yet.
        self._unanswered: dict[int | None, list[Span]] = defaultdict(list)

    @property
    def refault_bytes(self) -> int:
        """Released and touched again soon, of all files."""
        return sum(one.bytes for one in self._refaults)

    async def run(self, now: float) -> None:
        """Look for ever. now: seconds of the run at the moment."""
        loop = asyncio.get_running_loop()
        offset = now - loop.time()
        while True:
            self.look(loop.time() + offset)
            await asyncio.sleep(LOOK_SECONDS)

    def look(self, seconds: float) -> None:
        """Take a look at this second of the run. Raises UsageError for a damaged trace, OSError where QEMU has ended."""
        released: dict[int, list[Span]] = defaultdict(list)
        for record in self._reader.records():
            self.latencies.take(record)
            for span in self._answered(record):
                for file, offsets in in_file(span, self._sections):
                    released[file].append(offsets)
        for number, (path, refaults) in enumerate(zip(self._files, self._refaults, strict=True)):
            refaults.look(seconds, released[number], [Span(*extent) for extent in ram.held(path)])

    def _answered(self, record: Record) -> list[Span]:
        """Return the guest physical ranges that this record shows to be released."""
        match record.kind:
            case Kind.RELEASE:
                self._unanswered[record.ring].append(Span(record.value.address, record.value.length))
            case Kind.ANSWER:
                return self._unanswered.pop(record.ring, [])
            case Kind.RING_STOPPED | Kind.GUEST:
                self._unanswered.clear()
        return []
