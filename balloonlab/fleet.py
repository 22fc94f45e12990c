"""Many modelled guests in step on one event loop, each with a device of its own as far as this machine goes.

Used by simulate.py and sweep.py. What a guest is and does is guest_images'; here is how many of them live together:
devices, the memory they may really take, samples, figures. Not here: options, folders, tables.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from balloonlab.errors import DeviceError, UsageError
from balloonlab.fleet_timeline import FallWatch, FleetSample, Spread
from balloonlab.signals import ENDING
from guest_images.block_model import BlockGuest
from guest_images.charged_pages import ChargedPages, MemoryLimit
from guest_images.event_loop import EventLoop
from guest_images.free_lists import PAGE_SIZE
from guest_images.guest_pages import MappedPages, PageCheckError
from guest_images.modelled_guest import RING_BYTES, ModelledGuest, accounted_guest, zones_of
from guest_images.page_reporting import Parameters
from guest_images.workloads import workload
from hostdev.driver import FrontendError, GuestMemory
from hostdev.frontend import DeviceProcess, Frontend, start_device

# Two processes a device: more would crowd out an ordinary machine (3 MB of its own each) for nothing new.
MAX_DEVICES = 256
# A front end's: connection, memory and its mapping, two eventfds a ring, the back end channel; and some of ours.
_DESCRIPTORS_PER_GUEST = 16
_OTHER_DESCRIPTORS = 64
# Linux's reporting ring of QEMU's device has 128 entries; longer scatterlists need a longer ring.
_RING_SIZE = 128
# A guest's seed is the run's and its own number: room for so many guests.
_SEED_SHIFT = 32


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What is to be simulated. Times in seconds of simulated time, sizes in bytes.

    resident_limit: what the guests may really take of this host's memory; 0 for no devices at all. reporting: off for
    the comparison with guests that report nothing. model: of MODELS; blocks have no pages to check, and so no devices.
    """

    guests: int
    memory_bytes: int
    workload: str
    parameters: Parameters
    duration: float
    seed: int = 1
    resident_limit: int = 0
    sample_seconds: float = 1.0
    reporting: bool = True
    model: str = "pages"

    @property
    def devices(self) -> int:
        """Number of guests that get a device: the first ones; none without memory for them, or without pages."""
        return min(self.guests, MAX_DEVICES) if self.resident_limit and self.model == "pages" else 0


