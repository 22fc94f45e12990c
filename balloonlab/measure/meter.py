"""Reads, while a run goes on, what its device's trace and the map of guest RAM tell together: latencies and refaults.

It only looks, twice a second: the trace since the last look, then the map of each RAM file, in this order, so that what a
look finds was there after all that it knows to be released. Used by runner.py; arms without our device have no trace.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path

from balloonlab.decode import Record, TraceReader
from balloonlab.measure.latency import Latencies
from balloonlab.measure.ranges import Places, in_file
from balloonlab.measure.refault import Refaults
from hostdev.pages import Span
from hostdev.wire.trace import Kind
from qmp_glue import ram

LOOK_SECONDS = 0.5


class Meter:
    """Of one run. latencies, refaults: so far."""

    def __init__(self, trace: Path, files: list[Path], places: Places) -> None:
        """places: where the guest sees which bytes of files."""
        self.latencies = Latencies()
        self.refaults = Refaults()
        self._reader = TraceReader(trace)
        self._files = files
        self._places = places
        # Released in the name of a ring's chain that was not answered when last looked: it may not have happened yet.
        self._unanswered: dict[int | None, list[Span]] = defaultdict(list)

    async def run(self, now: float) -> None:
        """Look for ever. now: seconds of the run at the moment."""
        loop = asyncio.get_running_loop()
        offset = now - loop.time()
        while True:
            self.look(loop.time() + offset)
            await asyncio.sleep(LOOK_SECONDS)

    def look(self, seconds: float) -> None:
        """Take a look at this second of the run. Raises UsageError for a damaged trace, OSError where QEMU has ended."""
        released: list[Span] = []
        for record in self._reader.records():
            self.latencies.take(record)
            released += self._answered(record)
        held = [span for number, path in enumerate(self._files) for span in in_file(number, ram.held(path))]
        self.refaults.look(seconds, self._places.of(released), held)

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
