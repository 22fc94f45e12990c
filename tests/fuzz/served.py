"""A worker's device without its process: session, model, record and the worker's end of the keeper's channel.

Used by the targets about the record and the channel.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
from collections.abc import Iterator

from hostdev.balloon import Balloon
from hostdev.commands import Commands
from hostdev.discard import Discarder
from hostdev.driver import USER_BASE
from hostdev.errors import RingError
from hostdev.fds import Fd
from hostdev.journal import RecordJournal
from hostdev.message_end import MessageEnd
from hostdev.metrics import Metrics
from hostdev.record import Record
from hostdev.session import Session
from hostdev.snapshot import Done, Parts, gather
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import DEFAULT_FEATURES, QUEUE_COUNT
from hostdev.wire.channel import Frame, ToWorker, token
from hostdev.wire.vhost_user import F_PROTOCOL_FEATURES, FLAG_NEED_REPLY, Request
from tests.fuzz.descriptors import RAM_BYTES, Wares
from tests.fuzz.message_texts import PROTOCOL_FEATURES, Sent

RING_SIZE = 16
_PAGE = 0x1000
# Steps until a ring must be idle: as in ring_guest.py.
MAX_STEPS = 17 * 65


class Served:
    """One worker's. now: of its clock."""

    def __init__(self, record: Fd, channel: socket.socket) -> None:
        """Raises RecordError."""
        self.now = 1000.0
        self.record = Record(record)
        metrics = Metrics()
        self.journal = RecordJournal(self.record, metrics, self.gather)
        self.balloon = Balloon(
            DEFAULT_FEATURES,
            Discarder(),
            metrics,
            journal=self.journal,
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
        )
        self.session = Session(self.balloon, metrics, journal=self.journal)
        commands = Commands(self.balloon, self.session, clock=lambda: self.now)
        self.parts = Parts(self.session, self.balloon, commands, metrics)
        self.messages = MessageEnd(channel, self.session, self.balloon, self.journal)

    def set_up(self, wares: Wares, rings: int = QUEUE_COUNT) -> dict[int, Fd]:
        """Be what QEMU makes of a device until a guest's driver is up. Returns, by token, what each descriptor is one of.

        Past the channel and the journal, which take most of the time of an input otherwise.
        """
        given: dict[int, Fd] = {}
        for number, sent in enumerate(_start(wares, rings), 1):
            arrived = copies(number, sent)
            given |= {copy.token: fd for copy, fd in zip(arrived, sent.fds, strict=True)}
            header = wire.Header(sent.request, sent.flags | wire.VERSION, len(sent.payload))
            self.session.handle(header, sent.payload, arrived)
            self.messages.done = Done(number)
        self.journal.handled(self.messages.done.number)
        return {token: given[token] for token in self.session.held()}

    def gather(self) -> bytes:
        """Return the image of its state."""
        return gather(self.parts, self.messages.done)

    def run(self) -> None:
        """Serve all rings until they are idle or broken."""
        for index in range(QUEUE_COUNT):
            for _ in range(MAX_STEPS):
                try:
                    if not self.balloon.service(index).more:
                        break
                except RingError:
                    break
            else:
                raise AssertionError("a ring does not become idle")

    def close(self) -> None:
        """Close everything of it."""
        self.session.close()
        self.record.close()


def frame(number: int, sent: Sent, deaths: int = 0) -> Frame:
    """Return a message as the keeper passes it on."""
    return Frame(ToWorker.MESSAGE, deaths, number, sent.stream)


def copies(number: int, sent: Sent) -> list[Fd]:
    """Return duplicates of a message's descriptors, with the tokens that both sides know them by."""
    return [Fd(os.dup(fd.fileno()), token(number, place)) for place, fd in enumerate(sent.fds)]


@functools.cache
def _start(wares: Wares, rings: int) -> tuple[Sent, ...]:
    """What QEMU sends until a guest's driver is up."""
    return tuple(_messages(wares, rings))


def _messages(wares: Wares, rings: int) -> Iterator[Sent]:
    half = RAM_BYTES // 2
    yield Sent(Request.SET_PROTOCOL_FEATURES, 0, _u64(PROTOCOL_FEATURES))
    yield Sent(Request.SET_BACKEND_REQ_FD, FLAG_NEED_REPLY, b"", (wares.channel,))
    yield Sent(Request.SET_FEATURES, 0, _u64(DEFAULT_FEATURES | F_PROTOCOL_FEATURES))
    for at in (0, half):
        region = wire.MemoryRegion(at, half, USER_BASE + at, at)
        payload = wire.SINGLE_REGION.encode(wire.SingleRegion(0, region))
        yield Sent(Request.ADD_MEM_REG, FLAG_NEED_REPLY, payload, (wares.ram,))
    for index in range(rings):
        yield from _start_ring(wares, index)


def _start_ring(wares: Wares, index: int) -> Iterator[Sent]:
    at = USER_BASE + 3 * _PAGE * index
    yield Sent(Request.SET_VRING_NUM, 0, wire.VRING_STATE.encode(wire.VringState(index, RING_SIZE)))
    address = wire.VringAddress(index, 0, at, at + 2 * _PAGE, at + _PAGE, 0)
    yield Sent(Request.SET_VRING_ADDR, 0, wire.VRING_ADDRESS.encode(address))
    yield Sent(Request.SET_VRING_KICK, FLAG_NEED_REPLY, _u64(index), (wares.event,))
    yield Sent(Request.SET_VRING_CALL, FLAG_NEED_REPLY, _u64(index), (wares.event,))
    yield Sent(Request.SET_VRING_ENABLE, 0, wire.VRING_STATE.encode(wire.VringState(index, 1)))


def offer(wares: Wares, index: int, address: int, length: int, *, writable: bool) -> None:
    """Have a guest offer one buffer on a ring."""
    at = 3 * _PAGE * index
    (available,) = struct.unpack("<H", os.pread(wares.ram.fileno(), 2, at + _PAGE + 2))
    slot = available % RING_SIZE
    descriptor = struct.pack("<QIHH", address, length, 2 if writable else 0, 0)
    os.pwrite(wares.ram.fileno(), descriptor, at + 16 * slot)
    os.pwrite(wares.ram.fileno(), struct.pack("<H", slot), at + _PAGE + 4 + 2 * slot)
    os.pwrite(wares.ram.fileno(), struct.pack("<H", (available + 1) & 0xFFFF), at + _PAGE + 2)


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")
