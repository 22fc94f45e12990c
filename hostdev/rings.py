"""The rings that are started: where they lie, what they are for, what each has in hand.

Keeps them through changes of the memory table, and remembers the base of one that broke until the front end asks for it.
What a chain means is balloon.py's business, which owns this.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from hostdev.errors import RequestError
from hostdev.memory import MemoryTable, Part
from hostdev.metrics import Metrics, Sample
from hostdev.roles import ring_roles
from hostdev.trace import Tracer
from hostdev.virtqueue import INDEX_MASK, RingLayout, Virtqueue
from hostdev.wire.balloon import Feature, Role
from hostdev.wire.record import RingPlace
from hostdev.wire.trace import Cause
from hostdev.wire.virtqueue import RING_HEADER, RING_HEADER_SIZE

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """What one call of Balloon.service() did: chains returned, so that the guest is to be signalled, and is there more."""

    returned: bool
    more: bool


@dataclass
class Job:
    """A chain whose pages are being given back. The parts are worked out as they come to their turn.

    parts: None stands for a range without a whole page of memory. To find that out is work as well, and takes its turn.
    """

    head: int
    cause: Cause
    parts: Iterator[Part | None]

    def __post_init__(self) -> None:
        self._following = [*islice(self.parts, 1)]

    @property
    def is_done(self) -> bool:
        """True once all was taken."""
        return not self._following

    def take(self) -> Part | None:
        """Return the next part; there must be one."""
        (part,) = self._following
        self._following = [*islice(self.parts, 1)]
        return part


@dataclass
class Ring:
    """A started ring. held: the head of the statistics buffer that the device keeps, held_at: its available index.

    answered_to: the available index up to which a predecessor has taken what statistics buffers say. counts: of the chain in
    hand.
    """

    layout: RingLayout
    queue: Virtqueue
    job: Job | None = None
    held: int | None = None
    held_at: int = 0
    answered_to: int | None = None
    counts: Counter[Sample] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class RingState:
    """What can be seen of a started ring. Indices run modulo 65536. returned: chains, since it was started."""

    role: Role | None
    size: int
    next_available: int
    used: int
    outstanding: int
    returned: int


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a ring stands, for a successor to go on from: as wire/record.py has it."""

    place: RingPlace = RingPlace.NONE
    base: int = 0
    held: int = 0


