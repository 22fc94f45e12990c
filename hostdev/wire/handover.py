"""What two versions of the keeper say to each other when one takes over: datagrams of sections on a SOCK_SEQPACKET pair.

    old -> new   HELLO: the versions of this and of the records, once each
    new -> old   READY, with its version as text; or REFUSED, at any time from now on, with why
    old -> new   KEEPER, a PLACE for each socket, a GUEST for each front end, each with its descriptors; END
    new -> old   SERVING: its workers are ready, and wait
    old -> new   GO: the old one has let go

As in wire/record.py, a section of a kind that is not known is passed over, one that is longer than known is read as far
as known, and what is missing is 0. A datagram's descriptors are told apart by its DESCRIPTOR sections, one each, in order.
hostdev/parcels.py packs it, handover.py and takeover.py say it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from construct import Int8ul, Int16ul, Int32ul, Int64ul, Struct

from hostdev.wire.layout import LayoutError, lower
from hostdev.wire.record import unpack

NANOSECONDS = 1_000_000_000

VERSION = 1
# The oldest version that can read what this one writes.
READABLE_BY = 1

# Linux, SCM_MAX_FD: descriptors that a datagram can carry. A guest has 90 at the most.
MAX_DESCRIPTORS = 253
# Two messages, a reply, a name and a path: 20 KiB. A datagram of this size fits any socket's buffer.
MAX_DATAGRAM = 64 << 10


class Kind(IntEnum):
    """What a datagram is."""

    HELLO = 1
    READY = 2
    REFUSED = 3
    KEEPER = 4
    PLACE = 5
    GUEST = 6
    END = 7
    SERVING = 8
    GO = 9


class Tag(IntEnum):
    """The kinds of sections. RECORD: the header of one. BEGUN: what was read of a message. OUTGOING: the rest of a reply."""

    TEXT = 1
    VERSIONS = 2
    RECORD = 3
    DESCRIPTOR = 4
    KEEPER = 5
    PLACE = 6
    GUEST = 7
    NAME = 8
    PATH = 9
    MESSAGE = 10
    BEGUN = 11
    OUTGOING = 12
    WHY_INERT = 13


class Use(IntEnum):
    """What a descriptor is. ARRIVED: with the message at hand. BEGUN: with one that was read in part."""

    NONE = 0
    LISTENER = 1
    SIGNALS = 2
    CONNECTION = 3
    RECORD = 4
    HELD = 5
    ARRIVED = 6
    BEGUN = 7


class VersionsState(NamedTuple):
    """Of what follows: its version, and the oldest that can read it."""

    version: int
    readable_by: int


class DescriptorState(NamedTuple):
    """use: a Use. token: by which workers know it."""

    use: int
    token: int


class KeeperState(NamedTuple):
    """term_at: when to end, in nanoseconds of the monotonic clock, 0 for not yet. crashed: the exit status is 1.

    device, inode: of the control socket's file, 0 if there is none. folder: 1 if its folder is to be removed.
    """

    term_at: int
    crashed: int
    device: int
    inode: int
    folder: int


class PlaceState(NamedTuple):
    """device, inode: of the socket's file if it is to be removed, else 0. leaving: it goes with its guest."""

    device: int
    inode: int
    leaving: int


class GuestState(NamedTuple):
    """number: of the message read last. pending: 1 if that has no answer yet; deaths: workers that died with it.

    curtailed, begun_curtailed: 1 if descriptors were lost of that, and of what was read of the next.
    """

    number: int
    pending: int
    deaths: int
    closing: int
    restarts: int
    curtailed: int = 0
    begun_curtailed: int = 0


VERSIONS_STRUCT = lower(Struct("version" / Int32ul, "readable_by" / Int32ul))
DESCRIPTOR_STRUCT = lower(Struct("use" / Int8ul, "token" / Int64ul))
KEEPER_STRUCT = lower(
    Struct("term_at" / Int64ul, "crashed" / Int8ul, "device" / Int64ul, "inode" / Int64ul, "folder" / Int8ul)
)
PLACE_STRUCT = lower(Struct("device" / Int64ul, "inode" / Int64ul, "leaving" / Int8ul))
GUEST_STRUCT = lower(
    Struct(
        "number" / Int64ul,
        "pending" / Int8ul,
        "deaths" / Int8ul,
        "closing" / Int8ul,
        "restarts" / Int64ul,
        "curtailed" / Int8ul,
        "begun_curtailed" / Int8ul,
    )
)

_HEAD_STRUCT = lower(Struct("kind" / Int16ul))
_SECTION_STRUCT = lower(Struct("tag" / Int16ul, "size" / Int32ul))


@dataclass(frozen=True, slots=True)
class Datagram:
    """kind: a Kind, or one that is not known. sections: tag and payload."""

    kind: int
    sections: tuple[tuple[int, bytes], ...] = ()

    def all(self, tag: Tag) -> list[bytes]:
        """Return the payloads of this kind, in order."""
        return [payload for each, payload in self.sections if each == tag]

    def first(self, tag: Tag) -> bytes:
        """Return the payload of the first of this kind, empty if there is none."""
        return next(iter(self.all(tag)), b"")

    def numbers(self, tag: Tag, layout: struct.Struct) -> tuple[int, ...]:
        """Return the fields of the first of this kind, 0 if there is none."""
        return unpack(layout, self.first(tag))


def encode(kind: Kind, sections: Sequence[tuple[int, bytes]] = ()) -> bytes:
    """Write a datagram."""
    parts = [_HEAD_STRUCT.pack(kind)]
    for tag, payload in sections:
        parts += (_SECTION_STRUCT.pack(tag, len(payload)), payload)
    return b"".join(parts)


def decode(data: bytes) -> Datagram:
    """Read a datagram. Raises LayoutError if it is cut short."""
    if len(data) < _HEAD_STRUCT.size:
        raise LayoutError("a datagram without a head")
    (kind,) = _HEAD_STRUCT.unpack_from(data)
    at, sections = _HEAD_STRUCT.size, []
    while at < len(data):
        if at + _SECTION_STRUCT.size > len(data):
            raise LayoutError("a section's head is cut short")
        tag, size = _SECTION_STRUCT.unpack_from(data, at)
        at += _SECTION_STRUCT.size
        if at + size > len(data):
            raise LayoutError("a section is cut short")
        sections.append((tag, data[at : at + size]))
        at += size
    return Datagram(kind, tuple(sections))
