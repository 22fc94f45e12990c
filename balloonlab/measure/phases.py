"""Carries the phases of a scenario out on a rig that runs, one after another, and notes what each cost.

It boots, fills and frees, and waits for plateaus; it judges nothing. A phase that cannot be carried out because of the
guest raises PhaseError, which says how the run has ended; whatever else ends a run comes from the rig and the sampler.
A phase's deadline is that of what it has the guest do, and anew that of the plateau after it. runner.py drives it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from balloonlab.errors import LabError
from balloonlab.measure.curve import gib_minutes, peak
from balloonlab.measure.report import Check, Ending, PhaseResult
from balloonlab.measure.scenario import Boot, Churn, Command, DropCaches, Fill, Free, Idle, Phase
from balloonlab.rig import Rig
from balloonlab.sampler import GUEST_SECONDS, Sampler
from balloonlab.sizes import human
from balloonlab.timeline import quiet_seconds
from guest_images.agent_client import Ran
from guest_images.errors import AgentRefusedError, AgentTimeoutError

# What the agent says of a process that was killed, and what Linux and Python say of memory that there is none of.
_NO_MEMORY = (
    "OOM killer",
    "its process was killed",
    "Cannot allocate memory",
    "MemoryError",
    "No space left",
)


Value = TypeVar("Value")


class PhaseError(LabError):
    """A phase has failed by what the guest did; its text says what, ending what that makes of the run."""

    def __init__(self, ending: Ending, why: str) -> None:
        super().__init__(why)
        self.ending: Ending = ending


class Phases:
    """Of one run. done: the phases that have come to their end. freed: when the last free began to wait, and its phase."""

    def __init__(
        self,
        rig: Rig,
        sampler: Sampler,
        folder: Path,
        *,
        report_delay_ms: int | None = None,
        before_free: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        """folder: where the output of commands goes. report_delay_ms: the guest's own, between two passes.

        before_free: what is done with the handle of a fill that is about to be freed.
        """
        self.done: list[PhaseResult] = []
        self.boot_seconds: float | None = None
        self.command_seconds: float | None = None
        self.command_status: int | None = None
        self.freed: float | None = None
        self.held: list[int] = []
        self._rig = rig
        self._sampler = sampler
        self._folder = folder
        self._before_free = before_free
        self._quiet = quiet_seconds(report_delay_ms)
        self._fills = 0

    async def carry_out(self, phase: Phase) -> PhaseResult:
        """Carry one phase out. Raises PhaseError, and whatever explains the end or the silence of guest, QEMU or device."""
        # A boot begins with QEMU and the device, a moment before there is anything to look at.
        begin = 0.0 if isinstance(phase, Boot) else self._sampler.now()
        self._sampler.phase = phase.name
        settled = await self._act(phase)
        last = await self._sampler.whole_look()
        result = PhaseResult(
            name=phase.name,
            do=str(phase.__struct_config__.tag),
            begin=begin,
            seconds=last.seconds - begin,
            footprint_gib_minutes=gib_minutes(self._sampler.samples, begin, last.seconds),
            peak_bytes=peak(self._sampler.samples, begin, last.seconds),
            end_bytes=last.footprint_bytes,
            settled=settled,
        )
        self.done.append(result)
        return result

    async def _act(self, phase: Phase) -> bool | None:
        """Do what the phase is. Returns whether it settled, None where nothing was waited for."""
        match phase:
            case Boot():
                await self._rig.boot(deadline=phase.deadline)
                self.boot_seconds = self._sampler.now()
                return None
            case Idle():
                return await self._plateau(self._sampler.now(), phase.deadline)
            case Fill():
                await self._hold(phase)
                return None
            case Churn():
                await self._churn(phase)
                return None
            case Free():
                return await self._free(phase)
            case DropCaches():
                dropping = self._rig.agent.drop_caches(deadline=phase.deadline)
                await self._in_time(phase, _memory(dropping, "caches cannot be dropped"))
                return await self._plateau(self._sampler.now(), phase.deadline)
            case Command():
                return await self._run(phase)

    async def _plateau(self, since: float, deadline: float) -> bool:
        """Wait for a plateau of the guest's own passes. Returns whether it came to that."""
        return await self._sampler.plateau(since, deadline, self._quiet)

    # Memory

    async def _hold(self, phase: Fill) -> None:
        self.held.append(await self._fill(phase, phase.deadline))
        end = self._sampler.now() + phase.hold
        while self._sampler.now() < end:
            await asyncio.sleep(min(GUEST_SECONDS / 2, phase.hold))

    async def _fill(self, phase: Fill | Churn, deadline: float) -> int:
        """Fill and return the handle. Each has contents of its own."""
        self._fills += 1
        filling = self._rig.agent.fill(phase.kind, phase.size, seed=self._fills, deadline=deadline)
        filled = _memory(filling, f"{human(phase.size)} cannot be filled")
        return (await self._in_time(phase, filled)).handle

    async def _churn(self, phase: Churn) -> None:
        end = self._sampler.now() + phase.deadline
        for done in range(phase.rounds):
            if (left := end - self._sampler.now()) <= 0:
                why = f"{phase.name}: {done} of {phase.rounds} rounds within {phase.deadline:g} s: raise its deadline"
                raise PhaseError("command-failed", why)
            handle = await self._fill(phase, left)
            await self._let_go(phase, handle, end)

    async def _free(self, phase: Free) -> bool:
        end = self._sampler.now() + phase.deadline
        while self.held:
            await self._let_go(phase, self.held.pop(), end)
        self.freed = self._sampler.now()
        return await self._plateau(self.freed, phase.deadline)

    async def _let_go(self, phase: Free | Churn, handle: int, end: float) -> None:
        """Free what a handle holds, by this second of the run."""
        if self._before_free is not None:
            await _memory(self._before_free(handle), "what was held cannot be compared")
        freeing = self._rig.agent.free(handle, deadline=max(0.0, end - self._sampler.now()))
        await self._in_time(phase, _memory(freeing, "what was held cannot be freed"))

    async def _in_time(self, phase: Phase, work: Awaitable[Value]) -> Value:
        """Wait for what the guest has a deadline for. One that answers otherwise is slow, and does not hang."""
        try:
            return await work
        except AgentTimeoutError as error:
            await self._rig.agent.ping()
            why = f"{phase.name}: not done within {phase.deadline:g} s, and the guest answers: raise its deadline"
            raise PhaseError("command-failed", why) from error

    # Commands

    async def _run(self, phase: Command) -> bool | None:
        began = time.monotonic()
        try:
            running = self._rig.agent.run(phase.command, deadline=phase.deadline)
            ran = await self._in_time(phase, running)
        except AgentRefusedError as error:
            raise PhaseError("command-failed", f"{phase.name}: {phase.command!r}: {error}") from error
        self.command_seconds = (self.command_seconds or 0.0) + time.monotonic() - began
        self.command_status = ran.status
        # Whatever a phase is called, this is no other file of the run's.
        (self._folder / f"run-{phase.name}.log").write_text(ran.stdout + ran.stderr)
        if ran.status != phase.status:
            raise PhaseError("command-failed", _failure(phase, ran))
        return await self._plateau(self._sampler.now(), phase.deadline) if phase.settle else None


def settled_checks(phases: Sequence[Phase], done: Sequence[PhaseResult]) -> list[Check]:
    """Return a check for each phase that waited for a plateau: figures of a guest that still changes are of chance."""
    deadlines = {phase.name: phase.deadline for phase in phases}
    return [
        Check(name=f"{one.name} settles", outcome="pass")
        if one.settled
        else Check(
            name=f"{one.name} settles",
            outcome="fail",
            message=f"still changing after {deadlines[one.name]:g} s: raise its deadline",
        )
        for one in done
        if one.settled is not None
    ]


def _failure(phase: Command, ran: Ran) -> str:
    lines = (ran.stderr.strip() or ran.stdout.strip()).splitlines()
    said = f": {lines[-1]}" if lines else ""
    return f"{phase.name}: {phase.command!r} ended with status {ran.status}, {phase.status} is right{said}"


async def _memory(work: Awaitable[Value], what: str) -> Value:
    """Wait for what needs the guest's memory; that it has too little is how the run ends."""
    try:
        return await work
    except AgentRefusedError as error:
        ending: Ending = (
            "out-of-memory" if any(word in str(error) for word in _NO_MEMORY) else "command-failed"
        )
        raise PhaseError(ending, f"{what}: {error}") from error
