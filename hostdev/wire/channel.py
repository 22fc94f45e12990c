"""What worker and keeper say to each other over their SOCK_SEQPACKET pair, one datagram each.

    keeper -> worker   MESSAGE: a whole vhost-user message, header and payload, with its descriptors; CURTAILED: one whose
                       descriptors were lost, to be refused; INERT: why; GO, once, to one that was started to wait for it
    worker -> keeper   READY or MAKESHIFT once it serves; then for each message one of ANSWER, HOLDING, LOST and CLOSE

The keeper numbers the messages of a front end, 1 and up, and gives one again, under its number, to the successor of a
worker that died with it. A descriptor is known to both by its token: the number of the message that brought it and its
place there. Used by guest.py and worker.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from construct import Array, GreedyBytes, Int8ul, Int16ul, Int64ul, Struct, this

from hostdev.wire.layout import Layout
from hostdev.wire.vhost_user import HEADER_SIZE, MAX_PAYLOAD

_TOKEN_SHIFT = 8


class ToWorker(IntEnum):
    """What a Frame is."""

    MESSAGE = 1
    INERT = 2
    GO = 3
    CURTAILED = 4


class ToKeeper(IntEnum):
    """What an Answer is. HOLDING: the descriptors that are in use have changed. CLOSE: the front end's fault.

    MAKESHIFT: in place of READY, by one that serves without what its predecessors left. LOST: an ANSWER of such a one to what
    changes something: what they left is out of date from now on.
    """

    READY = 1
    ANSWER = 2
    HOLDING = 3
    CLOSE = 4
    MAKESHIFT = 5
    LOST = 6


@dataclass(frozen=True, slots=True)
class Frame:
    """deaths: workers that died with this message. data: the message, or the text of an INERT."""

    kind: int
    deaths: int
    number: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """reply: bytes for the front end, none if the message asks for no reply.

    held: in a HOLDING the tokens of all descriptors that a successor would need; else empty.
    """

    kind: int
    reply: bytes
    held: tuple[int, ...] = ()


class _AnswerLayout(Layout[Answer]):
    def build_value(self, parsed: dict[str, Any]) -> Answer:
        return Answer(parsed["kind"], parsed["reply"], tuple(parsed["held"]))

    def encode(self, value: Answer) -> bytes:
        plain = {"kind": value.kind, "count": len(value.held), "held": list(value.held)}
        return bytes(self.declaration.build(plain | {"reply": value.reply}))


FRAME = Layout(
    Struct("kind" / Int8ul, "deaths" / Int8ul, "number" / Int64ul, "data" / GreedyBytes),
    Frame,
)
ANSWER = _AnswerLayout(
    Struct("kind" / Int8ul, "count" / Int16ul, "held" / Array(this.count, Int64ul), "reply" / GreedyBytes),
    Answer,
)
# The largest message and what is before it; an answer's tokens, 50 at the most, and its reply are less.
MAX_DATAGRAM = 16 + HEADER_SIZE + MAX_PAYLOAD


def token(number: int, place: int) -> int:
    """Return the token of the descriptor that came at this place, 0 and up, with this message. Never 0."""
    return number << _TOKEN_SHIFT | place
