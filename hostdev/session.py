"""The vhost-user conversation of a back end, sans I/O: one message and its descriptors in, a reply out.

Syntax is wire/vhost_user.py's; this file knows order and meaning. It holds what the front end set up (features, memory
table, rings) and tells the device model, through the Device protocol below, what that means for it. It never reads or
writes a socket: worker.py does.

Errors by fault: RequestError is answered here (non-zero where an answer was asked for, else logged and the old state
kept); StreamError goes to the caller, which closes the connection. Descriptors that no handler took are closed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from hostdev.errors import RequestError, StreamError
from hostdev.fds import Fd, close_all, is_eventfd
from hostdev.memory import MAX_REGIONS, MemoryTable, Region
from hostdev.metrics import Metrics, worth_logging
from hostdev.trace import NoTrace, Tracer
from hostdev.virtqueue import RingLayout
from hostdev.wire import vhost_user as wire
from hostdev.wire.layout import LayoutError
from hostdev.wire.vhost_user import ProtocolFeature, Request

log = logging.getLogger(__name__)

OFFERED_PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)

_MAX_BASE = 0xFFFF


class Device(Protocol):
    """What the session needs of the device model. Each method may raise RequestError."""

    @property
    def offered_features(self) -> int:
        """Virtio feature bits."""

    @property
    def queue_count(self) -> int:
        """How many rings there can be."""

    def set_features(self, features: int) -> None:
        """Take over the negotiated virtio feature bits."""

    def set_memory(self, memory: MemoryTable) -> None:
        """Use another memory table: no view into the old one may be left."""

    def start_ring(self, index: int, layout: RingLayout, base: int) -> None:
        """Begin to use a ring whose next available index is base."""

    def stop_ring(self, index: int) -> int | None:
        """Stop using a ring, abandoning a chain in progress. Returns its base, None if it was not started."""

    def read_config(self, offset: int, size: int) -> bytes:
        """Return size bytes of config space."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the guest's write to config space."""


@dataclass
class Ring:
    """What the front end said of one ring."""

    size: int = 0
    base: int = 0
    addresses: wire.VringAddress | None = None
    kick: Fd | None = None
    call: Fd | None = None
    error: Fd | None = None
    enabled: bool = False
    started: bool = False

    def replace(self, name: str, fd: Fd | None) -> None:
        """Put fd in place of the descriptor called name, closing the old one: a setter may come many times."""
        old: Fd | None = getattr(self, name)
        setattr(self, name, fd)
        if old is not None:
            old.close()


@dataclass
class _Arrived:
    """The descriptors of the message at hand; what is left in it at the end gets closed."""

    fds: list[Fd] = field(default_factory=list)

    def take(self) -> Fd:
        return self.fds.pop(0)


