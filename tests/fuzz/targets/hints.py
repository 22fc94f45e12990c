"""The hinting queue: command ids and hints in any order and shape, rounds that are opened, called off and run out of time.

Nothing is ever released for a hint. An estimate is what a model of ours counts from memory: blocks named between this
round's id and the next other one. Each round ends, at its deadline at the latest, and the guest then reads DONE or STOP.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from hostdev.hinting import ROUND_SECONDS
from hostdev.wire.balloon import DEFAULT_FEATURES, Role
from tests.fuzz.ground import DATA, ground
from tests.fuzz.ring_guest import RingGuest, address, length
from tests.fuzz.source import Source
from tests.fuzz.witness import Hand

MAX_ACTIONS = 60
_HINT = Role.FREE_PAGE_HINT
_STOP, _DONE = 0, 1


@dataclass
class _Model:
    """phase: of the round, as in hinting.State."""

    phase: str = "none"
    id: int = 0
    bytes: int = 0
    blocks: int = 0
    begun: float = 0.0


def check(data: bytes) -> None:
    """Act out one input."""
    source = Source(data)
    guest, model = RingGuest(DEFAULT_FEATURES), _Model()
    guest.start(_HINT)
    guest.start(Role.REPORTING)
    for _ in range(MAX_ACTIONS):
        if not source:
            break
        source.pick(_ACTIONS)(guest, model, source)
        _serve(guest, model)
        _judge(guest, model)
    guest.tick(ROUND_SECONDS)
    assert not guest.balloon.hinting.is_open
    guest.finish()
    assert guest.witness.releases == 0


def _serve(guest: RingGuest, model: _Model) -> None:
    while _HINT in guest.balloon.rings.started:
        known = guest.witness.taken.get(_HINT)
        step = guest.step(_HINT)
        hand = guest.witness.taken.get(_HINT)
        if hand is not known and hand is not None and not hand.is_faulted:
            _follow(guest, model, hand)
        _end_if_over(guest, model)
        if not step.more:
            break


def _follow(guest: RingGuest, model: _Model, hand: Hand) -> None:
    """What a chain says: an id first, and then the blocks."""
    said = hand.said or b""
    if len(said) == 4:
        (number,) = struct.unpack("<I", said)
        if number == model.id and model.phase == "requested":
            model.phase = "started"
        elif number != model.id and model.phase == "started":
            model.phase = "stopped"
    if model.phase == "started":
        for start, end in _joined((at, at + size) for at, size, flags, _next in hand.entries if flags & 2):
            model.blocks += 1
            model.bytes += _memory(guest, start, end - start)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Blocks of one chain that touch are one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(each for each in ranges if each[0] < each[1]):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def _memory(guest: RingGuest, start: int, size: int) -> int:
    return sum(
        max(0, min(start + size, region.guest_end) - max(start, region.guest_address))
        for region in guest.witness.regions
    )


def _end_if_over(guest: RingGuest, model: _Model) -> None:
    """The device ends a round that the guest is through with while it serves the chain, or when the ring stops."""
    if model.phase != "none" and not guest.balloon.hinting.is_open:
        result = guest.balloon.hinting.result
        assert result is not None
        assert (result.bytes, result.blocks) == (model.bytes, model.blocks)
        assert result.complete == (model.phase == "stopped")
        assert result.seconds <= ROUND_SECONDS + 60
        model.phase = "none"


def _judge(guest: RingGuest, model: _Model) -> None:
    _end_if_over(guest, model)
    shown = guest.balloon.config.free_page_hint_cmd_id
    if guest.balloon.hinting.is_open:
        assert shown == model.id >= 0x80000000
        assert guest.now - model.begun < ROUND_SECONDS
    else:
        assert shown in (_STOP, _DONE)
        assert model.phase == "none"


def _begin(guest: RingGuest, model: _Model, source: Source) -> None:
    if not guest.balloon.hinting.is_open and _HINT in guest.balloon.rings.started:
        guest.balloon.begin_hinting()
        new = guest.balloon.config.free_page_hint_cmd_id
        assert new != model.id
        model.phase, model.id, model.bytes, model.blocks, model.begun = "requested", new, 0, 0, guest.now


def _call_off(guest: RingGuest, model: _Model, source: Source) -> None:
    guest.balloon.end_hinting()


def _say_id(guest: RingGuest, model: _Model, source: Source) -> None:
    number = (
        source.pick((model.id, model.id, _STOP, _DONE, model.id ^ 1)) if source.below(8) else source.number(4)
    )
    at = DATA + source.below(8)
    ground().write(at, struct.pack("<I", number))
    cut = source.pick((4, 4, 4, 1, 2))
    guest.offer(_HINT, [(at, cut, False), (at + cut, 4 - cut, False)][: 1 if cut == 4 else 2])


def _hint(guest: RingGuest, model: _Model, source: Source) -> None:
    count = 1 + source.below(5)
    guest.offer(_HINT, [(address(source), length(source), True) for _ in range(count)], source.below(16))


def _say_anything(guest: RingGuest, model: _Model, source: Source) -> None:
    kinds = sorted(source.flag() for _ in range(1 + source.below(4)))
    guest.offer(_HINT, [(address(source), length(source), kind) for kind in kinds], source.below(16))


def _pass_time(guest: RingGuest, model: _Model, source: Source) -> None:
    guest.tick(source.pick((0.5, 1.0, ROUND_SECONDS, 60.0)))


def _restart(guest: RingGuest, model: _Model, source: Source) -> None:
    base = guest.stop(_HINT)
    assert not guest.balloon.hinting.is_open
    guest.start(_HINT, base or 0)


def _lie(guest: RingGuest, model: _Model, source: Source) -> None:
    guest.lie(_HINT, source.number(2))


_ACTIONS = (_begin, _say_id, _hint, _hint, _say_anything, _pass_time, _call_off, _restart, _lie)
