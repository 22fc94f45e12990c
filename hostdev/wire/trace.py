"""The trace file: what a device did, one small record after another, each declared here.

A file is a TRACE_HEADER and records; each record is a RECORD_HEADER and as many bytes of payload as that says. Times are
microseconds since the header's start. hostdev.trace writes it, balloonlab decode prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from construct import Const, GreedyBytes, GreedyRange, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from hostdev.wire.layout import Layout, lower

MAGIC = b"vubtrace"
FORMAT = 1


class Kind(IntEnum):
    """What a record tells. 0 is not a kind: where it stands, the trace ends."""

    GUEST = 1
    MESSAGE = 2
    RING_STARTED = 3
    RING_STOPPED = 4
    CHAIN = 5
    RELEASE = 6
    WITHHOLD = 7
    ANSWER = 8
    FAULT = 9


class Cause(IntEnum):
    """Why pages are given back."""

    NONE = 0
    REPORT = 1
    INFLATE = 2


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """started: nanoseconds since the epoch; used: bytes of the file that hold header and records."""

    magic: bytes
    format: int
    reserved: int
    started: int
    used: int


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """kind: a Kind. ring: 255 where there is none. size: bytes of payload. time: microseconds since the start."""

    kind: int
    ring: int
    size: int
    time: int


@dataclass(frozen=True, slots=True)
class Guest:
    """A front end has connected, and this process serves it."""

    process: int


@dataclass(frozen=True, slots=True)
class Message:
    """A vhost-user message arrived. payload: its first bytes."""

    request: int
    size: int
    descriptors: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class RingEvent:
    """A ring started with, or stopped at, this available index. size: in descriptors, 0 when it stops."""

    size: int
    base: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One descriptor of a chain."""

    address: int
    length: int
    flags: int


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain was taken from its ring. role: a wire.balloon.Role, 255 where the ring has none."""

    head: int
    role: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """A range of guest physical bytes, about to be given back (RELEASE) or kept (WITHHOLD). cause: a Cause."""

    address: int
    length: int
    cause: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A chain is about to be put back as used."""

    head: int


@dataclass(frozen=True, slots=True)
class Fault:
    """Something went wrong; text as in the log."""

    text: bytes


_ENTRY = Struct("address" / Int64ul, "length" / Int32ul, "flags" / Int16ul)


class _ChainLayout(Layout[Chain]):
    def build_value(self, parsed: dict[str, Any]) -> Chain:
        entries = tuple(ENTRY.build_value(entry) for entry in parsed["entries"])
        return Chain(parsed["head"], parsed["role"], entries)


TRACE_HEADER = Layout(
    Struct(
        "magic" / Const(MAGIC),
        "format" / Int32ul,
        "reserved" / Int32ul,
        "started" / Int64ul,
        "used" / Int64ul,
    ),
    TraceHeader,
)
TRACE_HEADER_SIZE = 32
# Where "used" stands in it: the one field that changes.
USED_OFFSET = 24
RECORD_HEADER = Layout(
    Struct("kind" / Int8ul, "ring" / Int8ul, "size" / Int16ul, "time" / Int64ul), RecordHeader
)
ENTRY = Layout(_ENTRY, Entry)
GUEST = Layout(Struct("process" / Int32ul), Guest)
MESSAGE = Layout(
    Struct("request" / Int32ul, "size" / Int32ul, "descriptors" / Int8ul, "payload" / GreedyBytes), Message
)
RING_EVENT = Layout(Struct("size" / Int16ul, "base" / Int16ul), RingEvent)
CHAIN = _ChainLayout(Struct("head" / Int16ul, "role" / Int8ul, "entries" / GreedyRange(_ENTRY)), Chain)
RELEASE = Layout(Struct("address" / Int64ul, "length" / Int64ul, "cause" / Int8ul), Release)
ANSWER = Layout(Struct("head" / Int16ul), Answer)
FAULT = Layout(Struct("text" / GreedyBytes), Fault)

PAYLOADS: dict[Kind, Layout[Any]] = {
    Kind.GUEST: GUEST,
    Kind.MESSAGE: MESSAGE,
    Kind.RING_STARTED: RING_EVENT,
    Kind.RING_STOPPED: RING_EVENT,
    Kind.CHAIN: CHAIN,
    Kind.RELEASE: RELEASE,
    Kind.WITHHOLD: RELEASE,
    Kind.ANSWER: ANSWER,
    Kind.FAULT: FAULT,
}

# Records of the ring path run lowered: a release of one page takes 3 us, interpreting its record would take 15.
RECORD_HEADER_STRUCT = lower(RECORD_HEADER.declaration)
RECORD_HEADER_SIZE = RECORD_HEADER_STRUCT.size
ENTRY_STRUCT = lower(_ENTRY)
RELEASE_STRUCT = lower(RELEASE.declaration)
ANSWER_STRUCT = lower(ANSWER.declaration)
