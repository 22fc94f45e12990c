"""Takes the samples of a run while phases go on: footprint ten times a second, guest and device twice.

It only looks: the footprint is one stat of the RAM file, the guest's numbers one small call to its agent. Used by
demo.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from balloonlab.rig import Rig
from balloonlab.timeline import Sample
from guest_images.errors import AgentTimeoutError

FOOTPRINT_SECONDS = 0.1
GUEST_SECONDS = 0.5


class Sampler:
    """Samples a rig until cancelled. ``phase`` is whatever the experiment sets it to."""

    def __init__(
        self, rig: Rig, *, start: float, watch: Callable[[Sample], None] = lambda _sample: None
    ) -> None:
        """start: time.monotonic() of second 0. watch: called with each sample."""
        self.samples: list[Sample] = []
        self.phase = ""
        self._rig = rig
        self._start = start
        self._watch = watch

    def now(self) -> float:
        """Seconds since the run's start."""
        return time.monotonic() - self._start

    async def run(self) -> None:
        """Sample for ever. Ends by cancellation, or with what explains that device, QEMU or guest have ended."""
        next_look = 0.0
        while True:
            await self._rig.check()
            if self._rig.hello is not None and self.now() >= next_look:
                next_look = self.now() + GUEST_SECONDS
                await self.look()
            else:
                self._keep(Sample(self.now(), self.phase, self._rig.vm.footprint()))
            await asyncio.sleep(FOOTPRINT_SECONDS)

    async def look(self) -> Sample:
        """Take one sample of everything. The guest's number is left out if the guest is too busy to answer."""
        footprint = self._rig.vm.footprint()
        free = await self._guest_free()
        counters = self._rig.device.counters()
        sample = Sample(
            self.now(),
            self.phase,
            footprint,
            free,
            counters.named_bytes,
            counters.released_bytes,
            counters.reports,
        )
        self._keep(sample)
        return sample

    async def _guest_free(self) -> int | None:
        asking = asyncio.ensure_future(self._rig.agent.meminfo())
        try:
            while not asking.done():
                # The guest may be slow; the footprint is not, and is sampled at its own pace meanwhile.
                await asyncio.wait([asking], timeout=FOOTPRINT_SECONDS)
                if not asking.done():
                    self._keep(Sample(self.now(), self.phase, self._rig.vm.footprint()))
            return asking.result()["MemFree"]
        except AgentTimeoutError:
            return None
        finally:
            asking.cancel()

    def _keep(self, sample: Sample) -> None:
        self.samples.append(sample)
        self._watch(sample)
