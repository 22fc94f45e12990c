"""What the front end set up of each ring: size, addresses, base, the three eventfds, enabled, started.

The half of the vhost-user conversation that is about rings; session.py hands its messages on to here. No I/O. The device
model, behind the Device protocol below, is told when a ring starts and stops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from hostdev.errors import RequestError
from hostdev.fds import Fd, is_eventfd
from hostdev.memory import MemoryTable
from hostdev.virtqueue import RingLayout
from hostdev.wire import vhost_user as wire
from hostdev.wire.vhost_user import Request

_MAX_BASE = 0xFFFF


class Device(Protocol):
    """What the session needs of the device model. Each method may raise RequestError."""

    @property
    def offered_features(self) -> int:
        """Virtio feature bits."""

    @property
    def queue_count(self) -> int:
        """How many rings there can be."""

    @property
    def keeps_off(self) -> bool:
        """True if guest memory is not to be mapped: a touch of it may be the end of this process."""

    def set_features(self, features: int) -> None:
        """Take over the negotiated virtio feature bits."""

    def set_memory(self, memory: MemoryTable) -> None:
        """Use another memory table: no view into the old one may be left."""

    def start_ring(self, index: int, layout: RingLayout, base: int) -> None:
        """Begin to use a ring whose next available index is base."""

    def stop_ring(self, index: int) -> int | None:
        """Stop using a ring, abandoning a chain in progress. Returns its base, None if it was not started."""

    def abandon_ring(self, index: int) -> int | None:
        """Stop using a ring that cannot be stopped as it should be. Returns its base."""

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
class Arrived:
    """The descriptors of the message at hand; what is left in it at the end gets closed. curtailed: some were lost."""

    fds: list[Fd] = field(default_factory=list)
    curtailed: bool = False

    def take(self) -> Fd:
        """Take the next one over."""
        return self.fds.pop(0)


# A message's value and its descriptors in; the payload of a reply out, None where the message has none.
Handler: TypeAlias = Callable[[Any, Arrived], bytes | None]


class Vrings:
    """The rings of one connection, and the messages about them. Each handler may raise RequestError."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.rings = [Ring() for _ in range(device.queue_count)]

    def handlers(self) -> dict[Request, Handler]:
        """Return who handles which message."""
        return {
            Request.SET_VRING_NUM: self._set_num,
            Request.SET_VRING_ADDR: self._set_addr,
            Request.SET_VRING_BASE: self._set_base,
            Request.GET_VRING_BASE: self._get_base,
            Request.SET_VRING_KICK: self._set_kick,
            Request.SET_VRING_CALL: self._set_call,
            Request.SET_VRING_ERR: self._set_err,
            Request.SET_VRING_ENABLE: self._set_enable,
        }

    def enable_all(self) -> None:
        """Enable every ring: what a front end without the protocol features expects."""
        for ring in self.rings:
            ring.enabled = True

    def close(self) -> None:
        """Stop every ring and close every eventfd."""
        for index, ring in enumerate(self.rings):
            self._device.stop_ring(index)
            for name in ("kick", "call", "error"):
                ring.replace(name, None)

    def _ring(self, index: int) -> Ring:
        if index >= len(self.rings):
            raise RequestError(f"ring {index} of {len(self.rings)}")
        return self.rings[index]

    def _stopped_ring(self, index: int) -> Ring:
        ring = self._ring(index)
        if ring.started:
            raise RequestError(f"ring {index} is running: GET_VRING_BASE must stop it first")
        return ring

    def _set_num(self, value: wire.VringState, _arrived: Arrived) -> None:
        self._stopped_ring(value.index).size = value.num

    def _set_addr(self, value: wire.VringAddress, _arrived: Arrived) -> None:
        self._stopped_ring(value.index).addresses = value

    def _set_base(self, value: wire.VringState, _arrived: Arrived) -> None:
        if value.num > _MAX_BASE:
            raise RequestError(f"ring base {value.num}")
        self._stopped_ring(value.index).base = value.num

    def _get_base(self, value: wire.VringState, _arrived: Arrived) -> bytes:
        self._ring(value.index)
        return self._stopped(value.index, self._device.stop_ring(value.index))

    def abandon(self, index: int) -> bytes:
        """Answer a GET_VRING_BASE that cannot be carried out. The ring stops: the front end takes it for stopped."""
        return self._stopped(index, self._device.abandon_ring(index))

    def _stopped(self, index: int, base: int | None) -> bytes:
        ring = self.rings[index]
        if base is not None:
            ring.base = base
        ring.started = False
        ring.replace("kick", None)
        return wire.VRING_STATE.encode(wire.VringState(index, ring.base))

    def _set_kick(self, value: wire.U64, arrived: Arrived) -> None:
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
        self._device.start_ring(index, layout, ring.base)
        ring.started = True

    def _set_call(self, value: wire.U64, arrived: Arrived) -> None:
        fd = self._event(value, arrived)
        self.rings[value.value & wire.VRING_INDEX_MASK].replace("call", fd)

    def _set_err(self, value: wire.U64, arrived: Arrived) -> None:
        fd = self._event(value, arrived)
        self.rings[value.value & wire.VRING_INDEX_MASK].replace("error", fd)

    def _event(self, value: wire.U64, arrived: Arrived) -> Fd | None:
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

    def _set_enable(self, value: wire.VringState, _arrived: Arrived) -> None:
        if value.num > 1:
            raise RequestError(f"enable {value.num}")
        self._ring(value.index).enabled = bool(value.num)
