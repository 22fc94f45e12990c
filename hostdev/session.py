"""The vhost-user conversation of a back end, sans I/O: one message and its descriptors in, a reply out.

Syntax is wire/vhost_user.py's; this file knows order and meaning. It holds what the front end set up (features, memory
table, rings) and tells the device model, through the Device protocol below, what that means for it. It never reads or
writes a socket: worker.py does.

Errors by fault: RequestError is answered here (non-zero where an answer was asked for, else logged and the old state
kept); StreamError goes to the caller, which closes the connection. Descriptors that no handler took are closed.
"""

from __future__ import annotations

import logging
from typing import Any

from hostdev.backend_channel import BackendChannel
from hostdev.errors import RequestError, StreamError
from hostdev.fds import Fd, close_all
from hostdev.journal import Journal
from hostdev.memory import MAX_REGIONS, MemoryTable, Region
from hostdev.metrics import Metrics, worth_logging
from hostdev.trace import Tracer
from hostdev.vrings import Arrived, Device, Handler, Vrings
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

_CURTAILED = "its descriptors were lost on the way: more than any message has, or a limit of open files is reached (ulimit -n)"


class Session:
    """One connection's state. handle() is the whole interface; the rest is for the worker to look at."""

    def __init__(
        self,
        device: Device,
        metrics: Metrics,
        trace: Tracer | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.device = device
        self.journal: Journal = journal or Journal()
        self.metrics = metrics
        self.trace: Tracer = trace or Tracer()
        self.features = 0
        self.protocol_features = ProtocolFeature(0)
        self.memory = MemoryTable()
        self._vrings = Vrings(device)
        self.rings = self._vrings.rings
        self.backend_channel: BackendChannel | None = None
        self._handlers = self._own_handlers() | self._vrings.handlers()

    def _own_handlers(self) -> dict[Request, Handler]:
        return {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_BACKEND_REQ_FD: self._set_backend_channel,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
        }

    def handle(self, header: wire.Header, payload: bytes, fds: list[Fd], *, curtailed: bool = False) -> bytes:
        """Act on one whole message and return the bytes to answer, none if no answer is due.

        curtailed: its descriptors were lost on the way, so it is refused. Raises StreamError for a header that shows a stream out of step.
        """
        arrived = Arrived(fds, curtailed)
        try:
            _check_header(header, payload)
            self.trace.message(header.request, payload, len(fds))
            return self._answer(header, payload, arrived)
        finally:
            close_all(arrived.fds)

    @property
    def may_tell(self) -> bool:
        """True while the back end may speak first: the front end uses its rings, and has not begun to stop them."""
        started = [ring for ring in self.rings if ring.started]
        return bool(started) and all(ring.enabled for ring in started)

    def close(self) -> None:
        """The front end has gone: stop every ring, unmap and close everything."""
        self._vrings.close()
        self._replace_memory(MemoryTable())
        self._drop_backend_channel()

    def _answer(self, header: wire.Header, payload: bytes, arrived: Arrived) -> bytes:
        try:
            request, value = self._decode(header, payload, arrived)
            reply = self._handlers[request](value, arrived)
        except RequestError as error:
            self._count_refusal(header, error)
            return self.refusal(header, payload)
        self.metrics.add("messages_total", 1, request.name)
        if reply is not None:
            return wire.message(request, wire.FLAG_REPLY, reply)
        return self._acknowledge(header, 0)

    def _decode(self, header: wire.Header, payload: bytes, arrived: Arrived) -> tuple[Request, Any]:
        if arrived.curtailed:
            raise RequestError(_CURTAILED)
        request = wire.request_of(header.request)
        if request is None:
            raise RequestError(f"request {header.request} is not known here")
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
        request = wire.request_of(header.request)
        name = request.name if request is not None else "unknown"
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
        request = wire.request_of(header.request)
        if request is not None and wire.MESSAGES[request].has_reply:
            return wire.message(header.request, wire.FLAG_REPLY, wire.U64_PAYLOAD.encode(wire.U64(0)))
        return self._acknowledge(header, 1)

    def give_up(self, header: wire.Header, payload: bytes) -> bytes:
        """Answer what cannot be carried out by a fault of ours: refuse it, but have a ring stop that is to stop."""
        index = int.from_bytes(payload[:4], "little")
        if header.request == Request.GET_VRING_BASE and index < len(self.rings):
            return wire.message(header.request, wire.FLAG_REPLY, self._vrings.abandon(index))
        return self.refusal(header, payload)

    def held(self) -> tuple[int, ...]:
        """Return the tokens of the descriptors in use."""
        found = [region.fd.token for region in self.memory.regions]
        for ring in self.rings:
            found += [fd.token for fd in (ring.kick, ring.call, ring.error) if fd is not None]
        if self.backend_channel is not None:
            found.append(self.backend_channel.token)
        return tuple(found)

    # Features

    def _get_features(self, _value: wire.Nothing, _arrived: Arrived) -> bytes:
        return _u64(self.device.offered_features | wire.F_PROTOCOL_FEATURES)

    def _set_features(self, value: wire.U64, _arrived: Arrived) -> None:
        unknown = value.value & ~(self.device.offered_features | wire.F_PROTOCOL_FEATURES)
        if unknown:
            raise RequestError(f"feature bits {unknown:#x} were never offered")
        self.device.set_features(value.value & ~wire.F_PROTOCOL_FEATURES)
        self.features = value.value
        if not value.value & wire.F_PROTOCOL_FEATURES:
            # "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly in the enabled state."
            self._vrings.enable_all()

    def _get_protocol_features(self, _value: wire.Nothing, _arrived: Arrived) -> bytes:
        return _u64(OFFERED_PROTOCOL_FEATURES)

    def _set_protocol_features(self, value: wire.U64, _arrived: Arrived) -> None:
        # As a number: inverting an IntFlag leaves out the bits that it has no member for.
        unknown = value.value & ~int(OFFERED_PROTOCOL_FEATURES)
        if unknown:
            raise RequestError(f"protocol feature bits {unknown:#x} were never offered")
        self.protocol_features = ProtocolFeature(value.value)

    def _get_queue_num(self, _value: wire.Nothing, _arrived: Arrived) -> bytes:
        return _u64(self.device.queue_count)

    def _set_owner(self, _value: wire.Nothing, _arrived: Arrived) -> None:
        """A session begins, maybe a second one on this connection: what the first left behind must not be in its way.

        QEMU does so when the device is unplugged and another is made on the same chardev: it then names all regions
        again. SET_VRING_CALL may come before, so eventfds stay.
        """
        for index, ring in enumerate(self.rings):
            self.device.stop_ring(index)
            ring.started = ring.enabled = False
            ring.replace("kick", None)
        self._replace_memory(MemoryTable())

    def _reset_owner(self, _value: wire.Nothing, _arrived: Arrived) -> None:
        """Deprecated: "Back-ends SHOULD either ignore this message, or use it to disable all rings". Ignored."""

    def _set_backend_channel(self, _value: wire.Nothing, arrived: Arrived) -> None:
        channel = BackendChannel.of(arrived.fds[0], self.journal)
        self._drop_backend_channel()
        self.backend_channel = channel

    def _drop_backend_channel(self) -> None:
        if self.backend_channel is not None:
            self.backend_channel.close()
            self.backend_channel = None

    # Memory

    def _set_mem_table(self, value: wire.MemoryTable, arrived: Arrived) -> None:
        if len(value.regions) != len(arrived.fds):
            raise RequestError(f"{len(value.regions)} regions with {len(arrived.fds)} descriptors")
        fresh: list[Region] = []
        try:
            for description in value.regions:
                fresh.append(self._region(description, arrived.fds[0]))
                arrived.take()
            table = MemoryTable(fresh)
        except RequestError:
            for region in fresh:
                region.close()
            raise
        self._replace_memory(table)

    def _region(self, description: wire.MemoryRegion, fd: Fd) -> Region:
        return Region(description, fd, mapped=not self.device.keeps_off)

    def _get_max_mem_slots(self, _value: wire.Nothing, _arrived: Arrived) -> bytes:
        return _u64(MAX_REGIONS)

    def _add_mem_reg(self, value: wire.SingleRegion, arrived: Arrived) -> None:
        region = self._region(value.region, arrived.fds[0])
        arrived.take()
        try:
            table = MemoryTable((*self.memory.regions, region))
        except RequestError:
            region.close()
            raise
        self._replace_memory(table)

    def _rem_mem_reg(self, value: wire.SingleRegion, _arrived: Arrived) -> None:
        gone = self.memory.find(value.region)
        if gone is None:
            raise RequestError("REM_MEM_REG names a region that is not there")
        self._replace_memory(MemoryTable(region for region in self.memory.regions if region is not gone))

    def _replace_memory(self, table: MemoryTable) -> None:
        """Swap tables between chains, then unmap what is no longer named."""
        old = self.memory
        self.device.set_memory(table)
        self.memory = table
        for region in old.regions:
            if region not in table.regions:
                region.close()

    # Config space

    def _get_config(self, value: wire.ConfigAccess, _arrived: Arrived) -> bytes:
        data = self.device.read_config(value.offset, value.size)
        return wire.CONFIG_ACCESS.encode(wire.ConfigAccess(value.offset, value.size, value.flags, data))

    def _set_config(self, value: wire.ConfigAccess, _arrived: Arrived) -> None:
        self.device.write_config(value.offset, value.data)


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
