"""What the control process, the workers and the keeper say to each other over their SOCK_SEQPACKET pairs.

One datagram is one ENVELOPE. Its text is JSON in UTF-8 where there is any: for the one who passes a datagram on it is
opaque. The QMP that people speak is control.py's and stays on the other side of the control process.

    control -> worker    COMMAND {"execute", "arguments"}, CANCEL
    worker  -> control   RETURN value, ERROR {"class", "desc"}, EVENT {"event", "data"}
    keeper  -> control   GUEST name: a place where a front end may connect; with a descriptor, of a pair whose other end a
                         worker has, one has connected, or its worker was replaced: what that one had not answered is to
                         be asked again; without, there is none, or none any more
                         GONE name: there is no such place any more
                         RETURN value, ERROR {"class", "desc"} to what the keeper was asked
    control -> keeper    QUIT {"force"}; ADD path, REMOVE name, GUESTS, UPGRADE

Names and paths are bare text and not JSON: the keeper parses none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum

from construct import GreedyBytes, Int8ul, Int32ul, Struct

from hostdev.wire.layout import Layout

# An answer names at most 32 regions and 5 rings in some 10 KiB; a datagram of this size fits any socket's buffer.
MAX_ENVELOPE = 64 << 10


class Kind(IntEnum):
    """What an envelope holds."""

    COMMAND = 1
    CANCEL = 2
    RETURN = 3
    ERROR = 4
    EVENT = 5
    GUEST = 6
    QUIT = 7
    GONE = 8
    ADD = 9
    REMOVE = 10
    GUESTS = 11
    UPGRADE = 12


@dataclass(frozen=True, slots=True)
class Envelope:
    """id: chosen by who asks, repeated in what answers; 0 in an EVENT, a GUEST and a GONE."""

    kind: int
    id: int
    text: bytes = b""


ENVELOPE = Layout(Struct("kind" / Int8ul, "id" / Int32ul, "text" / GreedyBytes), Envelope)

# The keeper parses no JSON: it compares the text of a QUIT with this, and answers with what is written here.
QUIT_FORCED = b'{"force": true}'
QUIT_ACCEPTED = b"{}"
QUIT_REFUSED = (
    b'{"class": "GenericError", "desc": "a front end is connected: its VM would not survive; '
    b'ask the guest to shut down, or give \\"force\\": true"}'
)


def result(number: int, value: object) -> Envelope:
    """Answer a question with a value."""
    return Envelope(Kind.RETURN, number, json.dumps(value).encode())


def refusal(number: int, text: str, error_class: str = "GenericError") -> Envelope:
    """Answer a question with an error, as QMP has it."""
    return Envelope(Kind.ERROR, number, json.dumps({"class": error_class, "desc": text}).encode())
