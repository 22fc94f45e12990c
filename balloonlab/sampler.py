"""Takes the samples of a run while phases go on: footprint ten times a second, guest and device twice.

It only looks: the footprint is one stat of the RAM file, the guest's numbers one small call to its agent. Used by
demo_run.py and measure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from balloonlab.errors import GuestHungError
from balloonlab.rig import Rig
from balloonlab.timeline import QUIET_SECONDS, Sample, has_settled
from guest_images.errors import AgentError, AgentGarbageError, AgentTimeoutError
from qmp_glue.errors import VmError

FOOTPRINT_SECONDS = 0.1
GUEST_SECONDS = 0.5
# A guest that is busy or short of memory has been seen to answer after 2 s; one that says nothing for so long, to calls
# that are given up after 15 s each, hangs.
HANG_SECONDS = 45.0

Value = TypeVar("Value")


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
        self._answered = 0.0

    def now(self) -> float:
        """Seconds since the run's start."""
        return time.monotonic() - self._start

    async def run(self) -> None:
        """Sample for ever. Ends by cancellation, or with what explains that device, QEMU or guest have ended or hang."""
        next_look = 0.0
        while True:
            await self._rig.check()
            self._check_answers()
            if self._rig.hello is not None and self.now() >= next_look:
                next_look = self.now() + GUEST_SECONDS
                await self.look()
            else:
                self._keep(Sample(self.now(), self.phase, self._rig.vm.footprint()))
            await asyncio.sleep(FOOTPRINT_SECONDS)

    async def during(self, work: Coroutine[Any, Any, Value]) -> Value:
        """Sample while a piece of work on the rig goes on. If the sampler ends first, what it ended with says why."""
        sampling = asyncio.create_task(self.run())
        working = asyncio.create_task(work)
        try:
            await asyncio.wait([working, sampling], return_when=asyncio.FIRST_COMPLETED)
            if sampling.done() and not working.done():
                sampling.result()
            return await working
        except (AgentError, VmError) as error:
            # Whoever noticed first: what has ended explains it better.
            if (why := await self._rig.why_ended()) is not None:
                raise why from error
            raise
        finally:
            await _end(working)
            await _end(sampling)

    def _check_answers(self) -> None:
        if self._rig.hello is None:
            self._answered = self.now()
        elif self.now() - self._answered > HANG_SECONDS:
            raise GuestHungError(
                f"the guest has answered nothing for {HANG_SECONDS:g} s; {self._rig.console_tail()}"
            )

    async def look(self) -> Sample:
        """Take one sample of everything. The guest's number is left out if the guest is too busy to answer.

        All else is of the moment after its answer: footprint, time and phase belong together however long that took.
        Raises AgentError for an answer that cannot be.
        """
        free = await self._guest_free()
        counters = self._rig.device.counters()
        sample = Sample(
            self.now(),
            self.phase,
            self._rig.vm.footprint(),
            free,
            counters.named_bytes,
            counters.released_bytes,
            counters.reports,
        )
        self._keep(sample)
        return sample

    async def whole_look(self) -> Sample:
        """Take a sample that has the guest's number."""
        while (sample := await self.look()).guest_memfree_bytes is None:
            await self._rig.check()
        return sample

    async def plateau(self, since: float, deadline: float, quiet: float = QUIET_SECONDS) -> bool:
        """Wait, beside run(), until nothing has changed for quiet seconds, and at most deadline seconds after since.

        Returns whether it came to that.
        """
        while not has_settled(self.samples, since, quiet):
            if self.now() - since >= deadline:
                return False
            await asyncio.sleep(GUEST_SECONDS / 2)
        return True

    async def _guest_free(self) -> int | None:
        asking = asyncio.ensure_future(self._rig.agent.meminfo())
        try:
            while not asking.done():
                # The guest may be slow; the footprint is not, and is sampled at its own pace meanwhile.
                await asyncio.wait([asking], timeout=FOOTPRINT_SECONDS)
                if not asking.done():
                    self._keep(Sample(self.now(), self.phase, self._rig.vm.footprint()))
            free = asking.result().get("MemFree")
        except AgentTimeoutError:
            return None
        else:
            self._answered = self.now()
            return self._checked(free)
        finally:
            asking.cancel()

    def _checked(self, free: int | None) -> int:
        memory = self._rig.setup.memory_bytes
        if free is None or not 0 <= free <= memory:
            raise AgentGarbageError(
                f"the guest says that {free} of its {memory} bytes are free (MemFree): its kernel or agent is broken"
            )
        return free

    def _keep(self, sample: Sample) -> None:
        self.samples.append(sample)
        self._watch(sample)


async def _end(task: asyncio.Task[Value]) -> None:
    """Cancel a task, wait for its end, and look at what it ended with, or asyncio complains that nobody did."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()
