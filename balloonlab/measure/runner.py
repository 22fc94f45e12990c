"""One guest from boot to end, by a scenario: what happened to it is a Run, whatever that was.

A guest that panics, hangs, runs out of memory or fails its command is a result, and so is a QEMU or a device that dies
once the guest boots; only what keeps a run from beginning is raised. command.py and schedule.py decide which runs there
are, and report.py what is kept of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from balloonlab.errors import DeviceError, GuestEndedError, GuestHungError
from balloonlab.measure import driver, tally
from balloonlab.measure.console import console_check, findings
from balloonlab.measure.evidence import read_findings
from balloonlab.measure.guest_setup import KERNEL_CHARACTERS, check_knobs
from balloonlab.measure.latency import histogram
from balloonlab.measure.meter import Meter
from balloonlab.measure.phases import PhaseError, Phases, settled_checks
from balloonlab.measure.ranges import Places
from balloonlab.measure.report import Check, Ending, Finding, Run
from balloonlab.measure.scenario import Arm, Boot, Scenario
from balloonlab.measure.verify import Verifier
from balloonlab.measure.verify_holes import trace_is_full
from balloonlab.printable import paragraph, printable
from balloonlab.rig import Rig, Setup
from balloonlab.sampler import Sampler
from balloonlab.sizes import human
from balloonlab.timeline import Sample, write_csv
from balloonlab.verdict import FREEING_NOTHING
from balloonlab.watcher import Nobody, Watcher
from guest_images.errors import AgentError, AgentRefusedError
from qmp_glue.commandline import arguments
from qmp_glue.errors import DeadlineError, VmError

# The guest's kernel log, as it was at the end of the run.
LOG = "dmesg.log"
# What a run may end by, once its guest boots.
_ENDED = (PhaseError, GuestHungError, GuestEndedError, DeviceError, VmError, AgentError)
# Endings that a panic explains, and those that an OOM kill does.
_PANIC_EXPLAINS: tuple[Ending, ...] = ("guest-ended", "hung", "qemu-ended", "out-of-memory", "command-failed")
_OOM_EXPLAINS: tuple[Ending, ...] = ("measured", "no-driver", "hung", "guest-ended", "command-failed")
# Why a run ended: eight lines of a console and what they are, in a table beside others.
WHY_CHARACTERS = 1000
# The name of the check that the trace is whole.
TRACE = "trace"


@dataclass(frozen=True)
class Order:
    """A run to be made. setup: of its arm. folder: an empty one, for its files; name: what the report calls it."""

    scenario: Scenario
    setup: Setup
    arm: Arm
    number: int
    folder: Path
    verify: bool = False

    @property
    def name(self) -> str:
        """What the run's folder is called in the report, and what people see of it."""
        return self.folder.name


