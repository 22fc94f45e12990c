"""The command balloonlab fidelity: does the modelled guest predict a real one?

A real guest fills memory and frees it; the device's trace says what it reports, pass by pass. The model starts from the
free lists that the guest's /proc showed at the free, knows its order and delay and nothing of what followed, and is
compared with it. Nothing is fitted: also the moment of the first pass is the model's own. recording.py has what is
recorded and modelled, comparison.py the verdict, this file the experiment and the command.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, replace
from pathlib import Path

from balloonlab import signals
from balloonlab.comparison import Comparison, compare, sentences
from balloonlab.demo_run import DEFAULT_REPORTING_ORDER, MAX_ORDER, REPORTING_ORDER, Plan
from balloonlab.errors import GuestSetupError, UsageError
from balloonlab.options import Commands, add_fill_options, add_guest_options, guest_options
from balloonlab.progress import Progress
from balloonlab.recording import SCHEMA, Recording, modelled_passes, traced_passes
from balloonlab.results import write_json
from balloonlab.rig import Rig, Setup
from balloonlab.runs import environment, make_folder
from balloonlab.setup import prepare
from balloonlab.sizes import human, parse_size
from balloonlab.timeline import QUIET_SECONDS
from balloonlab.watcher import Nobody, Watcher
from guest_images.errors import AgentRefusedError
from guest_images.page_reporting import DEFAULT_DELAY, Pass
from guest_images.proc_state import ProcState
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS
from hostdev.wire.balloon import Feature

# A guest of 8 GiB and more reports for about 30 s; one that is not quiet after 90 s never will be.
SETTLE_SECONDS = 90.0
FOOTPRINT_SECONDS = 0.05
REPORTING_DELAY = "/sys/module/page_reporting/parameters/page_reporting_delay_ms"


class Experiment:
    """One real guest recorded around a free."""

    def __init__(self, rig: Rig, plan: Plan, folder: Path, watcher: Watcher | None = None) -> None:
        """rig: booted or about to be, with its device's trace in folder."""
        self._rig = rig
        self._plan = plan
        self._trace = folder / "device.trace"
        self._watcher: Watcher = watcher or Nobody()
        self._footprint: list[tuple[float, int]] = []

    async def record(self) -> Recording:
        """Settle, fill, settle, free, watch. Raises LabError, GuestError or QmpGlueError."""
        agent, setup = self._rig.agent, self._rig.setup
        kernel = (await agent.ping()).kernel
        order, delay = await self._order(), await self._delay()
        await self._settle("floor")
        filled = await agent.fill(self._plan.kind, self._plan.fill_bytes, seed=self._plan.seed)
        await self._settle("fill")
        before = await self._state()
        freed_at = time.time()
        await agent.free(filled.handle)
        after = await self._state()
        await self._settle("return", freed_at)
        return Recording(
            schema=SCHEMA,
            suite=setup.image.suite,
            kernel=kernel,
            memory_bytes=setup.memory_bytes,
            filled_bytes=self._plan.fill_bytes,
            fill_kind=self._plan.kind,
            order=order,
            delay=delay,
            before=before,
            after=after,
            passes=traced_passes(self._trace, freed_at, delay / 2),
            footprint=self._footprint,
        )

    async def _state(self) -> ProcState:
        agent = self._rig.agent
        return ProcState(await agent.read("/proc/zoneinfo"), await agent.read("/proc/pagetypeinfo"))

    async def _order(self) -> int:
        order = await self._parameter(REPORTING_ORDER, DEFAULT_REPORTING_ORDER)
        return order if 0 <= order <= MAX_ORDER else DEFAULT_REPORTING_ORDER

    async def _delay(self) -> float:
        """Seconds; Linux 7.3 can be asked, before that it is a constant."""
        return await self._parameter(REPORTING_DELAY, int(DEFAULT_DELAY * 1000)) / 1000

    async def _parameter(self, path: str, default: int) -> int:
        try:
            return int(await self._rig.agent.read(path))
        except (AgentRefusedError, ValueError):
            return default

    async def _settle(self, phase: str, since: float | None = None) -> None:
        """Wait until nothing was reported for QUIET_SECONDS, without a word to the guest. Raises GuestSetupError.

        since: from this moment on, in seconds since the epoch, the footprint is kept.
        """
        self._watcher.begin(phase)
        quiet_from = begun = time.monotonic()
        reports = self._reports()
        while time.monotonic() - quiet_from < QUIET_SECONDS:
            if time.monotonic() - begun > SETTLE_SECONDS:
                raise GuestSetupError(
                    f"the guest still reports after {SETTLE_SECONDS:.0f} s: give it less to do, or less memory"
                )
            await self._rig.check()
            if since is not None:
                self._footprint.append((time.time() - since, self._rig.vm.footprint()))
            if (now := self._reports()) != reports:
                quiet_from, reports = time.monotonic(), now
            await asyncio.sleep(FOOTPRINT_SECONDS)
        self._watcher.end(f"{human(self._rig.vm.footprint())} held by the host")

    def _reports(self) -> int:
        counters = self._rig.device.counters()
        if counters.features and not counters.features & Feature.REPORTING:
            raise GuestSetupError(
                "the guest does not report free pages, so there is nothing to compare: choose a kernel that does"
            )
        return counters.reports


# The command


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "fidelity",
        help="compare the modelled guest with a real one",
        description="Record a real guest's free page reports after a free, and compare them with the model's.",
    )
    add_guest_options(parser)
    add_fill_options(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Compared:
    """What a run leaves behind."""

    recording: Recording
    modelled: list[Pass]
    comparison: Comparison


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Run the command. Returns the exit status: 0 the model was right, 1 it was not."""
    plan = Plan(parse_size(options.fill), options.kind)
    guest = guest_options(options)
    if not 0 < plan.fill_bytes < guest.memory_bytes:
        raise UsageError(
            f"--fill {options.fill}: give more than nothing and less than --memory {options.memory}"
        )
    chosen = make_folder(options.out) if options.out is not None else None
    setup = prepare(guest, discard="auto", features="", progress=progress.say)
    folder = chosen or make_folder(None)
    compared = signals.run(_compared(replace(setup, trace=True), plan, folder, progress))
    write_json(environment(), folder / "meta.json")
    for line in sentences(compared.comparison):
        progress.say(line)
    progress.say(f"Figures and picture: {folder}")
    return EXIT_PASS if compared.comparison.passed else EXIT_CHECK_FAILED


async def _compared(setup: Setup, plan: Plan, folder: Path, watcher: Watcher) -> Compared:
    watcher.begin("boot")
    async with Rig(setup, folder) as rig:
        hello = await rig.boot()
        watcher.end(f"Linux {hello.kernel} answers")
        recording = await Experiment(rig, plan, folder, watcher).record()
    return conclude(recording, folder)


def conclude(recording: Recording, folder: Path) -> Compared:
    """Run the model, compare, and write recording.json, fidelity.json and fidelity.png. Raises LayoutError."""
    from balloonlab.fidelity_plot import draw_fidelity  # noqa: PLC0415  (matplotlib costs half a second)

    write_json(recording, folder / "recording.json")
    modelled = modelled_passes(recording, recording.parameters)
    comparison = compare(recording, modelled)
    write_json(comparison, folder / "fidelity.json")
    draw_fidelity(recording, modelled, folder / "fidelity.png")
    return Compared(recording, modelled, comparison)
