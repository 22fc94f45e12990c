"""Proves on a trace what a device promises of its rings: whole, in order, and nothing released that was not named.

Of the records alone, so that it holds for any device that wrote them, whoever was killed meanwhile:

1. What is given back or kept is of a chain of its ring that was taken and not yet returned. For a report it lies inside
   the buffers that this chain offers; for an inflation the chain is one of the inflate queue, whose list of pages is not
   in a trace.
2. Each chain that was taken is returned once, and in the order in which they were taken. One that was returned without
   being taken was faulted first.
3. A ring stops where it began plus the chains returned since: none was lost, none returned twice.
4. A worker that takes over begins each ring where its predecessor was. What that one had in hand is forgotten and comes
   again; the chain whose answer was its very last record may come again too, for the record stands before the act.

No I/O. Used by decode.py and the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hostdev.pages import Span, merge
from hostdev.trace import MAX_ENTRIES
from hostdev.wire import trace as wire
from hostdev.wire.balloon import Role
from hostdev.wire.trace import Cause, Kind
from hostdev.wire.virtqueue import DESCRIPTOR_WRITE

if TYPE_CHECKING:
    from balloonlab.decode import Record

_INDEX_MASK = 0xFFFF
_ROLES: dict[int, Role] = {Cause.REPORT: Role.REPORTING, Cause.INFLATE: Role.INFLATE}


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was not kept. number: of the record, from 0."""

    number: int
    ring: int | None
    text: str


@dataclass
class _Ring:
    """A ring as far as the trace has come. position: available index of the first chain that was not returned."""

    position: int
    started: bool = True
    in_hand: dict[int, wire.Chain] = field(default_factory=dict)
    # A chain was faulted that was not taken: it will be returned all the same.
    is_faulted: bool = False


class TraceCheck:
    """Takes one record after another. chains, releases: returned and given back, so far. workers: processes."""

    def __init__(self) -> None:
        self.workers = self.chains = self.releases = self.released_bytes = 0
        self._rings: dict[int, _Ring] = {}
        # The ring whose answer was the record before this one: its used index may not have been published.
        self._answered: int | None = None
        # Rings of the predecessor that wait for this worker to take them over; it does so before its first message.
        self._inherited: dict[int, tuple[int, bool]] = {}

    def take(self, record: Record) -> Iterator[str]:
        """Yield, in words, what this record breaks."""
        answered, self._answered = self._answered, None
        match record.kind:
            case Kind.GUEST:
                self._change_worker(answered)
            case Kind.MESSAGE:
                self._inherited.clear()
            case Kind.RING_STARTED if record.ring is not None:
                yield from self._start(record.ring, record.value)
            case Kind.FAULT if record.ring in self._rings:
                self._rings[record.ring].is_faulted = True
            case Kind.RING_STOPPED | Kind.CHAIN | Kind.RELEASE | Kind.WITHHOLD | Kind.ANSWER:
                yield from self._work(record)

    def _change_worker(self, answered: int | None) -> None:
        self.workers += 1
        known = self._inherited | {
            number: (ring.position, number == answered) for number, ring in self._rings.items()
        }
        self._inherited = known
        self._rings = {}

    def _start(self, number: int, event: wire.RingEvent) -> Iterator[str]:
        if number in self._rings and self._rings[number].started:
            yield "it starts and has not stopped"
        position, is_unsure = self._inherited.pop(number, (event.base, False))
        behind = (position - event.base) & _INDEX_MASK
        if behind and not (is_unsure and behind == 1):
            yield f"a successor begins at index {event.base} where its predecessor was at {position}"
        if behind == 1:
            self.chains -= 1
        self._rings[number] = _Ring(event.base)

    def _work(self, record: Record) -> Iterator[str]:
        ring = None if record.ring is None else self._rings.get(record.ring)
        if ring is None or not ring.started:
            yield "it is used and was not started"
            return
        match record.kind:
            case Kind.CHAIN:
                yield from _take(ring, record.value)
            case Kind.ANSWER:
                self._answered = record.ring
                yield from self._answer(ring, record.value.head)
            case Kind.RING_STOPPED:
                yield from _stop(ring, record.value.base)
            case Kind.RELEASE | Kind.WITHHOLD:
                self._count(record)
                yield from _judge(ring, record.value)

    def _count(self, record: Record) -> None:
        if record.kind is Kind.RELEASE:
            self.releases += 1
            self.released_bytes += record.value.length

    def _answer(self, ring: _Ring, head: int) -> Iterator[str]:
        self.chains += 1
        ring.position = (ring.position + 1) & _INDEX_MASK
        first = next(iter(ring.in_hand), head)
        if first != head:
            yield f"chain {head} is returned before chain {first}, which was taken before it"
        if ring.in_hand.pop(head, None) is None:
            if not ring.is_faulted:
                yield f"chain {head} is returned and was not in hand"
            ring.is_faulted = False


def _take(ring: _Ring, chain: wire.Chain) -> Iterator[str]:
    if chain.head in ring.in_hand:
        yield f"chain {chain.head} is taken and was not returned"
    ring.in_hand[chain.head] = chain
    ring.is_faulted = False


def _stop(ring: _Ring, base: int) -> Iterator[str]:
    if base != ring.position:
        yield f"it stops at index {base} where the chains returned make it {ring.position}"
    ring.started, ring.position = False, base
    ring.in_hand.clear()


def _judge(ring: _Ring, release: wire.Release) -> Iterator[str]:
    named = f"{release.address:#x} + {release.length:#x}"
    role = _ROLES.get(release.cause)
    chains = [chain for chain in ring.in_hand.values() if chain.role == role]
    if role is None or not chains:
        yield f"{named} is of no chain in hand"
    elif role is Role.REPORTING and not any(_names(chain, release) for chain in chains):
        yield f"{named} is in none of the buffers of a chain in hand"


def _names(chain: wire.Chain, release: wire.Release) -> bool:
    """True if a report offers all of a range. Buffers that touch are released as one; a very long chain is cut short."""
    offered = merge(Span(one.address, one.length) for one in chain.entries if one.flags & DESCRIPTOR_WRITE)
    end = release.address + release.length
    inside = any(span.start <= release.address and end <= span.end for span in offered)
    return inside or len(chain.entries) == MAX_ENTRIES


def violations(records: Iterable[Record], check: TraceCheck | None = None) -> list[Violation]:
    """Return what a trace breaks. check: to have its counts afterwards."""
    taker = check or TraceCheck()
    return [
        Violation(number, record.ring, text)
        for number, record in enumerate(records)
        for text in taker.take(record)
    ]
