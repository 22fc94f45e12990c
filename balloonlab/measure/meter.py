"""Reads, while a run goes on, what its device's trace and the map of guest RAM tell together: latencies and refaults.

It only looks, twice a second at most: the trace since the last look, then the map of each RAM file, in this order, so that
what a look finds was there after all that it knows to be released. Used by runner.py; arms without our device have no trace.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from functools import partial
from pathlib import Path

from balloonlab.decode import Record, TraceReader
from balloonlab.errors import UsageError
from balloonlab.measure.latency import Latencies
from balloonlab.measure.looking import held_places, in_thread, pause
from balloonlab.measure.ranges import Places
from balloonlab.measure.refault import Refaults
from hostdev.pages import Span
from hostdev.wire.trace import Kind
from qmp_glue.errors import VmError

LOOK_SECONDS = 0.5


class Meter:
    """Of one run. latencies, refaults: so far. fault: why the trace is not whole, if it is not."""

    def __init__(self, trace: Path, files: list[Path], places: Places) -> None:
        """places: where the guest sees which bytes of files."""
        self.latencies = Latencies()
        self.refaults = Refaults()
        self.fault: str | None = None
        self._reader = TraceReader(trace)
        self._files = files
        self._places = places
        self._looking = asyncio.Lock()
        # What was released before the first look is of any age.
        self._is_first = True
        # Released in the name of a ring's chain that was not answered when last looked: it may not have happened yet.
        self._unanswered: dict[int | None, list[Span]] = defaultdict(list)

    async def run(self, now: float) -> None:
        """Look until cancelled, or until QEMU has ended. now: seconds of the run at the moment."""
        loop = asyncio.get_running_loop()
        offset = now - loop.time()
        while True:
            began = loop.time()
            try:
                await self.look(began + offset)
            except VmError:
                return
            await asyncio.sleep(pause(loop.time() - began, LOOK_SECONDS))

    async def look(self, seconds: float) -> None:
        """Take a look at this second of the run, beside the loop. Raises VmError where QEMU has ended."""
        async with self._looking:
            await in_thread(partial(self.look_now, seconds))

    def look_now(self, seconds: float) -> None:
        """Take a look at this second of the run. Raises OSError where QEMU has ended."""
        released: list[Span] = []
        try:
            for record in self._reader.records() if self.fault is None else ():
                self.latencies.take(record)
                released += self._answered(record)
        except UsageError as error:
            self.fault = str(error)
        held = held_places(self._files)
        self.refaults.look(seconds, [] if self._is_first else self._places.of(released), held)
        self._is_first = False

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