class Session:
    """One connection's state. handle() is the whole interface; the rest is for the worker to look at."""

    def __init__(self, device: Device, metrics: Metrics, trace: Tracer | None = None) -> None:
        self.device = device
        self.metrics = metrics
        self.trace: Tracer = trace or NoTrace()
        self.features = 0
        self.protocol_features = ProtocolFeature(0)
        self.memory = MemoryTable()
        self.rings = [Ring() for _ in range(device.queue_count)]
        self.backend_channel: Fd | None = None

    def handle(self, header: wire.Header, payload: bytes, fds: list[Fd]) -> bytes:
        """Act on one whole message and return the bytes to answer, none if no answer is due.

        Raises StreamError for a header that shows a stream out of step.
        """
        arrived = _Arrived(fds)
        try:
            _check_header(header, payload)
            self.trace.message(header.request, payload, len(fds))
            return self._answer(header, payload, arrived)
        finally:
            close_all(arrived.fds)

    def close(self) -> None:
        """The front end has gone: stop every ring, unmap and close everything."""
        for index, ring in enumerate(self.rings):
            self.device.stop_ring(index)
            for name in ("kick", "call", "error"):
                ring.replace(name, None)
        self._adopt_memory(())
        if self.backend_channel is not None:
            self.backend_channel.close()

    def _answer(self, header: wire.Header, payload: bytes, arrived: _Arrived) -> bytes:
        try:
            request, value = self._decode(header, payload, arrived)
            reply = self._HANDLERS[request](self, value, arrived)
        except RequestError as error:
            self._count_refusal(header, error)
            return self.refusal(header, payload)
        self.metrics.add("messages_total", 1, request.name)
        if reply is not None:
            return wire.message(request, wire.FLAG_REPLY, reply)
        return self._acknowledge(header, 0)

    def _decode(self, header: wire.Header, payload: bytes, arrived: _Arrived) -> tuple[Request, Any]:
        try:
            request = Request(header.request)
        except ValueError:
            raise RequestError(f"request {header.request} is not known here") from None
        shape = wire.MESSAGES[request]
        if shape.gate is not None and not shape.gate & self.protocol_features:
            raise RequestError(f"{request.name} needs {shape.gate.name}, which was not negotiated")
        try:
            value = shape.payload.decode(payload)
        except LayoutError as error:
            raise RequestError(f"{request.name}: {error}") from error
        if len(arrived.fds) not in shape.descriptors:
            raise RequestError(f"{request.name} with {len(arrived.fds)} descriptors")
        return request, value

    def _acknowledge(self, header: wire.Header, status: int) -> bytes:
        asked = header.flags & wire.FLAG_NEED_REPLY and ProtocolFeature.REPLY_ACK & self.protocol_features
        if not asked:
            return b""
        return wire.message(header.request, wire.FLAG_REPLY, wire.U64_PAYLOAD.encode(wire.U64(status)))

    def _count_refusal(self, header: wire.Header, error: RequestError) -> None:
        known = header.request in Request._value2member_map_
        name = Request(header.request).name if known else "unknown"
        if worth_logging(self.metrics.add("refused_messages_total", 1, name)):
            log.warning("refused %s: %s", name, error)

    def refusal(self, header: wire.Header, payload: bytes) -> bytes:
        """Answer what was refused. A request that always has a reply gets one, or QEMU would wait for ever."""
        if header.request == Request.GET_CONFIG:
            failed = wire.ConfigAccess(offset=0, size=0, flags=0, data=b"")
            return wire.message(header.request, wire.FLAG_REPLY, wire.CONFIG_ACCESS.encode(failed))
        if header.request == Request.GET_VRING_BASE:
            index = int.from_bytes(payload[:4], "little")
            reply = wire.VRING_STATE.encode(wire.VringState(index, 0))
            return wire.message(header.request, wire.FLAG_REPLY, reply)
        has_reply = (
            header.request in Request._value2member_map_ and wire.MESSAGES[Request(header.request)].has_reply
        )
        if has_reply:
            return wire.message(header.request, wire.FLAG_REPLY, wire.U64_PAYLOAD.encode(wire.U64(0)))
        return self._acknowledge(header, 1)

    # Features

    def _get_features(self, _value: wire.Nothing, _arrived: _Arrived) -> bytes:
        return _u64(self.device.offered_features | wire.F_PROTOCOL_FEATURES)

    def _set_features(self, value: wire.U64, _arrived: _Arrived) -> None:
        unknown = value.value & ~(self.device.offered_features | wire.F_PROTOCOL_FEATURES)
        if unknown:
            raise RequestError(f"feature bits {unknown:#x} were never offered")
        self.device.set_features(value.value & ~wire.F_PROTOCOL_FEATURES)
        self.features = value.value
        if not value.value & wire.F_PROTOCOL_FEATURES:
            # "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly in the enabled state."
            for ring in self.rings:
                ring.enabled = True

    def _get_protocol_features(self, _value: wire.Nothing, _arrived: _Arrived) -> bytes:
        return _u64(OFFERED_PROTOCOL_FEATURES)

    def _set_protocol_features(self, value: wire.U64, _arrived: _Arrived) -> None:
        # As a number: inverting an IntFlag leaves out the bits that it has no member for.
        unknown = value.value & ~int(OFFERED_PROTOCOL_FEATURES)
        if unknown:
            raise RequestError(f"protocol feature bits {unknown:#x} were never offered")
        self.protocol_features = ProtocolFeature(value.value)

    def _get_queue_num(self, _value: wire.Nothing, _arrived: _Arrived) -> bytes:
        return _u64(self.device.queue_count)

    def _ignore(self, _value: wire.Nothing, _arrived: _Arrived) -> None:
        """SET_OWNER and RESET_OWNER: there is one connection, so there is nothing to own."""

    def _set_backend_channel(self, _value: wire.Nothing, arrived: _Arrived) -> None:
        if self.backend_channel is not None:
            self.backend_channel.close()
        self.backend_channel = arrived.take()

    # Memory

    def _set_mem_table(self, value: wire.MemoryTable, arrived: _Arrived) -> None:
        if len(value.regions) != len(arrived.fds):
            raise RequestError(f"{len(value.regions)} regions with {len(arrived.fds)} descriptors")
        fresh: list[Region] = []
        try:
            for description in value.regions:
                fresh.append(Region(description, arrived.fds[0]))
                arrived.take()
            table = MemoryTable(fresh)
        except RequestError:
            for region in fresh:
                region.close()
            raise
        self._replace_memory(table)

    def _get_max_mem_slots(self, _value: wire.Nothing, _arrived: _Arrived) -> bytes:
        return _u64(MAX_REGIONS)

    def _add_mem_reg(self, value: wire.SingleRegion, arrived: _Arrived) -> None:
        region = Region(value.region, arrived.fds[0])
        arrived.take()
        try:
            table = MemoryTable((*self.memory.regions, region))
        except RequestError:
            region.close()
            raise
        self._replace_memory(table)

    def _rem_mem_reg(self, value: wire.SingleRegion, _arrived: _Arrived) -> None:
        gone = self.memory.find(value.region)
        if gone is None:
            raise RequestError("REM_MEM_REG names a region that is not there")
        self._replace_memory(MemoryTable(region for region in self.memory.regions if region is not gone))

    def _adopt_memory(self, regions: tuple[Region, ...]) -> None:
        self._replace_memory(MemoryTable(regions))

    def _replace_memory(self, table: MemoryTable) -> None:
        """Swap tables between chains, then unmap what is no longer named."""
        old = self.memory
        self.device.set_memory(table)
        self.memory = table
        for region in old.regions:
            if region not in table.regions:
                region.close()

    # Rings

    def _ring(self, index: int) -> Ring:
        if index >= len(self.rings):
            raise RequestError(f"ring {index} of {len(self.rings)}")
        return self.rings[index]

    def _stopped_ring(self, index: int) -> Ring:
        ring = self._ring(index)
        if ring.started:
            raise RequestError(f"ring {index} is running: GET_VRING_BASE must stop it first")
        return ring

    def _set_vring_num(self, value: wire.VringState, _arrived: _Arrived) -> None:
        self._stopped_ring(value.index).size = value.num

    def _set_vring_addr(self, value: wire.VringAddress, _arrived: _Arrived) -> None:
        self._stopped_ring(value.index).addresses = value

    def _set_vring_base(self, value: wire.VringState, _arrived: _Arrived) -> None:
        if value.num > _MAX_BASE:
            raise RequestError(f"ring base {value.num}")
        self._stopped_ring(value.index).base = value.num

    def _get_vring_base(self, value: wire.VringState, _arrived: _Arrived) -> bytes:
        ring = self._ring(value.index)
        base = self.device.stop_ring(value.index)
        if base is not None:
            ring.base = base
        ring.started = False
        ring.replace("kick", None)
        return wire.VRING_STATE.encode(wire.VringState(value.index, ring.base))

    def _set_vring_kick(self, value: wire.U64, arrived: _Arrived) -> None:
        """A ring starts when its kick descriptor arrives."""
        index = value.value & wire.VRING_INDEX_MASK
        fd = self._event(value, arrived)
        if fd is None:
            raise RequestError("polling a ring without a kick descriptor is not supported")
        ring = self._ring(index)
        if not ring.started:
            try:
                self._start(index, ring)
            except RequestError:
                fd.close()
                raise
        ring.replace("kick", fd)

    def _start(self, index: int, ring: Ring) -> None:
        if ring.addresses is None:
            raise RequestError(f"ring {index} is started before its addresses are known")
        addresses = ring.addresses
        layout = RingLayout(ring.size, addresses.descriptor, addresses.available, addresses.used)
        self.device.start_ring(index, layout, ring.base)
        ring.started = True

    def _set_vring_call(self, value: wire.U64, arrived: _Arrived) -> None:
        fd = self._event(value, arrived)
        self.rings[value.value & wire.VRING_INDEX_MASK].replace("call", fd)

    def _set_vring_err(self, value: wire.U64, arrived: _Arrived) -> None:
        fd = self._event(value, arrived)
        self.rings[value.value & wire.VRING_INDEX_MASK].replace("error", fd)

    def _event(self, value: wire.U64, arrived: _Arrived) -> Fd | None:
        """Check one of the three eventfd messages and take its descriptor, if it says that it has one."""
        if value.value & ~(wire.VRING_INDEX_MASK | wire.VRING_NO_FD):
            raise RequestError(f"ring index {value.value:#x}")
        self._ring(value.value & wire.VRING_INDEX_MASK)
        if value.value & wire.VRING_NO_FD:
            return None
        if not arrived.fds:
            raise RequestError("the descriptor is missing")
        if not is_eventfd(arrived.fds[0]):
            raise RequestError("the descriptor is not an eventfd")
        return arrived.take()

    def _set_vring_enable(self, value: wire.VringState, _arrived: _Arrived) -> None:
        if value.num > 1:
            raise RequestError(f"enable {value.num}")
        self._ring(value.index).enabled = bool(value.num)

    # Config space

    def _get_config(self, value: wire.ConfigAccess, _arrived: _Arrived) -> bytes:
        data = self.device.read_config(value.offset, value.size)
        return wire.CONFIG_ACCESS.encode(wire.ConfigAccess(value.offset, value.size, value.flags, data))

    def _set_config(self, value: wire.ConfigAccess, _arrived: _Arrived) -> None:
        self.device.write_config(value.offset, value.data)

    _HANDLERS: dict[Request, Callable[[Any, Any, Any], bytes | None]] = {  # noqa: RUF012  (never changed)
        Request.GET_FEATURES: _get_features,
        Request.SET_FEATURES: _set_features,
        Request.SET_OWNER: _ignore,
        Request.RESET_OWNER: _ignore,
        Request.SET_MEM_TABLE: _set_mem_table,
        Request.SET_VRING_NUM: _set_vring_num,
        Request.SET_VRING_ADDR: _set_vring_addr,
        Request.SET_VRING_BASE: _set_vring_base,
        Request.GET_VRING_BASE: _get_vring_base,
        Request.SET_VRING_KICK: _set_vring_kick,
        Request.SET_VRING_CALL: _set_vring_call,
        Request.SET_VRING_ERR: _set_vring_err,
        Request.GET_PROTOCOL_FEATURES: _get_protocol_features,
        Request.SET_PROTOCOL_FEATURES: _set_protocol_features,
        Request.GET_QUEUE_NUM: _get_queue_num,
        Request.SET_VRING_ENABLE: _set_vring_enable,
        Request.SET_BACKEND_REQ_FD: _set_backend_channel,
        Request.GET_CONFIG: _get_config,
        Request.SET_CONFIG: _set_config,
        Request.GET_MAX_MEM_SLOTS: _get_max_mem_slots,
        Request.ADD_MEM_REG: _add_mem_reg,
        Request.REM_MEM_REG: _rem_mem_reg,
    }


def _check_header(header: wire.Header, payload: bytes) -> None:
    if header.flags & wire.VERSION_MASK != wire.VERSION:
        raise StreamError(
            f"vhost-user version {header.flags & wire.VERSION_MASK}, this back end speaks {wire.VERSION}"
        )
    if header.flags & wire.FLAG_REPLY or header.flags & ~wire.KNOWN_FLAGS:
        raise StreamError(f"flags {header.flags:#x} in a request")
    if header.size != len(payload):
        raise StreamError(f"{len(payload)} bytes of payload where the header says {header.size}")


def _u64(value: int) -> bytes:
    return wire.U64_PAYLOAD.encode(wire.U64(value))
