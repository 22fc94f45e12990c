"""What the tests of the catalogue do again and again: messages as bytes, their answers, and a report that must go through.

Not a test.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Iterator, Sequence

from hostdev.driver import Buffer, DriverRing
from hostdev.fds import Fd
from hostdev.frontend import Frontend
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import Role
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, Request
from tests.device_program import Program, children, descriptors, wait_for
from tests.in_process import PAGE, InProcess

REPORTING, INFLATE, DEFLATE = Role.REPORTING, Role.INFLATE, Role.DEFLATE
STATISTICS, HINT = Role.STATISTICS, Role.FREE_PAGE_HINT
# A page that the tests give away, and where lists of page frame numbers and statistics lie.
FREE, LIST = 0x800000, 0x180000

_SIOCOUTQ = 0x5411  # linux/sockios.h

_TABLE = wire.MemoryTable(1, 0, (wire.MemoryRegion(0, PAGE, 0, 0),))
_ACCESS = wire.CONFIG_ACCESS.encode(wire.ConfigAccess(0, 16, 0, bytes(16)))
# A payload of the right shape for each request.
PAYLOADS: dict[Request, bytes] = {
    request: shape.payload.encode(wire.Nothing()) if shape.payload is wire.NOTHING else b""
    for request, shape in wire.MESSAGES.items()
} | {
    Request.SET_FEATURES: bytes(8),
    Request.SET_PROTOCOL_FEATURES: bytes(8),
    Request.SET_MEM_TABLE: wire.MEMORY_TABLE.encode(_TABLE),
    Request.SET_VRING_ADDR: bytes(40),
    Request.GET_CONFIG: _ACCESS,
    Request.SET_CONFIG: _ACCESS,
    Request.ADD_MEM_REG: bytes(40),
    Request.REM_MEM_REG: bytes(40),
    **dict.fromkeys(
        (
            Request.SET_VRING_NUM,
            Request.SET_VRING_BASE,
            Request.GET_VRING_BASE,
            Request.SET_VRING_ENABLE,
            Request.SET_VRING_KICK,
            Request.SET_VRING_CALL,
            Request.SET_VRING_ERR,
        ),
        bytes(8),
    ),
}
# What a request that always has a reply is answered when it is refused.
REFUSALS: dict[int, bytes] = {
    Request.GET_CONFIG: bytes(12),
    Request.GET_FEATURES: bytes(8),
    Request.GET_PROTOCOL_FEATURES: bytes(8),
    Request.GET_QUEUE_NUM: bytes(8),
    Request.GET_MAX_MEM_SLOTS: bytes(8),
}
REFUSED = (1).to_bytes(8, "little")


def say(guest: Frontend, request: int, payload: bytes, descriptors: Sequence[Fd] = ()) -> bytes:
    """Send a message that asks for a reply. Returns that, which must be of the same request."""
    guest.send_raw(wire.message(request, FLAG_NEED_REPLY, payload), descriptors)
    header, reply = guest.receive()
    assert (header.request, header.flags) == (request, wire.VERSION | wire.FLAG_REPLY)
    return reply


def is_refused(guest: Frontend, request: int, payload: bytes, descriptors: Sequence[Fd] = ()) -> bool:
    reply = say(guest, request, payload, descriptors)
    if request == Request.GET_VRING_BASE:
        return reply == payload[:4].ljust(8, b"\0")  # the ring that was asked for, and 0
    return reply == REFUSALS.get(request, REFUSED)


def is_read(connection: socket.socket) -> bool:
    """True once the other side has read all that was sent: of a unix socket the kernel counts memory, one byte for none."""
    (unread,) = struct.unpack("i", fcntl.ioctl(connection, _SIOCOUTQ, bytes(4)))
    return int(unread) <= 1


def wait_idle(device: Program, count: int) -> None:
    """Wait until a device that serves one front end after another has none any more, and count descriptors as before."""
    wait_for(lambda: not children(device.pid), "the worker's end")
    wait_for(lambda: len(descriptors(device.pid)) == count, f"{count} descriptors, as before")


def status(guest: Frontend, request: Request, value: object, descriptors: Sequence[Fd] = ()) -> int:
    """Send a request that has no reply of its own. Returns its status."""
    return int(guest.request(request, value, descriptors, need_reply=True))


def offered(address: int, length: int) -> Buffer:
    """A buffer of a report."""
    return Buffer(address, length, writable=True)


def fill(guest: Frontend, address: int, length: int) -> None:
    guest.memory.write(address, b"\xaa" * length)


def is_filled(guest: Frontend, address: int, length: int) -> bool:
    return guest.memory.read(address, length) == b"\xaa" * length


def is_empty(guest: Frontend, address: int, length: int) -> bool:
    return guest.memory.read(address, length) == bytes(length)


def finish(guest: Frontend, ring: DriverRing, head: int) -> int:
    """Have a chain that was offered come back, in whatever process the device is. Returns the used length."""
    if isinstance(guest, InProcess):
        guest.run(ring.index)
        ((returned, length),) = [element for element in ring.take_used() if element[0] == head]
        assert returned == head
        return length
    ring.notify()
    return ring.wait_used(head)


def report(guest: Frontend, *buffers: Buffer, indirect: bool = False) -> int:
    """Have a report answered. Returns the used length."""
    ring = guest.rings[REPORTING]
    return finish(guest, ring, ring.add(buffers, indirect=indirect))


def still_serves(guest: Frontend, address: int = FREE) -> None:
    """A good report releases its page, and only that."""
    fill(guest, address - PAGE, 3 * PAGE)
    assert report(guest, offered(address, PAGE)) == 0
    assert is_empty(guest, address, PAGE)
    assert is_filled(guest, address - PAGE, PAGE)
    assert is_filled(guest, address + PAGE, PAGE)


def still_inflates(guest: Frontend, address: int = FREE) -> None:
    """The same by the inflate queue, for when the ring of reports has stopped."""
    fill(guest, address, PAGE)
    assert send_pfns(guest, [address // PAGE]) == 0
    assert is_empty(guest, address, PAGE)


def send_pfns(guest: Frontend, pfns: Sequence[int], role: Role = INFLATE) -> int:
    """Have a list of page frame numbers answered. Returns the used length."""
    guest.memory.write(LIST, struct.pack(f"<{len(pfns)}I", *pfns))
    ring = guest.rings[role]
    return finish(guest, ring, ring.add([Buffer(LIST, 4 * len(pfns))]))


@contextlib.contextmanager
def eventfd(flags: int = os.EFD_NONBLOCK, value: int = 0) -> Iterator[Fd]:
    with Fd(os.eventfd(value, flags | os.EFD_CLOEXEC)) as fd:
        yield fd


@contextlib.contextmanager
def memfd(size: int) -> Iterator[Fd]:
    with Fd(os.memfd_create("other-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as fd:
        os.ftruncate(fd.fileno(), size)
        yield fd


@contextlib.contextmanager
def limit_of_files(pid: int, left: int) -> Iterator[None]:
    """Leave a process room for so many open files more."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = set(descriptors(pid))
    free = (number for number in range(soft) if number not in taken)
    limit = next(number for place, number in enumerate(free) if place == left)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def report_as_much_as_a_ring_holds(guest: Frontend) -> None:
    """One kick for all of it."""
    ring = guest.rings[REPORTING]
    fill(guest, FREE, ring.size * PAGE)
    heads = [ring.add([offered(FREE + n * PAGE, PAGE)]) for n in range(ring.size)]
    ring.notify()
    ring.wait_used(heads[-1])
    assert ring.take_used() == [(head, 0) for head in heads[:-1]]
    assert is_empty(guest, FREE, ring.size * PAGE)
