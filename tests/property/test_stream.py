"""Properties of the byte stream.

1. Cut at any boundaries, a conversation has the same answers as when each message is sent whole.
2. Any bytes at all end in answers or in a closed connection, and the device serves the next front end afterwards.
"""

from __future__ import annotations

import contextlib
import socket
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostdev.driver import DEADLINE
from hostdev.errors import EXIT_PASS
from hostdev.frontend import start_device
from hostdev.wire import vhost_user as wire
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, Request

pytestmark = pytest.mark.usefixtures("patience")

ENABLE = wire.message(
    Request.SET_PROTOCOL_FEATURES,
    0,
    wire.U64_PAYLOAD.encode(wire.U64(wire.ProtocolFeature.REPLY_ACK | wire.ProtocolFeature.CONFIG)),
)
CONFIG = wire.CONFIG_ACCESS.encode(wire.ConfigAccess(0, 16, 0, bytes(16)))
MESSAGES = st.sampled_from(
    [
        wire.message(Request.GET_FEATURES, 0, b""),
        wire.message(Request.GET_CONFIG, 0, CONFIG),
        wire.message(Request.SET_CONFIG, FLAG_NEED_REPLY, CONFIG),
        wire.message(Request.SET_OWNER, FLAG_NEED_REPLY, b""),
        wire.message(Request.SET_OWNER, 0, b"a payload that it does not have"),
        wire.message(Request.GET_VRING_BASE, 0, wire.VRING_STATE.encode(wire.VringState(3, 0))),
        wire.message(999, FLAG_NEED_REPLY, bytes(100)),
    ]
)


def converse(pieces: list[bytes]) -> bytes:
    """Send pieces one by one to a device of its own, end, and return all that it answered. It must end well."""
    answers = b""
    with start_device() as device:
        with device.connect() as connection:
            connection.settimeout(DEADLINE)
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    connection.sendall(piece)
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(65536):
                    answers += data
        assert device.wait() == EXIT_PASS
    return answers


@settings(max_examples=25)
@given(st.lists(MESSAGES, min_size=1, max_size=6), st.data())
def test_cuts_make_no_difference(messages: list[bytes], data: st.DataObject) -> None:
    stream = ENABLE + b"".join(messages)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=30).map(sorted))
    pieces = [stream[start:end] for start, end in pairwise([0, *cuts, len(stream)])]
    assert converse(pieces) == converse([ENABLE, *messages])


def test_byte_by_byte() -> None:
    stream = ENABLE + wire.message(Request.GET_FEATURES, 0, b"") + wire.message(Request.GET_CONFIG, 0, CONFIG)
    assert converse([bytes([byte]) for byte in stream]) == converse([stream]) != b""


@settings(max_examples=25)
@given(st.lists(st.one_of(MESSAGES, st.binary(max_size=40)), max_size=6))
def test_any_bytes(pieces: list[bytes]) -> None:
    answers = converse(pieces)
    while answers:
        header = wire.HEADER.decode(answers[: wire.HEADER_SIZE])
        assert header.flags == wire.VERSION | wire.FLAG_REPLY
        answers = answers[wire.HEADER_SIZE + header.size :]
