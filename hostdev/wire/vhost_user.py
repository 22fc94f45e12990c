"""The vhost-user messages that a balloon can meet: numbers, payloads, descriptors and replies of each.

Source: QEMU's docs/interop/vhost-user.rst. What is here is syntax, and its table MESSAGES is the whole of it; order and
meaning are session.py's. Used by session.py, frontend.py and the decoder of traces.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

from construct import Array, Bytes, Check, Int32ul, Int64ul, Struct, this

from hostdev.wire.layout import Layout, lower


class Request(IntEnum):
    """Front end to back end. Named as in the text, without the VHOST_USER_ prefix."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


class BackendRequest(IntEnum):
    """Back end to front end, on the channel of SET_BACKEND_REQ_FD."""

    CONFIG_CHANGE_MSG = 2


class ProtocolFeature(IntFlag):
    """Protocol feature bits that this back end offers."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    CONFIGURE_MEM_SLOTS = 1 << 15


# VHOST_USER_F_PROTOCOL_FEATURES: a virtio feature bit that only front end and back end see.
F_PROTOCOL_FEATURES = 1 << 30

VERSION = 1
VERSION_MASK = 0x3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3
KNOWN_FLAGS = VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY

# SET_VRING_KICK, _CALL and _ERR: bits 0 to 7 the ring, bit 8 "no descriptor comes with this".
VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 1 << 8

# The text allows 8 regions in one SET_MEM_TABLE, and so at most 8 descriptors with any message.
MAX_TABLE_REGIONS = 8
# The largest payload is SET_MEM_TABLE's 264 bytes, or a config of 256 bytes and its 12: rust-vmm's bound of a page
# leaves room for requests that we only have to skip.
MAX_PAYLOAD = 4096
# VHOST_USER_MAX_CONFIG_SIZE of QEMU and libvhost-user.
MAX_CONFIG_SIZE = 256


@dataclass(frozen=True, slots=True)
class Header:
    """The first 12 bytes of each message. size: bytes of payload that follow."""

    request: int
    flags: int
    size: int


@dataclass(frozen=True, slots=True)
class U64:
    """A bit mask, a count, or a ring index with a flag."""

    value: int


@dataclass(frozen=True, slots=True)
class VringState:
    """A ring and one number about it: size, base index, or enable."""

    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddress:
    """Where the three parts of a ring are, as addresses in the front end's own address space."""

    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One region of guest memory. Addresses, size and offset in bytes; the offset is into the descriptor sent along."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """SET_MEM_TABLE: the whole memory at once."""

    count: int
    padding: int
    regions: tuple[MemoryRegion, ...]


@dataclass(frozen=True, slots=True)
class SingleRegion:
    """ADD_MEM_REG and REM_MEM_REG."""

    padding: int
    region: MemoryRegion


@dataclass(frozen=True, slots=True)
class ConfigAccess:
    """GET_CONFIG and SET_CONFIG. A reply of size 0 says that the access failed."""

    offset: int
    size: int
    flags: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Nothing:
    """The payload of a message that has none."""


_REGION = Struct(
    "guest_address" / Int64ul, "size" / Int64ul, "user_address" / Int64ul, "mmap_offset" / Int64ul
)


class _TableLayout(Layout[MemoryTable]):
    def build_value(self, parsed: dict[str, Any]) -> MemoryTable:
        regions = tuple(REGION.build_value(region) for region in parsed["regions"])
        return MemoryTable(parsed["count"], parsed["padding"], regions)


class _SingleLayout(Layout[SingleRegion]):
    def build_value(self, parsed: dict[str, Any]) -> SingleRegion:
        return SingleRegion(parsed["padding"], REGION.build_value(parsed["region"]))


HEADER = Layout(Struct("request" / Int32ul, "flags" / Int32ul, "size" / Int32ul), Header)
HEADER_SIZE = lower(HEADER.declaration).size
NOTHING = Layout(Struct(), Nothing)
U64_PAYLOAD = Layout(Struct("value" / Int64ul), U64)
VRING_STATE = Layout(Struct("index" / Int32ul, "num" / Int32ul), VringState)
VRING_ADDRESS = Layout(
    Struct(
        "index" / Int32ul,
        "flags" / Int32ul,
        "descriptor" / Int64ul,
        "used" / Int64ul,
        "available" / Int64ul,
        "log" / Int64ul,
    ),
    VringAddress,
)
REGION = Layout(_REGION, MemoryRegion)
MEMORY_TABLE = _TableLayout(
    Struct(
        "count" / Int32ul,
        "padding" / Int32ul,
        "_bound" / Check(this.count <= MAX_TABLE_REGIONS),
        "regions" / Array(this.count, _REGION),
    ),
    MemoryTable,
)
SINGLE_REGION = _SingleLayout(Struct("padding" / Int64ul, "region" / _REGION), SingleRegion)
CONFIG_ACCESS = Layout(
    Struct(
        "offset" / Int32ul,
        "size" / Int32ul,
        "flags" / Int32ul,
        "_bound" / Check(this.size <= MAX_CONFIG_SIZE),
        "data" / Bytes(this.size),
    ),
    ConfigAccess,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What one request looks like: payload, numbers of descriptors it may carry, protocol feature that gates it."""

    payload: Layout[Any]
    descriptors: range = range(1)
    gate: ProtocolFeature | None = None
    has_reply: bool = False


