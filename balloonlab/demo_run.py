"""One guest measured from boot to the end: boot, settle, fill, free, settle again.

The experiment itself, without a screen, files or a verdict on the command line: demo.py has those, and guest tests call
this directly. Deadlines bound every phase; a guest that never reports is a result, not a hang.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from balloonlab import process
from balloonlab.device import Counters
from balloonlab.errors import GuestSetupError
from balloonlab.results import SCHEMA, DeviceResult, GuestResult, QemuResult, Result
from balloonlab.rig import Rig, Setup
from balloonlab.sampler import GUEST_SECONDS, Sampler
from balloonlab.sizes import human
from balloonlab.timeline import SETTLE_SECONDS, Sample, settle_seconds
from balloonlab.verdict import FREEING_NOTHING, RETURNED_SHARE, judge
from balloonlab.watcher import Nobody, Watcher
from guest_images.agent_client import FillKind
from guest_images.errors import AgentRefusedError
from hostdev.wire.balloon import Feature

# "within 45 s of the free": what this project promises of a guest of 1 GiB. A run that has settled with less than its
# share is watched for the whole time: pages in the guest's per-CPU lists and small blocks take their time to merge.
RETURN_SECONDS = 45.0
# Peak is what is seen while the memory is held: long enough for two looks at the guest.
HOLD_SECONDS = 2.0
# What the guest reports is blocks of this order and more, where it does not say otherwise: pageblock_order on x86.
DEFAULT_REPORTING_ORDER = 9
REPORTING_ORDER = "/sys/module/page_reporting/parameters/page_reporting_order"
MAX_ORDER = 10
PAGE_SHIFT = 12


@dataclass(frozen=True)
class Plan:
    """What to do with the guest."""

    fill_bytes: int
    kind: FillKind = "anonymous"
    seed: int = 1
    hold_at_end: float = 0.0


@dataclass
class Measured:
    """A run so far. ``result`` is there once it is complete; the samples are there whatever happened."""

    samples: list[Sample] = field(default_factory=list)
    result: Result | None = None
    qemu_argv: list[str] = field(default_factory=list)
    device_argv: list[str] = field(default_factory=list)
    ram_file: str = ""


@dataclass(frozen=True)
class _Marks:
    """The moments that a result is made of. CPU time is the device's, from the fill to the end."""

    floor: Sample
    peak_bytes: int
    before: Sample
    last: Sample
    small_bytes: int
    freed_at: float
    cpu_seconds: float
    cpu_share: float


