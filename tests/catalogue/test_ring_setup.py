"""Cases 22 to 27: what the front end says of rings, and when; kicks that come without reason, or not at all."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading

import pytest

from hostdev.driver import DEADLINE, DriverRing, GuestMemory
from hostdev.fds import Fd
from hostdev.frontend import DeviceProcess, Frontend
from hostdev.wire import vhost_user as wire
from hostdev.wire.vhost_user import VRING_NO_FD, MemoryRegion, Request
from tests.catalogue.acts import (
    DEFLATE,
    FREE,
    INFLATE,
    REPORTING,
    eventfd,
    fill,
    is_empty,
    is_filled,
    is_refused,
    offered,
    report_as_much_as_a_ring_holds,
    send_pfns,
    status,
    still_inflates,
    still_serves,
)
from tests.in_process import MIB, PAGE, InProcess

EVENTS = (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)
STATES = (
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.GET_VRING_BASE,
    Request.SET_VRING_ENABLE,
)


def is_signalled(fd: Fd, seconds: float = DEADLINE) -> bool:
    poll = select.poll()
    poll.register(fd.fileno(), select.POLLIN)
    return bool(poll.poll(seconds * 1000))


# 22. Rings that there are not


def test_case_22_rings_that_there_are_not(guest: Frontend) -> None:
    """By the whole of the number: what its low bits say is no ring either."""
    # CVE-2020-10723: a 32-bit index, cut to 16 bits before it was checked.
    # CVE-2011-2512: a negative one, smaller than the number of queues.
    call = guest.rings[REPORTING].call
    for index in (5, 6, 127, 255, 256, 256 + REPORTING, 1 << 16, 1 << 16 | REPORTING, 2**31, 2**32 - 1):
        for request in STATES:
            assert is_refused(guest, request, struct.pack("<II", index, 1)), (request, index)
        assert is_refused(guest, Request.SET_VRING_ADDR, struct.pack("<II", index, 0) + bytes(32))
    for value in (
        5,
        0xFF,
        5 | VRING_NO_FD,
        1 << 9,
        1 << 16,
        1 << 31,
        1 << 32,
        1 << 63 | REPORTING,
        2**64 - 1,
    ):
        for request in EVENTS:
            assert is_refused(guest, request, struct.pack("<Q", value), [call]), (request, value)
    still_serves(guest)


# 23. Sizes and bases


def test_case_23_sizes_that_no_ring_has(guest: Frontend) -> None:
    """Refused at the start, when all of the ring is known; the ring can be set up again, and the others run."""
    bases = guest.stop()
    ring = guest.rings[REPORTING]
    right = ring.size
    for size in (0, 3, 6, 127, 129, 32769, 65535, 65536, 2**31, 2**32 - 1):
        ring.size = size
        assert guest.start_ring(ring) == 1, size
    ring.size = right
    guest.resume(bases=bases)
    still_serves(guest)
    still_inflates(guest)


def test_case_23_bases_that_no_ring_has(guest: Frontend) -> None:
    guest.stop()
    for base in (65536, 65537, 2**31, 2**32 - 1):
        assert status(guest, Request.SET_VRING_BASE, wire.VringState(REPORTING, base)) == 1
    guest.resume()
    still_serves(guest)


# 24. Where a ring may lie


def start_at(guest: Frontend, descriptor: int, available: int, used: int, size: int = 128) -> int:
    """Set the ring of reports up at these front-end addresses. Returns the status of its start."""
    number = int(REPORTING)
    guest.request(Request.SET_VRING_NUM, wire.VringState(number, size))
    guest.request(Request.SET_VRING_BASE, wire.VringState(number, 0))
    guest.request(
        Request.SET_VRING_ADDR, wire.VringAddress(number, 0, descriptor, used, available, 0), need_reply=True
    )
    return status(guest, Request.SET_VRING_KICK, wire.U64(number), [guest.rings[number].kick])


def test_case_24_places_where_no_ring_can_lie(guest: Frontend) -> None:
    """Unaligned, outside, over the end, over the address space's end: each part of it, and the ring runs afterwards."""
    # CVE-2020-10725: an address that is not checked because something else is 0.
    bases = guest.stop()
    user = guest.memory.user_address
    end = user(0) + guest.memory.size
    good = [user(0x10000), user(0x20000), user(0x30000)]
    sizes = (16 * 128, 6 + 2 * 128, 6 + 8 * 128)
    aligned = (16, 2, 4)
    for part in range(3):
        wrong = [good[part] + aligned[part] // 2, good[part] + 1, 0, user(0) - 4096, end, end - 16]
        wrong += [2**64 - 16, 2**64 - 4096, 1 << 63, end - sizes[part] // 16 * 16 + 16]
        for address in wrong:
            places = [*good[:part], address, *good[part + 1 :]]
            assert start_at(guest, *places) == 1, (part, hex(address))
    still_inflates_after(guest, bases)


def still_inflates_after(guest: Frontend, bases: dict[int, int]) -> None:
    guest.resume(bases=bases)
    still_serves(guest)
    still_inflates(guest)


def test_case_24_over_the_edge_of_a_region_into_the_next() -> None:
    """Two regions may be neighbours for the guest and for the front end, and are two mappings."""
    # CVE-2018-1059: a range that is contiguous for the guest was taken for contiguous in the host.
    low = MemoryRegion(0, 32 * MIB, 0x7F00_0000_0000, 0)
    high = MemoryRegion(32 * MIB, 32 * MIB, 0x7F00_0000_0000 + 32 * MIB, 32 * MIB)
    with InProcess(GuestMemory(64 * MIB, [low, high])) as guest:
        guest.start()
        bases = guest.stop()
        user = guest.memory.user_address
        good = [user(0x10000), user(0x20000), user(0x30000)]
        for part, size in enumerate((16 * 128, 6 + 2 * 128, 6 + 8 * 128)):
            for into in (16, size // 32 * 16):
                places = [*good[:part], user(32 * MIB) - into, *good[part + 1 :]]
                assert start_at(guest, *places) == 1, (part, into)
        still_inflates_after(guest, bases)


def test_case_24_at_the_very_end(guest: Frontend) -> None:
    """The last byte of a region is as good as any."""
    bases = guest.stop()
    at = guest.memory.size - 0x2000
    ring = DriverRing(guest.memory, REPORTING, 128, at)
    # Its three parts end with the region, apart from what their alignment asks for.
    shift = (guest.memory.size - (ring.used + 6 + 8 * 128 + 2)) // 16 * 16
    ring.close()
    guest.rings[REPORTING].close()
    guest.rings[REPORTING] = DriverRing(guest.memory, REPORTING, 128, at + shift)
    bases[REPORTING] = 0
    still_inflates_after(guest, bases)


@pytest.mark.parametrize("size", [1, 8, 128])
@pytest.mark.parametrize("where", ["all in one place", "used on available", "available on descriptors"])
def test_case_24_parts_that_overlap(device: DeviceProcess, guest: Frontend, where: str, size: int) -> None:
    """It is the guest's own memory that gets mixed up: whatever comes of it, the other rings are served."""
    bases = guest.stop()
    (worker,) = device.workers()
    user = guest.memory.user_address
    one, two, three = user(0x300000), user(0x310000), user(0x320000)
    places = {
        "all in one place": (one, one, one),
        "used on available": (one, two, two),
        "available on descriptors": (one, one, three),
    }[where]
    guest.memory.write(0x300000, struct.pack("<QIHHQ", 0x10000, PAGE, 2, 0, 0x10001))
    assert start_at(guest, *places, size=size) == 0
    guest.enable()
    for _ in range(20):
        guest.rings[REPORTING].notify()
        guest.read_config()
    base = guest.request(Request.GET_VRING_BASE, wire.VringState(REPORTING, 0))
    assert 0 <= base.num <= 0xFFFF
    bases[REPORTING] = 0
    guest.resume(bases=bases)
    still_inflates(guest)
    assert device.workers() == [worker]


# 25. The three descriptors of a ring


def test_case_25_no_descriptor(guest: Frontend) -> None:
    """Bit 8: no call, no error, fine. A ring without a kick would have to be polled: refused, and the old one stays."""
    guest.rings[REPORTING].offer([offered(FREE, PAGE)])
    while guest.rings[REPORTING].used_index < 1:
        guest.read_config()
    no = wire.U64(REPORTING | VRING_NO_FD)
    assert status(guest, Request.SET_VRING_KICK, no) == 1
    assert status(guest, Request.SET_VRING_ERR, no) == 0
    assert status(guest, Request.SET_VRING_CALL, no) == 0
    ring = guest.rings[REPORTING]
    os.eventfd_read(ring.call.fileno())  # that of the report before, which had been seen already
    fill(guest, FREE, PAGE)
    ring.offer([offered(FREE, PAGE)])
    while ring.used_index < 2:
        guest.read_config()
    assert is_empty(guest, FREE, PAGE)
    assert not is_signalled(ring.call, 0)
    assert status(guest, Request.SET_VRING_CALL, wire.U64(REPORTING), [ring.call]) == 0
    still_serves(guest)


def test_case_25_what_is_no_eventfd(guest: Frontend) -> None:
    """Refused before it is ever read or written: a pipe would block, and a file means nothing. The old one stays."""
    reading, writing = os.pipe()
    ours, theirs = socket.socketpair()
    with (
        ours,
        Fd(reading) as read_end,
        Fd(writing) as write_end,
        Fd(theirs.detach()) as sock,
        Fd(os.memfd_create("[eventfd]")) as file,
        Fd(os.pidfd_open(os.getpid())) as process,
    ):
        for request in EVENTS:
            assert status(guest, request, wire.U64(REPORTING)) == 1  # none, and bit 8 not set
            for fd in (read_end, write_end, sock, file, process, guest.memory.fd):
                assert status(guest, request, wire.U64(REPORTING), [fd]) == 1
    still_serves(guest)


def test_case_25_blocking_eventfds_never_block(guest: Frontend) -> None:
    """Full, where a write would wait for ever, and drained by somebody else, where a read would."""
    ring = guest.rings[REPORTING]
    with eventfd(0) as call, eventfd(0) as kick:
        os.eventfd_write(call.fileno(), 2**64 - 2)
        assert status(guest, Request.SET_VRING_CALL, wire.U64(REPORTING), [call]) == 0
        assert status(guest, Request.SET_VRING_KICK, wire.U64(REPORTING), [kick]) == 0
        fill(guest, FREE, PAGE)
        ring.add([offered(FREE, PAGE)])
        os.eventfd_write(kick.fileno(), 1)
        while ring.used_index < 1:
            guest.read_config()
        assert is_empty(guest, FREE, PAGE)
        # Taken by us as often as by the device: whoever is too late must not wait.
        os.set_blocking(kick.fileno(), False)
        for _ in range(2000):
            os.eventfd_write(kick.fileno(), 1)
            try:
                os.eventfd_read(kick.fileno())
            except BlockingIOError:
                continue
        os.set_blocking(kick.fileno(), True)
        still_inflates(guest)
    for request, fd in ((Request.SET_VRING_CALL, ring.call), (Request.SET_VRING_KICK, ring.kick)):
        assert status(guest, request, wire.U64(REPORTING), [fd]) == 0
    still_serves(guest)


def test_case_25_the_peer_closes_its_end(guest: Frontend) -> None:
    """The device has its own: it goes on, and nobody hears it."""
    ring = guest.rings[REPORTING]
    with eventfd() as kick, eventfd() as call, eventfd() as error:
        for request, fd in zip(EVENTS, (kick, call, error), strict=True):
            assert status(guest, request, wire.U64(REPORTING), [fd]) == 0
        os.eventfd_write(kick.fileno(), 1)
    still_inflates(guest)
    ring.add([offered(FREE, PAGE)])
    # Nobody kicks: what was queued is found with the next message.
    while ring.used_index < 1:
        guest.read_config()
    for request, fd in zip(EVENTS[:2], (ring.kick, ring.call), strict=True):
        assert status(guest, request, wire.U64(REPORTING), [fd]) == 0
    still_serves(guest)


def test_case_25_one_descriptor_for_all_rings(guest: Frontend) -> None:
    """A kick of it is a kick of each."""
    with eventfd() as kick, eventfd() as call:
        for index in range(5):
            assert status(guest, Request.SET_VRING_KICK, wire.U64(index), [kick]) == 0
            assert status(guest, Request.SET_VRING_CALL, wire.U64(index), [call]) == 0
        fill(guest, FREE, PAGE)
        reports, deflations = guest.rings[REPORTING], guest.rings[DEFLATE]
        reports.add([offered(FREE, PAGE)])
        deflations.add([offered(FREE, PAGE)])
        for ring in (reports, deflations):
            # Whichever look at the one eventfd took its count; the next one is for the other.
            while ring.used_index < 1:
                os.eventfd_write(kick.fileno(), 1)
                guest.read_config()
        assert is_empty(guest, FREE, PAGE)
        assert is_signalled(call)
    guest.resume(bases=guest.stop())
    still_serves(guest)


# 26. Kicks


def test_case_26_kicks_without_work(guest: Frontend) -> None:
    """A million: nothing is made of them, and others are served meanwhile."""
    # CVE-2019-3900: a guest that keeps a ring busy for ever, and nobody else has a turn.
    ring = guest.rings[REPORTING]

    def kick() -> None:
        for _ in range(1_000_000):
            os.eventfd_write(ring.kick.fileno(), 1)

    flood = threading.Thread(target=kick)
    flood.start()
    try:
        while flood.is_alive():
            still_inflates(guest)
            assert guest.read_config().num_pages == 0
    finally:
        flood.join()
    assert ring.used_index == 0
    os.eventfd_write(ring.kick.fileno(), 1_000_000)
    still_serves(guest)
    assert ring.used_index == 1


def test_case_26_work_without_a_kick(guest: Frontend) -> None:
    """Found once, with the next look at the ring: here after any message."""
    ring = guest.rings[REPORTING]
    fill(guest, FREE, PAGE)
    ring.add([offered(FREE, PAGE)])
    while ring.used_index < 1:
        guest.read_config()
    assert is_empty(guest, FREE, PAGE)
    for _ in range(100):
        ring.notify()
        guest.read_config()
    assert ring.used_index == 1
    still_serves(guest)


def test_case_26_kicks_before_the_ring_is_enabled(fresh: Frontend) -> None:
    """They are not answered, and not lost: enabling it is a look."""
    fresh.negotiate()
    fresh.request(Request.SET_FEATURES, wire.U64(fresh.features | wire.F_PROTOCOL_FEATURES))
    fresh.add_memory()
    ring = fresh.rings[REPORTING]
    assert fresh.start_ring(ring) == 0
    fill(fresh, FREE, PAGE)
    for _ in range(100):
        ring.notify()
    head = ring.offer([offered(FREE, PAGE)])
    for _ in range(5):
        fresh.read_config()
    assert (ring.used_index, is_filled(fresh, FREE, PAGE)) == (0, True)
    fresh.enable()
    assert ring.wait_used(head) == 0
    assert is_empty(fresh, FREE, PAGE)
    still_serves(fresh)


def test_case_26_many_chains_for_one_kick(guest: Frontend) -> None:
    """Each is found, once, in its turn."""
    report_as_much_as_a_ring_holds(guest)
    still_serves(guest)


# 27. GET_VRING_BASE during work


def test_case_27_a_base_in_the_middle_of_a_chain() -> None:
    """The chain is abandoned and named by the base, not finished (docs/design.md, rule 4): QEMU waits under its big lock."""
    # CVE-2022-26354: an element that is not given back on the way out.
    with InProcess(GuestMemory(256 * MIB)) as guest:
        guest.start()
        ring = guest.rings[REPORTING]
        ring.add([offered(64 * MIB, 128 * MIB)])
        assert guest.step(REPORTING).more
        bases = guest.stop()
        image, done = guest.memory.read(0, 2 * MIB), list(guest.discarder.released)
        assert bases[REPORTING] == 0
        for index in range(5):
            assert guest.run(index) == 0
        assert (guest.memory.read(0, 2 * MIB), guest.discarder.released) == (image, done)
        guest.resume(bases=bases)
        guest.run(REPORTING)
        assert ring.take_used() == [(0, 0)]
        still_serves(guest)


def test_case_27_nothing_changes_after_the_answer(guest: Frontend) -> None:
    """Whenever it comes, in a queue full of work: base and used index agree, and no byte and no call comes later."""
    ring = guest.rings[REPORTING]
    base = 0
    for turn in range(20):
        fill(guest, FREE, 64 * PAGE)
        for number in range(64):
            ring.add([offered(FREE + number * PAGE, PAGE)])
        ring.notify()
        for _ in range(turn):
            guest.request(Request.GET_FEATURES)
        base = guest.request(Request.GET_VRING_BASE, wire.VringState(REPORTING, 0)).num
        while is_signalled(ring.call, 0):
            os.eventfd_read(ring.call.fileno())
        image = guest.memory.read(0, FREE + 64 * PAGE)
        ring.notify()
        assert send_pfns(guest, [FREE // PAGE + 1000]) == 0
        guest.read_config()
        assert base == ring.used_index
        seen = guest.memory.read(0, FREE + 64 * PAGE)
        assert seen[FREE:] == image[FREE:]
        assert (
            seen[ring.descriptors : ring.descriptors + 0x40000]
            == image[ring.descriptors : ring.descriptors + 0x40000]
        )
        assert not is_signalled(ring.call, 0)
        assert guest.start_ring(ring, base) == 0
        while ring.used_index != ring.next_available:
            ring.wait_call(DEADLINE)
        assert len(ring.take_used()) == 64
    assert guest.stop()[REPORTING] == 20 * 64
    assert guest.rings[INFLATE].used_index == 20