@dataclass
class FleetRun:
    """What came out, also of a run that did not come to its end. cpu_seconds: of all device processes."""

    plan: FleetPlan
    samples: list[FleetSample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    settle_seconds: list[float] = field(default_factory=list)
    passes: int = 0
    reports: int = 0
    reported_bytes: int = 0
    failed_allocations: int = 0
    uncharged_bytes: int = 0
    digest: str = ""
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0


Observer = Callable[[FleetSample], None]
MakeGuest = Callable[[FleetPlan, int, EventLoop], ModelledGuest]


def _by_pages(plan: FleetPlan, index: int, loop: EventLoop) -> ModelledGuest:
    """Make a page-exact guest without a device."""
    return accounted_guest(plan.memory_bytes, plan.parameters, loop=loop, seed=seed_of(plan, index))


def _by_blocks(plan: FleetPlan, index: int, loop: EventLoop) -> ModelledGuest:
    """Make a guest that counts by pageblocks, without a device."""
    return BlockGuest(plan.memory_bytes, plan.parameters, loop=loop, seed=seed_of(plan, index))


MODELS: dict[str, MakeGuest] = {"pages": _by_pages, "blocks": _by_blocks}


def seed_of(plan: FleetPlan, index: int) -> int:
    """The seed of guest number index."""
    return plan.seed << _SEED_SHIFT | index


def run_fleet(plan: FleetPlan, observe: Observer) -> FleetRun:
    """Run to the end, or to the first failed page check, which failures names.

    Raises DeviceError if a device does not start or answer, UsageError if this process may not open enough files.
    """
    run, begun, children = FleetRun(plan), time.monotonic(), _children_seconds()
    try:
        with _guests(plan) as guests:
            _live(run, guests, observe)
    except PageCheckError as error:
        run.failures.append(str(error))
    except FrontendError as error:
        raise DeviceError(f"a device does not answer: {error}; see what it said above") from error
    run.cpu_seconds = _children_seconds() - children
    run.wall_seconds = time.monotonic() - begun
    return run


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# Starting and ending


@contextlib.contextmanager
def _guests(plan: FleetPlan) -> Iterator[list[ModelledGuest]]:
    """All guests, on one loop. Devices come first: one forked later would hold the memory of guests before it."""
    loop, limit = EventLoop(), MemoryLimit(plan.resident_limit)
    _allow_descriptors(plan.devices * _DESCRIPTORS_PER_GUEST + _OTHER_DESCRIPTORS)
    with contextlib.ExitStack() as stack:
        with _only_errors_of_devices():
            devices = [_start(stack) for _ in range(plan.devices)]
        guests = [
            stack.enter_context(_connected(device, plan, index, loop, limit))
            for index, device in enumerate(devices)
        ]
        guests += [MODELS[plan.model](plan, index, loop) for index in range(plan.devices, plan.guests)]
        for index, guest in enumerate(guests):
            workload(plan.workload, index, plan.guests).start(guest)
            if not plan.reporting:
                guest.reporting.unregister()
        yield guests


@contextlib.contextmanager
def _only_errors_of_devices() -> Iterator[None]:
    """Devices that are forked here say nothing of front ends that come and go: they all do."""
    log = logging.getLogger("hostdev")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _start(stack: contextlib.ExitStack) -> DeviceProcess:
    """Start a device that stack ends. Signals wait meanwhile: one between fork and bookkeeping would leave it behind."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        return stack.enter_context(start_device())
    except OSError as error:
        raise DeviceError(
            f"no more processes for devices: {error.strerror}; give fewer --guests, or --resident-limit 0"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def _allow_descriptors(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed:
        return
    if hard < needed:
        raise UsageError(
            f"this process may open {hard} files and needs {needed}: raise ulimit -Hn, or give --resident-limit 0"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextlib.contextmanager
def _connected(
    device: DeviceProcess, plan: FleetPlan, index: int, loop: EventLoop, limit: MemoryLimit
) -> Iterator[ModelledGuest]:
    """A guest on a device, whose memory is charged as far as the limit goes."""
    parameters = plan.parameters
    ring_size = max(_RING_SIZE, 1 << (parameters.capacity - 1).bit_length())
    memory = GuestMemory(plan.memory_bytes + RING_BYTES)
    with Frontend(
        device.connect(), memory=memory, ring_size=ring_size, rings_at=plan.memory_bytes
    ) as frontend:
        frontend.start()
        pages = ChargedPages(MappedPages(frontend, plan.memory_bytes), limit, f"guest {index}")
        zones = zones_of(plan.memory_bytes, parameters.variant)
        guest = ModelledGuest(zones, parameters, pages, loop=loop, seed=seed_of(plan, index))
        try:
            yield guest
        finally:
            guest.close()


# Living


class _Watch:
    """One guest and what is remembered of it from sample to sample."""

    def __init__(self, guest: ModelledGuest) -> None:
        self.guest = guest
        self.falls = FallWatch(guest.memory_bytes)
        self._zone_bytes = sum(zone.pages for zone in guest.zones) * PAGE_SIZE
        self.passes = self.reports = self.reported_bytes = 0

    def look(self) -> tuple[int, int]:
        """Take the falls and the passes since the last look. Returns what is held and what is used, in bytes."""
        guest = self.guest
        held, used = guest.footprint_bytes, self._zone_bytes - guest.free_bytes
        self.falls.sample(guest.loop.now, used, held)
        for one in guest.passes[self.passes :]:
            self.reports += one.reports
            self.reported_bytes += one.bytes
        self.passes = len(guest.passes)
        return held, used


def _live(run: FleetRun, guests: list[ModelledGuest], observe: Observer) -> None:
    """Let all guests live in step, sample by sample, and take stock at the end."""
    loop, watches = guests[0].loop, [_Watch(guest) for guest in guests]
    try:
        for moment in moments(run.plan):
            loop.run_until(moment)
            sample = _sample(loop.now, watches)
            run.samples.append(sample)
            observe(sample)
        for guest in guests:
            guest.pages.verify()
    finally:
        _take_stock(run, watches)


def moments(plan: FleetPlan) -> Iterator[float]:
    """When samples are taken: from 0 s on, and at the end."""
    count = int(plan.duration / plan.sample_seconds)
    yield from (index * plan.sample_seconds for index in range(count + 1))
    if count * plan.sample_seconds < plan.duration:
        yield plan.duration


def _sample(now: float, watches: list[_Watch]) -> FleetSample:
    looks = [watch.look() for watch in watches]
    footprints = [held for held, _used in looks]
    pages = [watch.guest.pages for watch in watches]
    resident = [one.resident_bytes for one in pages if isinstance(one, ChargedPages)]
    return FleetSample(
        now,
        sum(footprints),
        sum(resident) if resident else None,
        sum(used for _held, used in looks),
        Spread.of(footprints),
        sum(watch.reports for watch in watches),
        sum(watch.reported_bytes for watch in watches),
    )


def _take_stock(run: FleetRun, watches: list[_Watch]) -> None:
    digest = hashlib.sha256()
    for watch in watches:
        guest = watch.guest
        watch.falls.end()
        run.settle_seconds += watch.falls.settle_seconds
        run.passes += len(guest.passes)
        run.reports += guest.reports
        run.reported_bytes += guest.reported_bytes
        run.failed_allocations += guest.failed_allocations
        if isinstance(guest.pages, ChargedPages):
            run.uncharged_bytes += guest.pages.uncharged_bytes
        digest.update(repr((guest.passes, guest.footprint_bytes)).encode())
    run.digest = digest.hexdigest()