_ONE_OR_NONE = range(2)
_EXACTLY_ONE = range(1, 2)
_SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS

MESSAGES: dict[Request, Shape] = {
    Request.GET_FEATURES: Shape(NOTHING, has_reply=True),
    Request.SET_FEATURES: Shape(U64_PAYLOAD),
    Request.SET_OWNER: Shape(NOTHING),
    Request.RESET_OWNER: Shape(NOTHING),
    Request.SET_MEM_TABLE: Shape(MEMORY_TABLE, range(1, MAX_TABLE_REGIONS + 1)),
    Request.SET_VRING_NUM: Shape(VRING_STATE),
    Request.SET_VRING_ADDR: Shape(VRING_ADDRESS),
    Request.SET_VRING_BASE: Shape(VRING_STATE),
    Request.GET_VRING_BASE: Shape(VRING_STATE, has_reply=True),
    Request.SET_VRING_KICK: Shape(U64_PAYLOAD, _ONE_OR_NONE),
    Request.SET_VRING_CALL: Shape(U64_PAYLOAD, _ONE_OR_NONE),
    Request.SET_VRING_ERR: Shape(U64_PAYLOAD, _ONE_OR_NONE),
    Request.GET_PROTOCOL_FEATURES: Shape(NOTHING, has_reply=True),
    Request.SET_PROTOCOL_FEATURES: Shape(U64_PAYLOAD),
    Request.GET_QUEUE_NUM: Shape(NOTHING, gate=ProtocolFeature.MQ, has_reply=True),
    Request.SET_VRING_ENABLE: Shape(VRING_STATE),
    Request.SET_BACKEND_REQ_FD: Shape(NOTHING, _EXACTLY_ONE, ProtocolFeature.BACKEND_REQ),
    Request.GET_CONFIG: Shape(CONFIG_ACCESS, gate=ProtocolFeature.CONFIG, has_reply=True),
    Request.SET_CONFIG: Shape(CONFIG_ACCESS, gate=ProtocolFeature.CONFIG),
    Request.GET_MAX_MEM_SLOTS: Shape(NOTHING, gate=_SLOTS, has_reply=True),
    Request.ADD_MEM_REG: Shape(SINGLE_REGION, _EXACTLY_ONE, _SLOTS),
    # The text sends no descriptor with REM_MEM_REG, but some front ends do: tolerated and closed.
    Request.REM_MEM_REG: Shape(SINGLE_REGION, _ONE_OR_NONE, _SLOTS),
}


def request_of(number: int) -> Request | None:
    """Return the request with this number, None if it is none that is known here."""
    return Request(number) if number in Request._value2member_map_ else None


def message(request: int, flags: int, payload: bytes) -> bytes:
    """Put a header before a payload. flags: without the version, which is added."""
    return HEADER.encode(Header(request, VERSION | flags, len(payload))) + payload