class Runner:
    """Makes one run. samples: so far, whatever happened."""

    def __init__(self, order: Order, watcher: Watcher | None = None) -> None:
        self.samples: list[Sample] = []
        self._order = order
        self._watcher: Watcher = watcher or Nobody()
        self._figures: tally.Figures = {}
        self._checks: list[Check] = []
        self._phases: Phases | None = None
        self._meter: Meter | None = None
        self._driver_missing: str | None = None
        self._kernel = ""
        self._log = ""

    async def run(self) -> Run:
        """Make the run. Raises LabError, GuestError or QmpGlueError where it cannot begin."""
        began = time.monotonic()
        self._watcher.begin("boot")
        try:
            async with Rig(self._order.setup, self._order.folder) as rig:
                ending, why = await self._explained(rig, began)
                self._argv = _command_lines(rig)
                self._check_trace(rig)
        finally:
            self._keep_files()
        return self._result(ending, why, self._found(rig.console))

    async def _explained(self, rig: Rig, began: float) -> tuple[Ending, str]:
        """Carry the scenario out and return how that ended."""
        sampler = Sampler(rig, start=began, watch=self._watcher.sample)
        self.samples = sampler.samples
        verifier = Verifier(rig, self._order.folder) if self._order.verify else None
        try:
            async with _watched(verifier):
                await sampler.during(self._carry_out(rig, sampler, verifier))
        except _ENDED as error:
            if verifier is not None:
                self._checks.append(await verifier.prove_holes())
            return ending_of(error), str(error)
        if verifier is not None:
            self._watcher.begin("verify")
            self._checks += await verifier.conclude()
            self._watcher.end(_count_proofs(self._checks))
        if self._driver_missing is not None:
            return "no-driver", self._driver_missing
        return "measured", ""

    async def _carry_out(self, rig: Rig, sampler: Sampler, verifier: Verifier | None) -> None:
        scenario = self._order.scenario
        phases = Phases(
            rig,
            sampler,
            self._order.folder,
            report_delay_ms=scenario.guest.page_reporting_delay_ms,
            before_free=verifier.compare if verifier is not None else None,
        )
        self._phases = phases
        async with contextlib.AsyncExitStack() as stack:
            for phase in scenario.phases:
                self._watcher.begin(phase.name)
                done = await phases.carry_out(phase)
                self._watcher.end(f"{human(done.end_bytes)} held by the host")
                if isinstance(phase, Boot):
                    await self._booted(rig)
                    await stack.enter_async_context(self._metering(rig, sampler))
                    if verifier is not None:
                        await verifier.start()
                if verifier is not None:
                    await verifier.look(phase.name)
            if verifier is not None:
                for handle in phases.held:
                    await verifier.compare(handle)
            await self._end(rig, sampler)

    async def _booted(self, rig: Rig) -> None:
        """Look at the guest that has just come up."""
        assert rig.hello is not None
        self._kernel = printable(rig.hello.kernel, KERNEL_CHARACTERS)
        await check_knobs(rig.agent, self._order.scenario.guest)
        if self._order.arm != "off":
            self._driver_missing = await driver.missing(rig.agent)

    @contextlib.asynccontextmanager
    async def _metering(self, rig: Rig, sampler: Sampler) -> AsyncIterator[None]:
        """Have the meter look at our device while the context lasts."""
        if self._order.arm != "ours":
            yield
            return
        self._meter = Meter(rig.device.trace_file, rig.vm.ram_files, Places(await rig.vm.ram_sections()))
        async with _beside(self._meter.run(sampler.now())):
            yield

    async def _end(self, rig: Rig, sampler: Sampler) -> None:
        """Take what host and guest say at the end of the last phase."""
        ends = await tally.ends(rig, await sampler.whole_look())
        if self._meter is not None:
            await self._meter.look(ends.last.seconds)
        self._figures |= tally.of_ends(ends, self._order.setup.memory_bytes)
        with contextlib.suppress(AgentRefusedError):  # it has no dmesg, or no memory for it
            self._log = await rig.agent.dmesg()

    def _check_trace(self, rig: Rig) -> None:
        """Note that the trace is not whole: what it does not tell is not 0."""
        if self._meter is None:
            return
        if self._meter.fault is None and (said := trace_is_full(rig.device.log_text())):
            self._meter.fault = said
        if self._meter.fault is not None:
            message = f"latencies and refaults are not known: {printable(self._meter.fault, WHY_CHARACTERS)}"
            self._checks.append(Check(name=TRACE, outcome="fail", message=message))

    def _found(self, console: Path) -> list[Finding]:
        """Return what is found on the console, and in the guest's log what a quiet console does not show."""
        found = read_findings(console)
        shown = {_message(finding) for finding in found}
        logged = [finding for finding in findings(self._log) if _message(finding) not in shown]
        return found + [msgspec.structs.replace(finding, file=LOG) for finding in logged]

    def _keep_files(self) -> None:
        write_csv(self.samples, self._order.folder / "timeline.csv")
        if self._log:
            (self._order.folder / LOG).write_text(self._log)

    def _result(self, ending: Ending, why: str, found: list[Finding]) -> Run:
        ending, why = explain(ending, why, found)
        meter, phases = self._meter, self._phases
        if phases is not None:
            self._figures |= tally.of_phases(phases, self.samples)
            self._checks += settled_checks(self._order.scenario.phases, phases.done)
        if meter is not None:
            frees = self._order.setup.discard not in FREEING_NOTHING
            self._figures |= tally.of_meter(meter, self.samples, frees=frees)
        return Run(
            arm=self._order.arm,
            number=self._order.number,
            folder=self._order.name,
            ending=ending,
            why=paragraph(why, WHY_CHARACTERS),
            kernel=self._kernel,
            figures=self._figures,
            phases=phases.done if phases is not None else [],
            release_latency=histogram(meter.latencies.seconds)
            if meter is not None and meter.fault is None
            else None,
            findings=found,
            checks=[console_check(found), *self._checks],
            counted=not self._order.verify,
            qemu_argv=self._argv[0],
            device_argv=self._argv[1],
        )


@contextlib.asynccontextmanager
async def _watched(verifier: Verifier | None) -> AsyncIterator[None]:
    """Have what is to be verified looked at again and again while the context lasts."""
    if verifier is None:
        yield
        return
    async with _beside(verifier.watch()):
        yield


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do a piece of work while the context lasts; it is cancelled at the end. What it raised by itself is raised then."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def _command_lines(rig: Rig) -> tuple[list[str], list[str]]:
    """Return what QEMU and the device were started with."""
    ours = rig.setup.balloon == "vhost-user"
    return [*rig.setup.qemu.argv, *arguments(rig.machine)], rig.device.argv(3) if ours else []


def _count_proofs(checks: list[Check]) -> str:
    """Return how the proofs have gone, in words."""
    counts = {word: sum(check.outcome == word for check in checks) for word in ("pass", "fail", "skip")}
    return f"{counts['pass']} proofs hold, {counts['fail']} do not, {counts['skip']} could not be made"


def _message(finding: Finding) -> str:
    """Return a kernel's line without the time, which its log may have and its console not."""
    return finding.text.rpartition("] ")[2]


def ending_of(error: BaseException) -> Ending:
    """Return what an error makes of a run."""
    match error:
        case PhaseError():
            return error.ending
        case GuestEndedError():
            return "guest-ended"
        case DeviceError():
            return "device-ended"
        case AgentRefusedError():
            return "command-failed"
        case DeadlineError():
            return "hung"
        case VmError():
            return "qemu-ended"
    return "hung"


def explain(ending: Ending, why: str, found: Sequence[Finding]) -> tuple[Ending, str]:
    """Return the ending that what the kernel said explains better, if any does, and why with the line that decided."""
    first = {finding.kind: finding.text for finding in reversed(found)}
    if "panic" in first and ending in _PANIC_EXPLAINS:
        return "panicked", _joined(first["panic"], why)
    if "oom-kill" in first and ending in _OOM_EXPLAINS:
        return "out-of-memory", _joined(first["oom-kill"], why)
    return ending, why


def _joined(line: str, why: str) -> str:
    return f"{line}; {why}" if why else line
