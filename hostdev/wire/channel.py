"""What worker and keeper say to each other over their SOCK_SEQPACKET pair.

Keeper to worker: one datagram is one whole vhost-user message, header and payload, with its descriptors. Worker to
keeper: one datagram, declared here, answers it. Nothing else travels there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from construct import GreedyBytes, Int8ul, Struct

from hostdev.wire.layout import Layout
from hostdev.wire.vhost_user import HEADER_SIZE, MAX_PAYLOAD

MAX_DATAGRAM = HEADER_SIZE + MAX_PAYLOAD


class Action(IntEnum):
    """What the keeper does once the reply has been forwarded."""

    CONTINUE = 0
    CLOSE = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """reply: bytes for the front end, none if the message asks for no reply."""

    action: int
    reply: bytes


ANSWER = Layout(Struct("action" / Int8ul, "reply" / GreedyBytes), Answer)
