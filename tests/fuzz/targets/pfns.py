"""Inflate and deflate: lists of page frame numbers over any split into buffers, in pieces that lie anywhere.

An input is a list of requests: numbers (runs, repeats, holes, raw bytes), where the list is cut, where its pieces lie. On
top of I2 and I3 a list that can be read releases exactly the pages that it names, each once, and a deflation none.
"""

from __future__ import annotations

import struct

from hostdev.wire.balloon import DEFAULT_FEATURES, Role
from tests.fuzz.ground import DATA, PAGE, ground
from tests.fuzz.ring_guest import RingGuest
from tests.fuzz.source import Source

MAX_REQUESTS = 6
# More than the device takes of one list, 16384, so that the limit is met.
MAX_BYTES = 70 << 10
_REPEATS = (2, 3, 64, 17000)
# First pages of regions, of holes, and numbers that no region has.
_FIRST = (0x10, 0, 0x7F, 0x80, 0x100, 0x4FF, 0x500, 0x53F, 0x540, 0x100000, 0x10000F, 0x100010, 0xFFFFFFFF)
# Every second page of the largest region: more pieces than a slice of work has calls.
_MANY = 600
_COUNTS = (1, 2, 3, 5, 8, 16, 32, 0)
_CUTS = (4, 1, 2, 3, 5, 7, 1024, 4096)


def check(data: bytes) -> None:
    """Act out one input."""
    source = Source(data)
    guest = RingGuest(DEFAULT_FEATURES)
    for role in (Role.INFLATE, Role.DEFLATE):
        guest.start(role)
    for _ in range(MAX_REQUESTS):
        if not source:
            break
        _request(guest, source)
    guest.finish()


def _request(guest: RingGuest, source: Source) -> None:
    role = Role.DEFLATE if source.one_in(4) else Role.INFLATE
    numbers = _numbers(source)
    pieces = _cut(source, numbers)
    buffers = []
    for place, piece in enumerate(pieces):
        # The pages after the rings, each piece at an odd place of its own: a list may name the pages that it is on.
        at = DATA + place * (PAGE << 2) + source.pick((0, 1, PAGE - 3))
        ground().write(at, piece)
        buffers.append((at, len(piece), source.one_in(8)))
    guest.offer(role, sorted(buffers, key=lambda buffer: buffer[2]))
    if source.one_in(4):
        guest.step(role)
        guest.balloon.set_memory(guest.balloon.memory)
    before = guest.metrics.value("deflated_pages_total")
    guest.run(role)
    assert role is Role.DEFLATE or guest.metrics.value("deflated_pages_total") == before


def _numbers(source: Source) -> bytes:
    """Return a list as bytes, which may end within a number."""
    numbers: list[int] = []
    for _ in range(1 + source.below(4)):
        first = source.pick(_FIRST) if source.below(3) else source.number(4)
        count = _MANY if source.one_in(128) else source.pick(_COUNTS)
        step = source.pick((1, 0, 2, -1))
        numbers += [(first + step * place) & 0xFFFFFFFF for place in range(count)]
    raw = struct.pack(f"<{len(numbers)}I", *numbers)
    times = source.pick(_REPEATS) if source.one_in(32) else 1
    repeated = raw * min(times, 1 + MAX_BYTES // max(1, len(raw)))
    return repeated[:MAX_BYTES] + source.take(source.below(4))


def _cut(source: Source, data: bytes) -> list[bytes]:
    """Cut it into at most 15 pieces, the last of which has the rest."""
    pieces = []
    for _ in range(source.below(15)):
        size = source.pick(_CUTS)
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]
