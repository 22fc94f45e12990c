"""The device model: features, and what a buffer on each queue asks for.

It knows nothing of sockets, eventfds or processes: session.py tells it what the front end set up, worker.py calls
service() for the rings that may have work and tick() when time has passed, and signals the guest when chains were
returned; commands.py tells it what people want. The config space is config_space.py's.

The way of one report: virtqueue pops a chain -> its entries become merged, whole-page ranges per region -> they are
given back in slices -> only then is the chain put back, with length 0, and the guest signalled. The guest keeps those
pages isolated until then; released one moment later they would hold live data.

One slice is bounded, so that a control message never waits for a whole report: QEMU holds its big lock while it does.
Stopping a ring in the middle of a chain abandons the chain: nothing more of it is released, and as it was not answered
the ring's base makes the guest's buffer be offered again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from hostdev import chains
from hostdev.config_space import ConfigSpace
from hostdev.discard import Discarder
from hostdev.errors import ChainError, RingError
from hostdev.giver import SLICE_BYTES, Giver
from hostdev.hinting import Hinting
from hostdev.jobs import Jobs
from hostdev.journal import Journal
from hostdev.memory import MemoryTable
from hostdev.metrics import Metrics, worth_logging
from hostdev.rings import Job, Ring, Rings, Step
from hostdev.statistics import Statistics
from hostdev.trace import Tracer
from hostdev.virtqueue import INDEX_MASK, Chain, RingLayout
from hostdev.wire.balloon import QUEUE_COUNT, Config, Feature, Role, names
from hostdev.wire.trace import Cause

log = logging.getLogger(__name__)

# Scattered single pages cost up to 30 us each while another CPU runs with the memory mapped: about 8 ms. A range of which
# nothing can be given back counts as one: a list of 16384 frame numbers that are in holes takes 30 ms to look up.
SLICE_CALLS = 256


# Workers that die with one chain, and chains that this happens with, until neither is tried any more. Two may be chance:
# somebody kills processes.
MAX_DEATHS = 3
MAX_DEADLY = 3
# A kind of guest error: a chain that workers died with.
DEADLY = "deadly"

_IDLE = Step(returned=False, more=False)


@dataclass
class Balloon:
    """One virtio-balloon. clock: seconds, monotonic; wall_clock: seconds since the epoch."""

    offered: Feature
    discarder: Discarder
    metrics: Metrics
    trace: Tracer = field(default_factory=Tracer)
    journal: Journal = field(default_factory=Journal)
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self._features = Feature(0)
        self.memory = MemoryTable()
        self.rings = Rings(self.trace, self.metrics)
        self.giver = Giver(self.discarder, self.metrics, self.trace)
        self.statistics = Statistics(self.clock, self.wall_clock)
        self.hinting = Hinting(self.clock)
        self._jobs = Jobs(self.metrics, self.hinting)
        self.space = ConfigSpace(lambda: self.hinting.shown_id)
        self.has_all_memory = False
        self._has_warned = False

    # What the session asks (vrings.Device)

    @property
    def offered_features(self) -> int:
        """Virtio feature bits."""
        return int(self.offered)

    @property
    def queue_count(self) -> int:
        """All five queues can be set up, whatever is negotiated."""
        return QUEUE_COUNT

    @property
    def keeps_off(self) -> bool:
        """True once guest memory is not touched any more."""
        return self.rings.are_closed

    def set_features(self, features: int) -> None:
        """Take over the negotiated features."""
        self._features = Feature(features)
        self._note_poison()
        self.metrics.gauges["negotiated_features"] = features
        log.info("the guest's driver accepted: %s", ", ".join(names(self._features)) or "no feature")
        if not self._features & Feature.REPORTING:
            log.warning("the driver does not report free pages: only a balloon brings its memory back")

    def set_memory(self, memory: MemoryTable) -> None:
        """Move every started ring over to another table, abandoning chains in progress."""
        layouts = self.rings.take_down()
        self.memory = memory
        self.giver.adopt(memory.regions)
        self.metrics.gauges["guest_memory_bytes"] = sum(region.size for region in memory.regions)
        self.rings.put_up(layouts, memory, self._features)
        self._note_memory()
        if not self._has_warned and any(region.may_shrink for region in memory.regions):
            self._has_warned = True
            log.info(
                "guest memory is not sealed against shrinking: if its file is cut short, this device's service ends"
            )

    def start_ring(self, index: int, layout: RingLayout, base: int) -> None:
        """Begin to use a ring. Raises RequestError if it cannot be as the front end says."""
        self.journal.begin_ring(index)
        self.rings.start(index, layout, base, self.memory, self._features)
        self._note_memory()

    def _note_memory(self) -> None:
        """A front end names memory region by region, and all of it before the first ring starts: one that runs shows that."""
        has_all = self.has_all_memory or bool(self.rings.started)
        self.has_all_memory = bool(self.memory.regions) and has_all
        if self.has_all_memory:
            self.space.settle(self.known_memory())

    def stop_ring(self, index: int) -> int | None:
        """Stop using a ring; a chain in progress and a held statistics buffer will be offered again."""
        self._end_hinting_on(index)
        return self.rings.stop(index)

    def abandon_ring(self, index: int) -> int | None:
        """Stop using a ring that cannot be stopped as it should be."""
        return self.rings.abandon(index)

    def _end_hinting_on(self, index: int) -> None:
        """A round does not outlive its ring: pause and reset look alike, and after a reset nobody would end it."""
        if self.rings.role(index) is Role.FREE_PAGE_HINT:
            self.end_hinting()

    def read_config(self, offset: int, size: int) -> bytes:
        """Return a piece of config space. Raises RequestError if it is not all inside."""
        return self.space.read(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take what a driver may write. Raises RequestError if it is not all inside."""
        self.space.write(offset, data)
        self._note_poison()

    def _note_poison(self) -> None:
        negotiated = bool(self._features & Feature.PAGE_POISON)
        self.giver.poisoned = negotiated and self.config.poison_val != 0

    # What the worker and the commands ask

    @property
    def features(self) -> Feature:
        """The negotiated features."""
        return self._features

    @property
    def config(self) -> Config:
        """The config space."""
        return self.space.config

    def known_memory(self) -> int:
        """Bytes of guest memory as QEMU's -m has them, 0 while the front end has not named all of it."""
        return self.memory.span() if self.has_all_memory else 0

    @property
    def is_running(self) -> bool:
        """True while the front end has a ring started: the guest's driver is up and the VM not paused."""
        return bool(self.rings.started)

    @property
    def inert(self) -> bool:
        """True once the device only answers and releases nothing."""
        return self.giver.inert

    def make_inert(self, why: str) -> None:
        """Release nothing from now on, but go on answering: the one state in which the guest is unharmed."""
        if not self.inert:
            self.giver.make_inert(why)
            self.end_hinting()
            self.journal.changed()

    def keep_off(self) -> None:
        """Touch no guest memory from now on but by pread, and serve no ring. Before any memory is known."""
        self.make_inert(
            "guest memory was cut short, or cannot be read: to touch it ends a worker (SIGBUS), and no ring is served any more"
        )
        self.rings.are_closed = True

    def begin_hinting(self) -> None:
        """Open a round of hinting; there must be none open."""
        self.hinting.begin()
        self.space.changed = True

    def end_hinting(self) -> None:
        """End the open round, if there is one: the guest is told DONE and gets its memory back."""
        if self.hinting.is_open:
            self.hinting.end()
            self.space.changed = True

    def due(self) -> float | None:
        """When tick() is to be called at the latest, by the clock; None for never."""
        return min(filter(None, (self.statistics.due, self.hinting.deadline)), default=None)

    def tick(self, ready: Collection[int]) -> set[int]:
        """Do what the time has come for. ready: the rings that may be used. Returns those to signal."""
        if self.hinting.is_over() or self.inert:
            self.end_hinting()
        if not self.statistics.is_due():
            return set()
        found = self.rings.find(Role.STATISTICS)
        if found is None or found[0] not in ready or found[1].held is None:
            self.statistics.note_asked(asked=False)
            return set()
        index, ring = found
        self.statistics.note_asked(asked=True)
        self._finish(index, ring, found[1].held)
        return {index}

    def service(self, index: int) -> Step:
        """Do one bounded piece of work on a ring. Raises RingError after stopping a ring that is broken."""
        ring = self.rings.started.get(index)
        if ring is None:
            return _IDLE
        self.metrics.scope = ring.counts
        try:
            return self._continue(index, ring) if ring.job else self._next(index, ring)
        except RingError as error:
            self.metrics.scope = None
            self._end_hinting_on(index)
            self.rings.give_up(index)
            self._count_guest_error("ring")
            raise RingError(f"ring {index} is broken and stops: {error}") from error
        finally:
            self.metrics.scope = None

    def _next(self, index: int, ring: Ring) -> Step:
        if ring.queue.is_empty:
            return _IDLE
        if self.journal.take_up(index, ring.queue.next_available) >= MAX_DEATHS:
            return self._pass_over(index, ring)
        try:
            chain = ring.queue.pop()
            if chain is None:
                return _IDLE
            return self._begin(index, ring, chain)
        except ChainError as error:
            if worth_logging(self._count_guest_error(error.kind)):
                log.warning("ring %d: %s; it is returned unused", index, error)
            self.trace.fault(index, str(error))
            if ring.held is not None:
                # In order, or the ring's base would name the wrong one of the two.
                self._finish(index, ring, ring.held)
            return self._finish(index, ring, error.head)

    def _pass_over(self, index: int, ring: Ring) -> Step:
        """Return a chain that workers die with, without a look at what it says."""
        head = ring.queue.take()
        if head is None:
            return _IDLE
        why = f"ring {index}: {MAX_DEATHS} workers died with chain {head}: it is returned, nothing of it is released"
        log.error(why)
        self.trace.fault(index, why)
        self._count_guest_error(DEADLY)
        if ring.held is not None:
            self._finish(index, ring, ring.held)
        step = self._finish(index, ring, head)
        self.judge_deaths()
        return step

    def judge_deaths(self) -> None:
        """Become inert once there were several chains that workers died with: what they have in common is us."""
        if self.metrics.value("guest_errors_total", DEADLY) >= MAX_DEADLY:
            self.make_inert(f"{MAX_DEADLY} chains that workers died with")

    def _begin(self, index: int, ring: Ring, chain: Chain) -> Step:
        # Before anything can go wrong with it: whatever does, the chain is put back.
        ring.job = Job(chain.head, Cause.NONE, iter(()))
        role = self.rings.role(index)
        self.trace.chain(index, role, chain.head, chain.descriptors)
        if role is not None:
            self.metrics.add("buffers_total", len(chain.descriptors), role.name.lower())
        if role is Role.STATISTICS:
            return self._hold(index, ring, chain)
        ring.job = self._jobs.of(role, chain, self.memory)
        if self.hinting.is_over():
            self.end_hinting()
        return self._continue(index, ring)

    def _continue(self, index: int, ring: Ring) -> Step:
        """Give back one slice of the job; put the chain back when nothing is left of it."""
        job = ring.job
        assert job is not None
        size = calls = 0
        while size < SLICE_BYTES and calls < SLICE_CALLS and not job.is_done:
            calls += 1
            if part := job.take():
                self.giver.give(index, job.cause, part)
                size += part.length
        if not job.is_done:
            return Step(returned=False, more=True)
        return self._finish(index, ring, job.head)

    def _finish(self, index: int, ring: Ring, head: int) -> Step:
        role = self.rings.role(index)
        self.trace.answer(index, head)
        self.metrics.add("chains_total", 1, role.name.lower() if role is not None else "unknown")
        self.metrics.add("ring_chains", 1, str(index))
        self.metrics.merge(ring.counts)
        self.journal.put_back(index, ring.queue.used_index + 1)
        ring.queue.put(head)
        if ring.job is not None and ring.job.head == head:
            ring.job = None
        if ring.held == head:
            ring.held = None
        return Step(returned=True, more=True)

    def _hold(self, index: int, ring: Ring, chain: Chain) -> Step:
        """Keep the statistics buffer: returning it is how the device asks for fresh ones (5.5.6.3)."""
        position = ring.queue.next_available - 1 & INDEX_MASK
        if _is_behind(position, ring.answered_to):
            ring.counts.clear()
        else:
            self.statistics.take(chains.statistics(self.memory, chain))
            self.metrics.merge(ring.counts)
            ring.answered_to = None
        previous = ring.held
        step = Step(returned=False, more=True) if previous is None else self._finish(index, ring, previous)
        ring.job, ring.held, ring.held_at = None, chain.head, position
        self.journal.changed()
        self.journal.survived(index, position)
        return step

    def _count_guest_error(self, kind: str) -> int:
        return self.metrics.add("guest_errors_total", 1, kind)


def _is_behind(position: int, known: int | None) -> bool:
    """True if an available index is this known one, or one of the 32768 before it."""
    return known is not None and (known - position) & INDEX_MASK <= INDEX_MASK >> 1
