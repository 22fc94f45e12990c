"""The record of a guest: what its worker writes down for a successor, in memory that both share.

    RECORD_HEADER, then at the places that it names
    words        one 64-bit number each, stored whole: which image of the two counts, and what is told in passing
    state        two images of sections; changes with messages, commands and statistics
    tally        two images of counters; changes with each chain

A section is a head and its payload. One of a kind that is not known is passed over, one that is longer than known is read
as far as known, and what is missing is 0: fields are added at the ends, and older and newer versions read each other's, as
long as readable_by allows it. Whoever changes the meaning of what is here raises both numbers.

Plain tuples and lowered structs throughout: the tally is written for each chain, the state for each message.
hostdev/record.py puts it in memory, snapshot.py gathers it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from construct import Bytes, Int8ul, Int16ul, Int32ul, Int64sl, Int64ul, Struct

from hostdev.wire.layout import Layout, lower

MAGIC = b"vubrecrd"
VERSION = 1
# The oldest version that can read what this one writes.
READABLE_BY = 1


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """Places in bytes from the start. image sizes: of one image, of which there are two."""

    magic: bytes
    version: int
    readable_by: int
    words_at: int
    state_at: int
    state_size: int
    tally_at: int
    tally_size: int


RECORD_HEADER = Layout(
    Struct(
        "magic" / Bytes(len(MAGIC)),
        "version" / Int32ul,
        "readable_by" / Int32ul,
        "words_at" / Int32ul,
        "state_at" / Int32ul,
        "state_size" / Int32ul,
        "tally_at" / Int32ul,
        "tally_size" / Int32ul,
    ),
    RecordHeader,
)
RECORD_HEADER_SIZE = 36


class Word(IntEnum):
    """The numbers of the words. IN_HAND: the first of one for each ring."""

    STATE = 0
    TALLY = 1
    TELLING = 2
    IN_HAND = 8


WORDS = 64


class InHand(NamedTuple):
    """The chain that a ring's worker took up last. position: its available index. deaths: workers that died with it."""

    position: int
    deaths: int


_IN_HAND = Struct("position" / Int16ul, "deaths" / Int16ul, "present" / Int32ul)
IN_HAND_STRUCT = lower(_IN_HAND)

# Before each image: its bytes, and their CRC-32. Not against a kill, which leaves images whole, but against a stray write.
IMAGE_STRUCT = lower(Struct("length" / Int32ul, "crc" / Int32ul))
SECTION_STRUCT = lower(Struct("tag" / Int16ul, "size" / Int16ul))


class Tag(IntEnum):
    """The kinds of sections."""

    SESSION = 1
    REGION = 2
    RING = 3
    DEVICE = 4
    STATISTICS = 5
    FIGURES = 6
    INERT = 7
    REPLY = 8
    SAMPLES = 9


class SessionRecord(NamedTuple):
    """number: of the last message that took effect. channel: token of the back end's channel, 0 for none."""

    number: int
    features: int
    protocol_features: int
    channel: int
    closing: int


class RegionRecord(NamedTuple):
    """One memory region, as its message named it, and its descriptor's token."""

    token: int
    guest_address: int
    size: int
    user_address: int
    mmap_offset: int


class RingPlace(IntEnum):
    """What the device model does with a ring."""

    NONE = 0
    STARTED = 1
    STRANDED = 2
    BROKEN = 3


class RingRecord(NamedTuple):
    """One ring as the front end set it up; kick, call, error: tokens, 0 for none.

    place: a RingPlace. base: of a started ring how far ahead of the used index the next chain is, less those that are in
    hand; of others the index itself. held: 1 more than the index of the statistics buffer that the device holds, or 0.
    """

    ring: int
    size: int
    first: int
    has_addresses: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int
    kick: int
    call: int
    error: int
    enabled: int
    started: int
    place: int
    base: int
    held: int


class DeviceRecord(NamedTuple):
    """The device model. target: bytes or percent that wait for memory to be known, by pending: 0 none, 1, 2.

    hinting: 1 while a round is open. told: what clients know of actual. keeps_off: 1 if guest memory is not touched any more.
    """

    num_pages: int
    actual: int
    poison_val: int
    changed: int
    has_all_memory: int
    inhibited: int
    host_errors: int
    pending: int
    target: int
    hint_id: int
    hinting: int
    told: int
    keeps_off: int


class StatisticsRecord(NamedTuple):
    """due: nanoseconds of the monotonic clock, 0 for never."""

    interval: int
    due: int
    last_update: int
    updates: int


SESSION_STRUCT = lower(
    Struct(
        "number" / Int64ul,
        "features" / Int64ul,
        "protocol_features" / Int64ul,
        "channel" / Int64ul,
        "closing" / Int8ul,
    )
)
REGION_STRUCT = lower(
    Struct(
        "token" / Int64ul,
        "guest_address" / Int64ul,
        "size" / Int64ul,
        "user_address" / Int64ul,
        "mmap_offset" / Int64ul,
    )
)
RING_STRUCT = lower(
    Struct(
        "ring" / Int8ul,
        "size" / Int32ul,
        "first" / Int16ul,
        "has_addresses" / Int8ul,
        "flags" / Int32ul,
        "descriptor" / Int64ul,
        "used" / Int64ul,
        "available" / Int64ul,
        "log" / Int64ul,
        "kick" / Int64ul,
        "call" / Int64ul,
        "error" / Int64ul,
        "enabled" / Int8ul,
        "started" / Int8ul,
        "place" / Int8ul,
        "base" / Int16ul,
        "held" / Int32ul,
    )
)
DEVICE_STRUCT = lower(
    Struct(
        "num_pages" / Int32ul,
        "actual" / Int32ul,
        "poison_val" / Int32ul,
        "changed" / Int8ul,
        "has_all_memory" / Int8ul,
        "inhibited" / Int8ul,
        "host_errors" / Int32ul,
        "pending" / Int8ul,
        "target" / Int64sl,
        "hint_id" / Int32ul,
        "hinting" / Int8ul,
        "told" / Int32ul,
        "keeps_off" / Int8ul,
    )
)
STATISTICS_STRUCT = lower(
    Struct("interval" / Int32ul, "due" / Int64ul, "last_update" / Int64ul, "updates" / Int64ul)
)


class TallyHeader(NamedTuple):
    """When an image of counters holds: number: of the last message in it; used: of this ring, once it has come to that.

    ring: 255 for none. counters: how many follow, 64 bits each.
    """

    number: int
    ring: int
    used: int
    counters: int


TALLY_STRUCT = lower(Struct("number" / Int64ul, "ring" / Int8ul, "used" / Int16ul, "counters" / Int16ul))
NO_RING = 255


def unpack(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    """Read the fields of a section of whatever length."""
    return layout.unpack(payload[: layout.size].ljust(layout.size, b"\0"))


def section(tag: Tag, payload: bytes) -> bytes:
    """Put a section's head before its payload."""
    return SECTION_STRUCT.pack(tag, len(payload)) + payload


def sections(image: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and payload of each section. A last one that is cut short is left out."""
    at = 0
    while at + SECTION_STRUCT.size <= len(image):
        tag, size = SECTION_STRUCT.unpack_from(image, at)
        at += SECTION_STRUCT.size
        if at + size > len(image):
            return
        yield tag, image[at : at + size]
        at += size