class Measurement:
    """One run of a plan on a set-up."""

    def __init__(self, setup: Setup, plan: Plan, folder: Path, watcher: Watcher | None = None) -> None:
        self._setup = setup
        self._plan = plan
        self._folder = folder
        self._watcher: Watcher = watcher or Nobody()
        self.measured = Measured()

    async def run(self) -> Result:
        """Boot, fill, free, measure. Raises LabError, GuestError or QmpGlueError; the samples stay in ``measured``."""
        start = time.monotonic()
        self._watcher.begin("boot")
        async with Rig(self._setup, self._folder) as rig:
            return await self.on(rig, start=start)

    async def on(self, rig: Rig, *, start: float | None = None) -> Result:
        """Measure on a rig that runs already, and leave it running. start: time.monotonic() of second 0."""
        self._rig = rig
        self._remember_commands()
        began = time.monotonic() if start is None else start
        self._sampler = Sampler(rig, start=began, watch=self._watcher.sample)
        self._sampler.phase = "boot"
        self.measured.samples = self._sampler.samples
        return await self._sampler.during(self._phases())

    def _remember_commands(self) -> None:
        process_argv = Path(f"/proc/{self._rig.vm.pid}/cmdline").read_bytes()
        self.measured.qemu_argv = [word.decode() for word in process_argv.split(b"\0")[:-1]]
        if self._setup.balloon == "vhost-user":
            self.measured.device_argv = self._rig.device.argv(3)
        self.measured.ram_file = str(self._rig.vm.ram_file)

    # Phases

    async def _phases(self) -> Result:
        self._kernel = (await self._rig.boot()).kernel
        await self._check_room()
        self._watcher.end(
            f"Linux {self._kernel} answers, the host holds {human(self._rig.vm.footprint())} of it"
        )
        floor = await self._settle("floor", SETTLE_SECONDS)
        self._watcher.end(f"the guest has reported what it does not use: {human(floor.footprint_bytes)} held")
        cpu = self._rig.device.cpu_seconds() if self._with_device else 0.0
        began = self._sampler.now()
        handle, peak, before = await self._fill()
        small = await self._small_blocks()
        freed_at = await self._free(handle)
        last = await self._returned(peak, before, freed_at)
        self._watcher.end(f"{human(last.footprint_bytes)} held")
        small = await self._small_blocks() - small
        usage = (self._rig.device.cpu_seconds() - cpu) if self._with_device else 0.0
        share = usage / (self._sampler.now() - began)
        result = self._result(_Marks(floor, peak, before, last, small, freed_at, usage, share))
        self.measured.result = result
        if self._plan.hold_at_end:
            await self._hold()
        return result

    @property
    def _with_device(self) -> bool:
        return self._setup.balloon == "vhost-user"

    async def _check_room(self) -> None:
        """Refuse a fill that the guest cannot hold, rather than have its OOM killer end it."""
        available = (await self._rig.agent.meminfo())["MemAvailable"]
        if self._plan.fill_bytes > available:
            raise GuestSetupError(
                f"the guest has {human(available)} available, {human(self._plan.fill_bytes)} cannot be filled: "
                "fill less or give it more memory"
            )

    def _phase(self, name: str) -> None:
        self._sampler.phase = name
        self._watcher.begin(name)

    async def _settle(self, name: str, deadline: float, since: float | None = None) -> Sample:
        """Wait until nothing changes any more, at most deadline seconds, and take a whole sample then."""
        self._phase(name)
        start = self._sampler.now() if since is None else since
        await self._sampler.plateau(start, deadline)
        return await self._sampler.whole_look()

    async def _returned(self, peak: int, before: Sample, freed_at: float) -> Sample:
        """Wait until the footprint has settled, and for the rest of RETURN_SECONDS if that is less than was promised."""
        last = await self._settle("return", RETURN_SECONDS, since=freed_at)
        while (
            self._setup.discard not in FREEING_NOTHING
            and self._reports()
            and self._sampler.now() - freed_at < RETURN_SECONDS
            and peak - last.footprint_bytes < RETURNED_SHARE * _regained(before, last)
        ):
            await asyncio.sleep(GUEST_SECONDS)
            last = await self._sampler.whole_look()
        return last

    async def _small_blocks(self) -> int:
        """Bytes that are free in the guest in blocks too small for it to report."""
        try:
            order = int(await self._rig.agent.read(REPORTING_ORDER))
        except (AgentRefusedError, ValueError):
            order = DEFAULT_REPORTING_ORDER  # before Linux 5.14 there is no such parameter
        if not 0 <= order <= MAX_ORDER:
            order = DEFAULT_REPORTING_ORDER  # -1: as the driver likes
        zones = (await self._rig.agent.buddyinfo()).values()
        return sum(count << (PAGE_SHIFT + n) for zone in zones for n, count in enumerate(zone[:order]))

    def _reports(self) -> bool:
        return bool(self._rig.device.counters().features & Feature.REPORTING)

    async def _fill(self) -> tuple[int, int, Sample]:
        """Fill and hold. Returns the handle, the peak in bytes and the last sample before the free."""
        self._phase("fill")
        filled = await self._rig.agent.fill(self._plan.kind, self._plan.fill_bytes, seed=self._plan.seed)
        mark = len(self._sampler.samples)
        end = self._sampler.now() + HOLD_SECONDS
        while self._sampler.now() < end:
            await asyncio.sleep(GUEST_SECONDS / 2)
        before = await self._sampler.whole_look()
        peak = max(sample.footprint_bytes for sample in self._sampler.samples[mark:])
        self._watcher.end(f"{human(filled.bytes)} in use in the guest: {human(peak)} held")
        return filled.handle, peak, before

    async def _free(self, handle: int) -> float:
        """Free. Returns when the guest had freed, in seconds of the run."""
        self._phase("free")
        await self._rig.agent.free(handle)
        freed_at = self._sampler.now()
        self._watcher.end(f"{human(self._plan.fill_bytes)} freed in the guest")
        return freed_at

    async def _hold(self) -> None:
        self._phase("hold")
        end = self._sampler.now() + self._plan.hold_at_end
        while self._sampler.now() < end:
            await self._rig.check()
            await asyncio.sleep(GUEST_SECONDS / 2)
        self._watcher.end(f"guest RAM was {self.measured.ram_file}")

    # Result

    def _result(self, marks: _Marks) -> Result:
        counters = self._rig.device.counters()
        residual = marks.last.footprint_bytes
        regained = _regained(marks.before, marks.last)
        result = Result(
            schema=SCHEMA,
            passed=True,
            notes=[],
            floor_bytes=marks.floor.footprint_bytes,
            peak_bytes=marks.peak_bytes,
            residual_bytes=residual,
            returned_bytes=marks.peak_bytes - residual,
            settle_seconds=settle_seconds(self._sampler.samples, marks.freed_at),
            filled_bytes=self._plan.fill_bytes,
            fill_kind=self._plan.kind,
            device=self._device_result(counters, marks),
            guest=GuestResult(
                suite=self._setup.image.suite,
                kernel=self._kernel,
                memory_bytes=self._setup.memory_bytes,
                memfree_regained_bytes=regained,
                small_blocks_bytes=marks.small_bytes,
            ),
            qemu=QemuResult(
                version=self._setup.qemu.version,
                accelerator=self._setup.accelerator,
                anonymous_bytes=process.anonymous_bytes(self._rig.vm.pid),
            ),
        )
        notes = judge(result)
        return msgspec.structs.replace(result, notes=notes, passed=not notes)

    def _device_result(self, counters: Counters, marks: _Marks) -> DeviceResult:
        methods = ("remove", "dontneed")
        by_method = {method: counters.total("released_bytes_total", method=method) for method in methods}
        return DeviceResult(
            discard=self._setup.discard,
            released_bytes=counters.released_bytes,
            withheld_bytes=counters.named_bytes - counters.released_bytes,
            released_bytes_by_method={method: size for method, size in by_method.items() if size},
            reports=counters.reports,
            buffers=counters.buffers,
            cpu_seconds=marks.cpu_seconds,
            cpu_share=marks.cpu_share,
            proportional_bytes=self._rig.device.proportional_bytes() if self._with_device else 0,
            negotiated_features=[feature.name or "" for feature in Feature if feature & counters.features],
        )


def _regained(before: Sample, last: Sample) -> int:
    """Bytes that the guest's MemFree gained between two samples that have it."""
    return (last.guest_memfree_bytes or 0) - (before.guest_memfree_bytes or 0)
