"""Rings and descriptor chains: whatever a guest writes into its memory, at whatever moment, on any queue.

An input is a list of what driver, front end, clock and device do. The properties are I2, I3, I5 and bounded steps, as
tests/fuzz/witness.py and ring_guest.py check them: nothing is released that a chain in hand does not name, each chain is
returned once, a ring that is stopped does nothing, and only the driver's own fault refuses a chain or stops a ring.
"""

from __future__ import annotations

from hostdev.errors import RequestError
from hostdev.wire.balloon import DEFAULT_FEATURES, QUEUE_COUNT, Feature
from tests.fuzz.ground import RING_SIZE, ground
from tests.fuzz.ring_guest import RingGuest, address, length
from tests.fuzz.source import Source

_FEATURES = (
    DEFAULT_FEATURES,
    DEFAULT_FEATURES & ~Feature.RING_INDIRECT_DESC,
    DEFAULT_FEATURES & ~Feature.FREE_PAGE_HINT,
    Feature.VERSION_1,
)
_BASES = (0, 0, 0xFFFE, 0x7FFF)
_FLAGS = (0, 1, 2, 3, 2, 3, 4, 5, 6, 7)
MAX_ACTIONS = 200


def check(data: bytes) -> None:
    """Act out one input."""
    source = Source(data)
    guest = RingGuest(source.pick(_FEATURES))
    base = source.pick(_BASES)
    for index in range(QUEUE_COUNT):
        guest.start(index, base)
    for _ in range(MAX_ACTIONS):
        if not source:
            break
        source.pick(_ACTIONS)(guest, source)
    guest.finish()


def _describe(guest: RingGuest, source: Source) -> None:
    index, slot = source.below(QUEUE_COUNT), source.below(RING_SIZE)
    flags = source.pick(_FLAGS)
    following = (slot + 1) % RING_SIZE if source.below(4) else source.number(2)
    guest.describe(index, slot, (address(source), length(source), flags, following))


def _offer(guest: RingGuest, source: Source) -> None:
    index, head = source.below(QUEUE_COUNT), source.below(RING_SIZE)
    readable, writable = source.below(4), source.below(4)
    kinds = [False] * readable + [True] * writable or [True]
    guest.offer(index, [(address(source), length(source), kind) for kind in kinds], head)


def _publish(guest: RingGuest, source: Source) -> None:
    index = source.below(QUEUE_COUNT)
    for _ in range(1 + source.below(4)):
        guest.publish(index, source.below(RING_SIZE + 1))


def _lie(guest: RingGuest, source: Source) -> None:
    guest.lie(source.below(QUEUE_COUNT), source.number(2))


def _write(guest: RingGuest, source: Source) -> None:
    at = address(source)
    ground().write(at, source.take(1 + source.below(64)))


def _indirect(guest: RingGuest, source: Source) -> None:
    """A chain in a table of its own: entries as in the ring, the descriptor of the table as the input wants it."""
    index, head, at = source.below(QUEUE_COUNT), source.below(RING_SIZE), address(source)
    count = source.below(5)
    for slot in range(count):
        flags = source.pick((1, 3, 2, 0, 5))
        entry = address(source).to_bytes(8, "little") + length(source).to_bytes(4, "little")
        following = (slot + 1) if source.below(4) else source.number(2)
        ground().write(at + 16 * slot, entry + bytes((flags, 0)) + following.to_bytes(2, "little"))
    size = 16 * count if source.below(4) else length(source)
    guest.describe(index, head, (at, size, source.pick((4, 4, 4, 6, 5)), 0))
    guest.publish(index, head)


def _step(guest: RingGuest, source: Source) -> None:
    guest.step(source.below(QUEUE_COUNT))


def _run(guest: RingGuest, source: Source) -> None:
    guest.run(source.below(QUEUE_COUNT))


def _restart(guest: RingGuest, source: Source) -> None:
    index = source.below(QUEUE_COUNT)
    base = guest.stop(index)
    again = source.number(2) if source.one_in(4) else (base or 0)
    try:
        guest.start(index, again)
    except RequestError:
        assert ground().regions[0] not in guest.witness.regions


def _change_memory(guest: RingGuest, source: Source) -> None:
    mask = source.number(1) ^ 0xFF
    guest.set_memory([region for place, region in enumerate(ground().regions) if mask >> place & 1])


def _pass_time(guest: RingGuest, source: Source) -> None:
    if source.flag():
        guest.balloon.statistics.ask_now()
    guest.tick(source.below(4))


def _hint(guest: RingGuest, source: Source) -> None:
    if source.flag():
        guest.balloon.end_hinting()
    elif not guest.balloon.hinting.is_open:
        guest.balloon.begin_hinting()


def _set_poison(guest: RingGuest, source: Source) -> None:
    guest.write_config(source.number(4), source.number(1))


def _inhibit(guest: RingGuest, source: Source) -> None:
    guest.balloon.giver.inhibit(inhibited=source.flag())


def _have_died(guest: RingGuest, source: Source) -> None:
    """Workers have died with whatever chain comes next."""
    guest.witness.deaths = source.below(5)


def _refuse(guest: RingGuest, source: Source) -> None:
    """The host refuses from now on, so many times."""
    guest.witness.refusals = source.below(10)


_ACTIONS = (
    _describe,
    _offer,
    _offer,
    _publish,
    _step,
    _run,
    _write,
    _indirect,
    _lie,
    _restart,
    _change_memory,
    _pass_time,
    _hint,
    _set_poison,
    _inhibit,
    _have_died,
    _refuse,
)