class Rings:
    """The started rings by number, and those that wait for memory."""

    def __init__(self, trace: Tracer, metrics: Metrics) -> None:
        self._trace = trace
        self._metrics = metrics
        self.started: dict[int, Ring] = {}
        self.stranded: dict[int, tuple[RingLayout, int]] = {}
        self._last_bases: dict[int, int] = {}
        self._roles: dict[int, Role] = {}
        # True once none is to be served any more: guest memory cannot be touched safely.
        self.are_closed = False

    def start(
        self, index: int, layout: RingLayout, base: int, memory: MemoryTable, features: Feature
    ) -> None:
        """Begin to use a ring. Raises RequestError if it cannot be as the front end says."""
        if self.are_closed:
            self.stranded.pop(index, None)
            self._last_bases[index] = base
            return
        indirect = bool(features & Feature.RING_INDIRECT_DESC)
        queue = Virtqueue(layout, memory, base, indirect=indirect)
        self._metrics.drop("ring_chains", str(index))
        self._begin(index, Ring(layout, queue), features)

    def resume(
        self, index: int, layout: RingLayout, standing: Standing, memory: MemoryTable, features: Feature
    ) -> None:
        """Go on where another process was. Raises RequestError if this memory does not hold the ring.

        What that one had in hand was not answered, for the used index does not have it: it is taken up again.
        """
        if self.are_closed:
            if (base := _base_unmapped(layout, standing, memory)) is not None:
                self._last_bases[index] = base
        elif standing.place is RingPlace.STRANDED:
            self.stranded[index] = layout, standing.base
        elif standing.place is RingPlace.BROKEN:
            self._last_bases[index] = standing.base
        elif standing.place is RingPlace.STARTED:
            indirect = bool(features & Feature.RING_INDIRECT_DESC)
            queue = Virtqueue(layout, memory, 0, indirect=indirect)
            queue.go_on(standing.base)
            answered_to = standing.held - 1 if standing.held else None
            self._begin(index, Ring(layout, queue, answered_to=answered_to), features)
        # Of all that there are: which of them came last says nothing about how the driver numbers them.
        self._roles = ring_roles(features, {*self.started, *self.stranded, *self._last_bases})

    def standing(self, index: int) -> Standing:
        """Tell a successor where a ring stands."""
        if index in self.started:
            ring = self.started[index]
            held = 0 if ring.held is None else ring.held_at + 1
            if ring.held is None and ring.answered_to is not None:
                held = ring.answered_to + 1
            return Standing(RingPlace.STARTED, ring.queue.ahead, held)
        if index in self.stranded:
            return Standing(RingPlace.STRANDED, self.stranded[index][1])
        if index in self._last_bases:
            return Standing(RingPlace.BROKEN, self._last_bases[index])
        return Standing()

    def _begin(self, index: int, ring: Ring, features: Feature) -> None:
        self._trace.ring(index, started=True, size=ring.layout.size, base=ring.queue.next_available)
        self.started[index] = ring
        # Those that wait for memory and those that broke were set up as well: without them a ring of hints might be taken
        # for one of reports.
        self._roles = ring_roles(features, {*self.started, *self.stranded, *self._last_bases})
        self.stranded.pop(index, None)
        self._last_bases.pop(index, None)

    def stop(self, index: int) -> int | None:
        """Stop using a ring and return its base: a chain in progress and a held buffer will be offered again."""
        if index in self.started:
            return self._let_go(index)
        _layout, base = self.stranded.pop(index, (None, None))
        return self._last_bases.pop(index, None) if base is None else base

    def abandon(self, index: int) -> int | None:
        """Stop using a ring as stop() does, with as little as can go wrong: something has, again and again."""
        ring = self.started.pop(index, None)
        if ring is None:
            return self.stop(index)
        ring.queue.release()
        return ring.queue.base

    def _let_go(self, index: int) -> int:
        ring = self.started.pop(index)
        self._metrics.merge(ring.counts)
        base = ring.queue.base
        self._trace.ring(index, started=False, size=0, base=base)
        ring.queue.release()
        return base

    def give_up(self, index: int) -> None:
        """Stop a ring of our own accord, and remember its base for the front end's question."""
        base = self.stop(index)
        if base is not None:
            self._last_bases[index] = base

    def take_down(self) -> dict[int, tuple[RingLayout, int]]:
        """Stop every ring and return, by number, where each was and its base: for put_up() with other memory."""
        for index, ring in list(self.started.items()):
            self.stranded[index] = ring.layout, ring.queue.base
            self._let_go(index)
        return dict(self.stranded)

    def put_up(
        self, layouts: dict[int, tuple[RingLayout, int]], memory: MemoryTable, features: Feature
    ) -> None:
        """Start them again. A ring that this memory does not hold waits for one that does.

        With memory slots, QEMU changes a region by taking it away and adding it again.
        """
        for index, (layout, base) in layouts.items():
            try:
                self.start(index, layout, base, memory, features)
            except RequestError as error:
                log.warning("ring %d pauses: it is not inside the new memory table: %s", index, error)

    def role(self, index: int) -> Role | None:
        """Return what a ring is for; None for one that has no meaning."""
        return self._roles.get(index)

    def find(self, role: Role) -> tuple[int, Ring] | None:
        """Return the started ring that has this role, and its number."""
        for index, ring in self.started.items():
            if self._roles.get(index) is role:
                return index, ring
        return None

    def states(self) -> dict[int, RingState]:
        """Return what can be seen of each started ring."""
        return {
            index: RingState(
                role=self._roles.get(index),
                size=ring.queue.size,
                next_available=ring.queue.next_available,
                used=ring.queue.used_index,
                outstanding=ring.queue.outstanding,
                returned=self._metrics.value("ring_chains", str(index)),
            )
            for index, ring in self.started.items()
        }


def _base_unmapped(layout: RingLayout, standing: Standing, memory: MemoryTable) -> int | None:
    """Return the base of a ring without touching a mapping; None for one that there is not, or whose memory is gone."""
    if standing.place is not RingPlace.STARTED:
        return standing.base if standing.place is not RingPlace.NONE else None
    used = memory.peek(layout.used, RING_HEADER_SIZE)
    return None if used is None else (RING_HEADER.decode(used).index + standing.base) & INDEX_MASK
