"""vhost-user messages out of an input: as a front end should send them, with some of their fields changed, or none at all.

Used by the targets with messages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hostdev.driver import USER_BASE
from hostdev.fds import Fd
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import DEFAULT_FEATURES
from hostdev.wire.vhost_user import F_PROTOCOL_FEATURES, FLAG_NEED_REPLY, Request
from tests.fuzz.descriptors import RAM_BYTES, Wares
from tests.fuzz.source import Source

REPLIES = frozenset(request for request, shape in wire.MESSAGES.items() if shape.has_reply)
# All that the device offers.
PROTOCOL_FEATURES = 0x8229

_REQUESTS = tuple(Request)
_FLAGS = (0, 0, FLAG_NEED_REPLY, FLAG_NEED_REPLY, FLAG_NEED_REPLY)
_ADDRESSES = (0, 0x1000, 0x100000, 0x180000, RAM_BYTES, (1 << 64) - 0x1000, 1)
# Guest address, size, offset: what goes together.
_REGIONS = ((0, RAM_BYTES, 0), (0, 0x100000, 0), (0x100000, 0x100000, 0x100000), (0, 0x1000, 0))
_SIZES = (RAM_BYTES, 0x100000, 0x1000, 0x80000, 0, 1, 1 << 63, (1 << 64) - 1)
_RING_SIZES = (16, 1, 128, 1024, 0, 3, 32768, 65536)


@dataclass(frozen=True, slots=True)
class Sent:
    """A message. size: what its header says, the payload's own if None."""

    request: int
    flags: int
    payload: bytes
    fds: tuple[Fd, ...] = ()
    size: int | None = None

    @property
    def stream(self) -> bytes:
        """Its bytes."""
        size = len(self.payload) if self.size is None else self.size
        return wire.HEADER.encode(wire.Header(self.request, self.flags ^ wire.VERSION, size)) + self.payload


def message(source: Source, wares: Wares) -> Sent:
    """Choose one."""
    if source.one_in(16):
        return _nonsense(source, wares)
    request = source.pick(_REQUESTS)
    payload = _PAYLOADS[request](source) if request in _PAYLOADS else b""
    fds = _usual(request, payload, wares)
    if source.one_in(8):
        payload = _damaged(source, payload)
    if source.one_in(8):
        fds = _other(source, wares)
    flags = source.pick(_FLAGS) if source.below(16) else source.number(4)
    size = source.number(4) if source.one_in(32) else None
    return Sent(request, flags, payload, fds, size)


def _nonsense(source: Source, wares: Wares) -> Sent:
    request = source.below(50) if source.flag() else source.number(4)
    payload = source.take(source.below(300))
    return Sent(request, source.pick(_FLAGS), payload, _other(source, wares))


def _damaged(source: Source, payload: bytes) -> bytes:
    """Change a byte, or the length."""
    at = source.below(len(payload) + 8)
    if at < len(payload):
        return payload[:at] + source.take(1) + payload[at + 1 :]
    return (payload + bytes(8))[: source.below(300)]


def _usual(request: Request, payload: bytes, wares: Wares) -> tuple[Fd, ...]:
    if request == Request.SET_MEM_TABLE:
        return (wares.ram,) * min(8, int.from_bytes(payload[:4], "little"))
    if request == Request.ADD_MEM_REG:
        return (wares.ram,)
    if request == Request.SET_BACKEND_REQ_FD:
        return (wares.channel,)
    has_event = request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)
    return (wares.event,) if has_event and not int.from_bytes(payload, "little") & wire.VRING_NO_FD else ()


def _other(source: Source, wares: Wares) -> tuple[Fd, ...]:
    kinds = (wares.ram, wares.event, wares.channel, *wares.odd)
    count = source.pick((1, 0, 2, 8, 9, 16, 17))
    return tuple(source.pick(kinds) for _ in range(count))


def _ring(source: Source) -> int:
    return source.below(5) if source.below(16) else source.number(4)


def _region(source: Source) -> bytes:
    if source.below(4):
        start, size, offset = source.pick(_REGIONS)
        return wire.REGION.encode(wire.MemoryRegion(start, size, USER_BASE + start, offset))
    start, offset = source.pick(_ADDRESSES), source.pick(_ADDRESSES)
    user = (USER_BASE + start) % (1 << 64) if source.below(8) else source.number(8)
    return wire.REGION.encode(wire.MemoryRegion(start, source.pick(_SIZES), user, offset))


def _table(source: Source) -> bytes:
    count = source.below(4) if source.below(8) else source.below(12)
    return count.to_bytes(8, "little") + b"".join(_region(source) for _ in range(count))


def _addresses(source: Source) -> bytes:
    index, at = _ring(source), USER_BASE + source.pick((0, 0x10000, 0x100000, 0x1FF000, 0x80000))
    descriptor, used, available = (at + source.pick((0, 0, 0x1000, 0x2000, 2, 4, 1)) for _ in range(3))
    return wire.VRING_ADDRESS.encode(wire.VringAddress(index, 0, descriptor, used, available, 0))


def _state(choose: Callable[[Source], int]) -> Callable[[Source], bytes]:
    return lambda source: wire.VRING_STATE.encode(wire.VringState(_ring(source), choose(source)))


def _event(source: Source) -> bytes:
    flag = wire.VRING_NO_FD if source.one_in(4) else 0
    return ((_ring(source) & 0xFF | flag) if source.below(16) else source.number(8)).to_bytes(8, "little")


def _mask(usual: int) -> Callable[[Source], bytes]:
    def choose(source: Source) -> bytes:
        """The usual bits, or without one of those below 64, or any."""
        kind = source.below(8)
        change = 0 if kind < 4 else 1 << source.below(64) if kind < 7 else source.number(8)
        return (usual ^ change).to_bytes(8, "little")

    return choose


def _config(source: Source) -> bytes:
    offset, size = source.pick((0, 4, 12, 16, 0xFFFFFFFF)), source.pick((16, 4, 0, 1, 256, 12))
    data = source.take(size).ljust(size, b"\0")
    return wire.CONFIG_ACCESS.encode(wire.ConfigAccess(offset, size, source.below(3), data))


_PAYLOADS: dict[Request, Callable[[Source], bytes]] = {
    Request.SET_FEATURES: _mask(DEFAULT_FEATURES | F_PROTOCOL_FEATURES),
    Request.SET_PROTOCOL_FEATURES: _mask(PROTOCOL_FEATURES),
    Request.SET_MEM_TABLE: _table,
    Request.ADD_MEM_REG: lambda source: bytes(8) + _region(source),
    Request.REM_MEM_REG: lambda source: bytes(8) + _region(source),
    Request.SET_VRING_NUM: _state(lambda source: source.pick(_RING_SIZES)),
    Request.SET_VRING_BASE: _state(lambda source: source.pick((0, 1, 0xFFFF, 0x10000))),
    Request.GET_VRING_BASE: _state(lambda _source: 0),
    Request.SET_VRING_ENABLE: _state(lambda source: source.pick((1, 0, 2))),
    Request.SET_VRING_ADDR: _addresses,
    Request.SET_VRING_KICK: _event,
    Request.SET_VRING_CALL: _event,
    Request.SET_VRING_ERR: _event,
    Request.GET_CONFIG: _config,
    Request.SET_CONFIG: _config,
}
