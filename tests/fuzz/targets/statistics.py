"""The statistics queue: buffers of any size and content, questions at any time, pauses, chains that are refused.

Besides I3, where at most one buffer is held, what the device says of the guest is exactly what the last buffer that could be
read held, at most 256 entries of it; a buffer is returned only for a question, for the next buffer or for a refusal.
"""

from __future__ import annotations

import json
import struct

from hostdev.errors import CommandError
from hostdev.queries import all_statistics, guest_stats
from hostdev.wire.balloon import DEFAULT_FEATURES, Feature, Role
from tests.fuzz.ground import DATA, PAGE, ground
from tests.fuzz.ring_guest import RingGuest, address, length
from tests.fuzz.source import Source
from tests.fuzz.witness import Hand

MAX_ACTIONS = 60
_ENTRY = struct.Struct("<HQ")
_FEATURES = (DEFAULT_FEATURES, Feature.STATS_VQ | Feature.VERSION_1, DEFAULT_FEATURES)
_INTERVALS = (0, 1, 2, 60, 0xFFFFFFFF, 1 << 32, -1)


def check(data: bytes) -> None:
    """Act out one input."""
    source = Source(data)
    guest = RingGuest(source.pick(_FEATURES))
    guest.start(Role.STATISTICS, source.pick((0, 0xFFFF)))
    expected: dict[int, int] = {}
    for _ in range(MAX_ACTIONS):
        if not source:
            break
        source.pick(_ACTIONS)(guest, source)
        expected = _serve(guest, expected)
        _judge(guest, expected)
    guest.finish()


def _serve(guest: RingGuest, expected: dict[int, int]) -> dict[int, int]:
    """Serve step by step; return what is to be known after each buffer that was read."""
    while Role.STATISTICS in guest.balloon.rings.started:
        known = guest.witness.taken.get(Role.STATISTICS)
        step = guest.step(Role.STATISTICS)
        hand = guest.witness.taken.get(Role.STATISTICS)
        if hand is not known and hand is not None and not hand.is_faulted:
            expected = _said(hand)
        if not step.more:
            break
    return expected


def _said(hand: Hand) -> dict[int, int]:
    said = hand.said or b""
    whole = len(said) - len(said) % _ENTRY.size
    return dict(_ENTRY.iter_unpack(said[:whole]))


def _judge(guest: RingGuest, expected: dict[int, int]) -> None:
    statistics = guest.balloon.statistics
    assert statistics.values == expected
    assert len(statistics.values) <= 256
    json.dumps([guest_stats(statistics), all_statistics(statistics)])
    ring = guest.balloon.rings.started.get(Role.STATISTICS)
    if ring is not None:
        assert ring.queue.outstanding == (ring.held is not None)


def _offer(guest: RingGuest, source: Source) -> None:
    """A buffer as a driver has it: entries, maybe cut short, maybe in pieces."""
    count = source.pick((1, 3, 10, 16, 256, 300))
    entries = b"".join(
        _ENTRY.pack(source.below(20) if source.below(4) else source.number(2), source.number(4))
        for _ in range(min(count, 20))
    )
    entries = (entries * 16)[: count * _ENTRY.size - source.pick((0, 0, 1, 9))]
    ground().write(DATA, entries)
    cut = source.below(1 + min(len(entries), 64))
    buffers = [(DATA, cut, False), (DATA + cut, len(entries) - cut, False)]
    guest.offer(
        Role.STATISTICS, buffers if source.flag() else [(DATA, len(entries), False)], source.below(16)
    )


def _offer_anything(guest: RingGuest, source: Source) -> None:
    buffers = [(address(source), length(source), source.one_in(3)) for _ in range(1 + source.below(3))]
    guest.offer(Role.STATISTICS, buffers, source.below(16))


def _break(guest: RingGuest, source: Source) -> None:
    """A chain that is refused, with one held or not; or a ring that lies."""
    if source.flag():
        guest.lie(Role.STATISTICS, source.number(2))
    else:
        guest.describe(Role.STATISTICS, 3, (DATA, PAGE, 1, 3))
        guest.publish(Role.STATISTICS, 3)


def _ask(guest: RingGuest, source: Source) -> None:
    guest.balloon.statistics.ask_now()
    guest.tick(0)


def _set_interval(guest: RingGuest, source: Source) -> None:
    seconds = source.pick(_INTERVALS)
    try:
        guest.balloon.statistics.set_interval(seconds)
    except CommandError:
        assert not 0 <= seconds <= 0xFFFFFFFF


def _pass_time(guest: RingGuest, source: Source) -> None:
    guest.tick(source.pick((1, 2, 60, 0xFFFFFFFF)))


def _pause(guest: RingGuest, source: Source) -> None:
    base = guest.stop(Role.STATISTICS)
    guest.start(Role.STATISTICS, base or 0)


def _write(guest: RingGuest, source: Source) -> None:
    ground().write(DATA, source.take(source.below(64)))


_ACTIONS = (_offer, _offer_anything, _ask, _break, _set_interval, _pass_time, _pause, _write)
