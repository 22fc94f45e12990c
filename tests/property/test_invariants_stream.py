"""Invariants of the byte stream, through the keeper's own framing and a real socket.

I1. Whatever bytes and descriptors arrive, what comes of it is replies, a connection that is closed for a protocol error, or
    its end: never another exception, and never a descriptor that nobody owns. At the end none is left.
I6. With the same bytes cut at any boundaries, read at once or late, the outcome is the same: each reply, whether the
    connection is closed, and all that the device knows.
"""

from __future__ import annotations

import os
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostdev.driver import USER_BASE
from hostdev.wire import vhost_user as wire
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, MAX_PAYLOAD, Request
from tests.framed import Framed
from tests.in_process import MIB, PAGE

pytestmark = pytest.mark.usefixtures("nothing_is_left_of_others")

CHANCE = st.randoms(use_true_random=True)
# A message, and the kinds of descriptors that come with its first byte.
Piece = tuple[bytes, list[str]]
_WORDS = (
    0,
    1,
    2,
    4,
    8,
    128,
    PAGE,
    MIB,
    4 * MIB,
    USER_BASE,
    USER_BASE + PAGE,
    USER_BASE + MIB,
    2**32 - 1,
    2**64 - 1,
)


def words(chance: Random, count: int) -> bytes:
    return b"".join(chance.choice(_WORDS).to_bytes(8, "little") for _ in range(count))


def payload(chance: Random, request: int) -> bytes:
    """What a request has, or nearly; now and then anything."""
    if chance.randrange(8) == 0:
        return chance.randbytes(chance.randrange(64))
    match request:
        case Request.SET_MEM_TABLE:
            count = chance.randrange(3)
            regions = b"".join(words(chance, 4) for _ in range(count))
            return count.to_bytes(4, "little") + bytes(4) + regions
        case Request.ADD_MEM_REG | Request.REM_MEM_REG:
            return bytes(8) + words(chance, 4)
        case (
            Request.SET_VRING_NUM | Request.SET_VRING_BASE | Request.GET_VRING_BASE | Request.SET_VRING_ENABLE
        ):
            return chance.randrange(6).to_bytes(4, "little") + chance.choice((0, 1, 8, 128)).to_bytes(
                4, "little"
            )
        case Request.SET_VRING_ADDR:
            return chance.randrange(6).to_bytes(4, "little") + bytes(4) + words(chance, 4)
        case Request.GET_CONFIG | Request.SET_CONFIG:
            size = chance.choice((0, 4, 16, 17))
            return bytes(4) + size.to_bytes(4, "little") + bytes(4) + chance.randbytes(size)
        case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
            return (chance.randrange(6) | chance.choice((0, 0, 0, 1 << 8))).to_bytes(8, "little")
    shape = wire.MESSAGES.get(Request(request)) if request in set(Request) else None
    return b"" if shape is None or shape.payload is wire.NOTHING else words(chance, 1)


def message(chance: Random) -> Piece:
    """One message, sensible or not."""
    request = chance.choice((*Request, *Request, chance.randrange(60), chance.randrange(1 << 32)))
    flags = chance.choice(
        (1, 1, 1 | FLAG_NEED_REPLY, 1 | FLAG_NEED_REPLY, 1 | FLAG_NEED_REPLY, 1, chance.randrange(64))
    )
    if chance.randrange(4):
        flags = 1 | flags & FLAG_NEED_REPLY
    data = payload(chance, request)
    size = (
        len(data) if chance.randrange(40) else chance.choice((0, MAX_PAYLOAD + 1, 2**32 - 1, len(data) + 1))
    )
    return wire.HEADER.encode(wire.Header(request, flags, size)) + data, descriptors(chance, request)


def descriptors(chance: Random, request: int) -> list[str]:
    """As many as the request wants, mostly."""
    shape = wire.MESSAGES.get(Request(request)) if request in set(Request) else None
    wanted = max(shape.descriptors, default=0) if shape is not None else 0
    if chance.randrange(6) == 0:
        wanted = chance.choice((0, 1, 2, 8, 9))
    usual = "ram" if request in (Request.SET_MEM_TABLE, Request.ADD_MEM_REG) else "event"
    return [
        usual if chance.randrange(8) else chance.choice(("ram", "event", "pipe"))
        for _ in range(min(wanted, 3))
    ]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.mark.parametrize("started", [False, True])
@given(CHANCE)
def test_whatever_arrives(started: bool, chance: Random) -> None:
    before = open_descriptors()
    device = Framed(started=started)
    others = open_descriptors() - device.owned()
    for _ in range(30):
        device.send(*message(chance))
        assert open_descriptors() == others + device.owned()
        if not device.is_open:
            break
    device.hang_up()
    assert not device.is_open
    device.close()
    assert open_descriptors() == before


@given(CHANCE, st.binary(max_size=400))
def test_bytes_that_are_no_messages(chance: Random, data: bytes) -> None:
    before = open_descriptors()
    device = Framed(started=True)
    while data:
        size = chance.randint(1, len(data))
        device.send(data[:size], chance.choices(("ram", "event", "pipe"), k=chance.randrange(9)))
        data = data[size:]
    device.hang_up()
    device.close()
    assert open_descriptors() == before


def outcome(
    pieces: list[Piece], *, started: bool, chance: Random | None = None
) -> tuple[bytes, bool, int, bytes]:
    """Send these pieces; with chance, read replies now and then only. Returns all that comes of it."""
    device = Framed(started=started)
    for data, kinds in pieces:
        device.send(data, kinds, reads=chance is None or chance.random() < 0.5)
    device.settle()
    result = device.replies, device.is_open, device.messages, device.state()
    device.close()
    return result


def cut(chance: Random, data: bytes, count: int) -> list[bytes]:
    """Cut bytes at any places; what comes out is not empty."""
    places = sorted({0, len(data), *(chance.randrange(1, len(data)) for _ in range(count))})
    return [data[start:end] for start, end in pairwise(places)]


@pytest.mark.timeout(600)  # with --full ten times as many examples
@pytest.mark.parametrize("started", [False, True])
@given(CHANCE)
def test_cuts_make_no_difference(started: bool, chance: Random) -> None:
    """In pieces of messages, one byte at a time, and with several messages at once as far as no descriptor begins one."""
    whole = [message(chance) for _ in range(12)]
    expected = outcome(whole, started=started)
    pieces: list[Piece] = []
    for data, kinds in whole:
        first, *rest = cut(chance, data, chance.choice((0, 1, 3, len(data))))
        pieces += [(first, kinds), *((piece, []) for piece in rest)]
    assert outcome(pieces, started=started, chance=chance) == expected
    assert outcome(joined(pieces), started=started) == expected


def joined(pieces: list[Piece]) -> list[Piece]:
    """Put pieces together as far as descriptors allow: they come with a first byte."""
    together: list[Piece] = []
    for data, kinds in pieces:
        if together and not kinds:
            together[-1] = together[-1][0] + data, together[-1][1]
        else:
            together.append((data, kinds))
    return together
