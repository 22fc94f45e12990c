"""The device model: features, config space, and what a buffer on each queue asks for.

It knows nothing of sockets, eventfds or processes: session.py tells it what the front end set up, worker.py calls
service() for the rings that may have work and signals the guest when chains were returned.

The way of one report: virtqueue pops a chain -> its entries become merged, whole-page ranges per region -> they are
given back in slices -> only then is the chain put back, with length 0, and the guest signalled. The guest keeps those
pages isolated until then; released one moment later they would hold live data.

One slice is bounded, so that a control message never waits for a whole report: QEMU holds its big lock while it does.
Stopping a ring in the middle of a chain abandons the chain: nothing more of it is released, and as it was not answered
the ring's base makes the guest's buffer be offered again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from hostdev.discard import Discarder
from hostdev.errors import ChainError, RequestError, RingError
from hostdev.giver import SLICE_BYTES, Giver, whole_pages
from hostdev.memory import MemoryTable, Part
from hostdev.metrics import Metrics, worth_logging
from hostdev.pages import Span, merge, spans_of_pfns
from hostdev.trace import Tracer
from hostdev.virtqueue import Chain, RingLayout, Virtqueue
from hostdev.wire.balloon import (
    CONFIG,
    CONFIG_SIZE,
    PFN_STRUCT,
    QUEUE_COUNT,
    STATISTIC_STRUCT,
    Config,
    Feature,
    Role,
)
from hostdev.wire.trace import Cause

log = logging.getLogger(__name__)

# Scattered single pages cost up to 30 us each while another CPU runs with the memory mapped: about 8 ms.
SLICE_CALLS = 256
# Linux puts 256 PFNs (1 KiB) in a buffer. 16384 of them still sort in about 5 ms; what is over that is left out.
MAX_PFN_BYTES = 64 << 10
# Firecracker's bound on statistics tags in one buffer; Linux 6.12 sends 16.
MAX_STATISTICS = 256


def ring_roles(features: int, configured: Collection[int]) -> dict[int, Role]:
    """Tell what each ring number is for.

    Linux (since 5.0, commit ddbeac07a39a) and QEMU number the rings densely over the negotiated features; virtio 1.3,
    5.5.2, fixes the numbers. Both agree while no optional ring is left out. Otherwise a ring that dense numbering does
    not have, being set up, shows that the driver follows the text. configured: the rings that got addresses.
    """
    present = [Role.INFLATE, Role.DEFLATE]
    for role, feature in (
        (Role.STATISTICS, Feature.STATS_VQ),
        (Role.FREE_PAGE_HINT, Feature.FREE_PAGE_HINT),
        (Role.REPORTING, Feature.REPORTING),
    ):
        if features & feature:
            present.append(role)
    if any(index >= len(present) for index in configured):
        return {int(role): role for role in present}
    return dict(enumerate(present))


@dataclass(frozen=True, slots=True)
class Step:
    """What one call of service() did: chains returned, so that the guest is to be signalled, and is there more."""

    returned: bool
    more: bool


_IDLE = Step(returned=False, more=False)


@dataclass
class _Job:
    """A chain whose pages are being given back. The parts are worked out as they come to their turn."""

    head: int
    cause: Cause
    parts: Iterator[Part]

    def __post_init__(self) -> None:
        self.following = next(self.parts, None)

    def take(self) -> Part | None:
        part, self.following = self.following, next(self.parts, None)
        return part


@dataclass
class _Ring:
    """A started ring."""

    layout: RingLayout
    queue: Virtqueue
    job: _Job | None = None
    held: int | None = None


@dataclass
class Balloon:
    """One virtio-balloon."""

    offered: Feature
    discarder: Discarder
    metrics: Metrics
    trace: Tracer = field(default_factory=Tracer)
    config: Config = field(default_factory=Config)
    statistics: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._features = Feature(0)
        self._memory = MemoryTable()
        self._rings: dict[int, _Ring] = {}
        self._roles: dict[int, Role] = {}
        self._last_bases: dict[int, int] = {}
        self._stranded: dict[int, tuple[RingLayout, int]] = {}
        self._giver = Giver(self.discarder, self.metrics, self.trace)

    # What the session asks (session.Device)

    @property
    def offered_features(self) -> int:
        """Virtio feature bits."""
        return int(self.offered)

    @property
    def queue_count(self) -> int:
        """All five queues can be set up, whatever is negotiated."""
        return QUEUE_COUNT

    def set_features(self, features: int) -> None:
        """Take over the negotiated features."""
        self._features = Feature(features)
        self._note_poison()
        self.metrics.gauges["negotiated_features"] = features
        log.info("the guest's driver accepted: %s", _names(self._features))
        if not self._features & Feature.REPORTING:
            log.warning(
                "the driver does not report free pages: its memory comes back only if a balloon is inflated"
            )

    def set_memory(self, memory: MemoryTable) -> None:
        """Move every started ring over to another table, abandoning chains in progress.

        A ring that the table does not hold waits for one that does: with memory slots, QEMU changes a region by taking
        it away and adding it again.
        """
        layouts = self._stranded | {
            index: (ring.layout, ring.queue.base) for index, ring in self._rings.items()
        }
        for index in layouts:
            self.stop_ring(index)
        self._memory = memory
        self.discarder.adopt(memory.regions)
        self.metrics.gauges["guest_memory_bytes"] = sum(region.size for region in memory.regions)
        for index, (layout, base) in layouts.items():
            try:
                self.start_ring(index, layout, base)
            except RequestError as error:
                self._stranded[index] = layout, base
                log.warning("ring %d pauses: it is not inside the new memory table: %s", index, error)

    def start_ring(self, index: int, layout: RingLayout, base: int) -> None:
        """Begin to use a ring. Raises RequestError if it cannot be as the front end says."""
        indirect = bool(self._features & Feature.RING_INDIRECT_DESC)
        queue = Virtqueue(layout, self._memory, base, indirect=indirect)
        self.trace.ring(index, started=True, size=layout.size, base=base)
        self._rings[index] = _Ring(layout, queue)
        self._stranded.pop(index, None)
        self._last_bases.pop(index, None)
        self._roles = ring_roles(self._features, self._rings)

    def stop_ring(self, index: int) -> int | None:
        """Stop using a ring; a chain in progress and a held statistics buffer will be offered again."""
        ring = self._rings.pop(index, None)
        if ring is None:
            _layout, base = self._stranded.pop(index, (None, None))
            return self._last_bases.pop(index, None) if base is None else base
        base = ring.queue.base
        self.trace.ring(index, started=False, size=0, base=base)
        ring.queue.release()
        return base

    def _break_ring(self, index: int) -> None:
        """Stop a ring of our own accord, and remember its base for the front end's question."""
        base = self.stop_ring(index)
        if base is not None:
            self._last_bases[index] = base
        self._count_guest_error("ring")

    def read_config(self, offset: int, size: int) -> bytes:
        """Return a piece of config space. Raises RequestError if it is not all inside."""
        if offset + size > CONFIG_SIZE:
            raise RequestError(
                f"config space is {CONFIG_SIZE} bytes, not {offset + size}: give QEMU config_size=16"
            )
        return CONFIG.encode(self.config)[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        """Take what a driver may write: actual and poison_val.

        QEMU always sends all 16 bytes, num_pages as it last read it; taking that would bring an old target back.
        """
        if offset + len(data) > CONFIG_SIZE:
            raise RequestError(f"config space is {CONFIG_SIZE} bytes, not {offset + len(data)}")
        image = bytearray(CONFIG.encode(self.config))
        image[offset : offset + len(data)] = data
        written = CONFIG.decode(bytes(image))
        self.config = replace(self.config, actual=written.actual, poison_val=written.poison_val)
        self._note_poison()

    def _note_poison(self) -> None:
        negotiated = bool(self._features & Feature.PAGE_POISON)
        self._giver.poisoned = negotiated and self.config.poison_val != 0

    # What the worker asks

    @property
    def features(self) -> Feature:
        """The negotiated features."""
        return self._features

    @property
    def inert(self) -> bool:
        """True once the device only answers and releases nothing."""
        return self._giver.inert

    def make_inert(self, why: str) -> None:
        """Release nothing from now on, but go on answering: the one state in which the guest is unharmed."""
        self._giver.make_inert(why)

    def service(self, index: int) -> Step:
        """Do one bounded piece of work on a ring. Raises RingError after stopping a ring that is broken."""
        ring = self._rings.get(index)
        if ring is None:
            return _IDLE
        try:
            return self._continue(index, ring) if ring.job else self._next(index, ring)
        except RingError as error:
            self._break_ring(index)
            raise RingError(f"ring {index} is broken and stops: {error}") from error

    def _next(self, index: int, ring: _Ring) -> Step:
        try:
            chain = ring.queue.pop()
            if chain is None:
                return _IDLE
            return self._begin(index, ring, chain)
        except ChainError as error:
            if worth_logging(self._count_guest_error(error.kind)):
                log.warning("ring %d: %s; it is returned unused", index, error)
            if ring.held is not None:
                # In order, or the ring's base would name the wrong one of the two.
                self._finish(index, ring, ring.held)
            return self._finish(index, ring, error.head)

    def _begin(self, index: int, ring: _Ring, chain: Chain) -> Step:
        # Before anything can go wrong with it: whatever does, the chain is put back.
        ring.job = _Job(chain.head, Cause.NONE, iter(()))
        role = self._roles.get(index)
        self.trace.chain(index, role, chain.head, chain.descriptors)
        if role is not None:
            self.metrics.add("buffers_total", len(chain.descriptors), role.name.lower())
        if role is Role.STATISTICS:
            return self._hold(index, ring, chain)
        ring.job = self._work(role, chain)
        return self._continue(index, ring)

    def _work(self, role: Role | None, chain: Chain) -> _Job:
        """Turn a chain into what is to be given back for it, often nothing.

        Hinted pages are answered and never released: they are not free, the guest may take them back before the device
        sees them.
        """
        if role is Role.REPORTING:
            return self._report(chain)
        if role is Role.INFLATE:
            return self._job(chain.head, Cause.INFLATE, spans_of_pfns(self._pfns(chain)))
        if role is Role.DEFLATE:
            self.metrics.add("deflated_pages_total", len(self._pfns(chain)))
        return _Job(chain.head, Cause.NONE, iter(()))

    def _continue(self, index: int, ring: _Ring) -> Step:
        """Give back one slice of the job; put the chain back when nothing is left of it."""
        job = ring.job
        assert job is not None
        size = calls = 0
        while size < SLICE_BYTES and calls < SLICE_CALLS and (part := job.take()):
            self._giver.give(index, job.cause, part)
            size += part.length
            calls += 1
        if job.following:
            return Step(returned=False, more=True)
        return self._finish(index, ring, job.head)

    def _finish(self, index: int, ring: _Ring, head: int) -> Step:
        ring.job = None
        if ring.held == head:
            ring.held = None
        role = self._roles.get(index)
        self.trace.answer(index, head)
        ring.queue.put(head)
        self.metrics.add("chains_total", 1, role.name.lower() if role is not None else "unknown")
        return Step(returned=True, more=True)

    # Inflate, deflate, reporting, statistics

    def _report(self, chain: Chain) -> _Job:
        """A report offers pages as device-writable buffers (5.5.6.5); a readable one is not a report."""
        spans = merge(Span(entry.address, entry.length) for entry in chain.descriptors if entry.is_writable)
        return self._job(chain.head, Cause.REPORT, spans)

    def _pfns(self, chain: Chain) -> tuple[int, ...]:
        """Gather the PFNs of a chain, over any split into descriptors."""
        data = self._gather(chain, MAX_PFN_BYTES)
        if sum(entry.length for entry in chain.descriptors if not entry.is_writable) > MAX_PFN_BYTES:
            self._count_guest_error("pfn-limit")
        whole = len(data) - len(data) % PFN_STRUCT.size
        return tuple(pfn for (pfn,) in PFN_STRUCT.iter_unpack(data[:whole]))

    def _gather(self, chain: Chain, limit: int) -> bytes:
        """Copy the readable bytes of a chain, at most limit. Raises ChainError for a buffer outside memory."""
        data = bytearray()
        for entry in chain.descriptors:
            wanted = min(entry.length, limit - len(data))
            if entry.is_writable or wanted <= 0:
                continue
            piece = self._memory.read(entry.address, wanted)
            if piece is None:
                raise ChainError(chain.head, "outside", "a buffer outside guest memory")
            data += piece
        return bytes(data)

    def _hold(self, index: int, ring: _Ring, chain: Chain) -> Step:
        """Keep the statistics buffer: returning it is how the device asks for fresh ones (5.5.6.3)."""
        data = self._gather(chain, MAX_STATISTICS * STATISTIC_STRUCT.size)
        whole = len(data) - len(data) % STATISTIC_STRUCT.size
        self.statistics = dict(STATISTIC_STRUCT.iter_unpack(data[:whole]))
        previous = ring.held
        step = Step(returned=False, more=True) if previous is None else self._finish(index, ring, previous)
        ring.job, ring.held = None, chain.head
        return step

    def _job(self, head: int, cause: Cause, spans: list[Span]) -> _Job:
        named = (part for span in spans for part in self._memory.split(*span))
        return _Job(head, cause, (piece for part in named for piece in whole_pages(part)))

    def _count_guest_error(self, kind: str) -> int:
        return self.metrics.add("guest_errors_total", 1, kind)


def _names(features: Feature) -> str:
    return (
        ", ".join(feature.name or hex(feature) for feature in Feature if feature & features) or "no feature"
    )
