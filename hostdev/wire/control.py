"""What the control process, the workers and the keeper say to each other over their SOCK_SEQPACKET pairs.

One datagram is one ENVELOPE. Its text is JSON in UTF-8 where there is any: for the one who passes a datagram on it is
opaque. The QMP that people speak is control.py's and stays on the other side of the control process.

    control -> worker    COMMAND {"execute", "arguments"}, CANCEL
    worker  -> control   RETURN value, ERROR {"class", "desc"}, EVENT {"event", "data"}
    keeper  -> control   GUEST with the descriptor of a pair whose other end a new worker has; RETURN, ERROR to a QUIT
    control -> keeper    QUIT {"force"}
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Envelope:
    """id: chosen by who asks, repeated in what answers; 0 in an EVENT and a GUEST."""

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
