"""Cases 16 to 21: memory tables that cannot be, files that are no guest memory, and tables that change under running rings.

Case 19, a file that is cut short, is tests/driver/test_cut_short.py's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hostdev.driver import DEADLINE, USER_BASE, DriverRing, GuestMemory
from hostdev.fds import Fd
from hostdev.frontend import DeviceProcess, Frontend
from hostdev.giver import MAX_HOST_ERRORS
from hostdev.memory import MAX_REGIONS
from hostdev.wire import vhost_user as wire
from hostdev.wire.vhost_user import MemoryRegion, Request
from hostdev.wire.virtqueue import DESCRIPTOR, DESCRIPTOR_WRITE, Descriptor
from tests.catalogue.acts import (
    FREE,
    INFLATE,
    REPORTING,
    eventfd,
    fill,
    finish,
    is_empty,
    is_filled,
    is_refused,
    memfd,
    offered,
    report,
    status,
    still_inflates,
    still_serves,
)
from tests.in_process import MIB, PAGE, InProcess

# Beside the guest's own region, far from it in either address space.
FAR = MemoryRegion(1 << 40, MIB, 1 << 46, 0)
_F_ADD_SEALS, _F_SEAL_WRITE, _F_SEAL_FUTURE_WRITE = 1033, 0x0008, 0x0010  # uapi/linux/fcntl.h


def add(guest: Frontend, region: MemoryRegion, fd: Fd) -> int:
    return status(guest, Request.ADD_MEM_REG, wire.SingleRegion(0, region), [fd])


def remove(guest: Frontend, region: MemoryRegion) -> int:
    return status(guest, Request.REM_MEM_REG, wire.SingleRegion(0, region))


def replace_table(guest: Frontend, regions: tuple[MemoryRegion, ...], *given: Fd) -> int:
    return status(guest, Request.SET_MEM_TABLE, wire.MemoryTable(len(regions), 0, regions), given)


# 16. How many


def test_case_16_no_regions(guest: Frontend) -> None:
    """Refused, with a descriptor and without: the table before stays in force."""
    assert replace_table(guest, ()) == 1
    assert replace_table(guest, (), guest.memory.fd) == 1
    still_serves(guest)


def test_case_16_more_regions_than_slots(guest: Frontend) -> None:
    """MAX_REGIONS are advertised, and so many there can be, the guest's own among them."""
    assert guest.request(Request.GET_MAX_MEM_SLOTS) == MAX_REGIONS
    with memfd(MIB) as other:
        for number in range(1, MAX_REGIONS + 2):
            region = MemoryRegion(number << 40, PAGE, number << 40, number * PAGE)
            assert add(guest, region, other) == (number >= MAX_REGIONS)
    still_serves(guest)


def test_case_16_more_regions_than_a_table_has(guest: Frontend) -> None:
    # CVE-2021-3839: a count out of a message that indexed past an array.
    region = wire.REGION.encode(FAR)
    for count in (9, 10, 100, 2**31, 2**32 - 1):
        payload = count.to_bytes(4, "little") + bytes(4) + region * min(count, 16)
        assert is_refused(guest, Request.SET_MEM_TABLE, payload, [guest.memory.fd] * 8)
    still_serves(guest)


def test_case_16_as_many_descriptors_as_regions(guest: Frontend) -> None:
    # CVE-2019-14818: fewer regions than descriptors, and the rest stayed open.
    regions = tuple(MemoryRegion(n << 40, PAGE, n << 40, 0) for n in range(1, 9))
    for count in range(1, 9):
        for descriptors in {1, count - 1, count + 1, 8} - {0, count, 9}:
            assert replace_table(guest, regions[:count], *[guest.memory.fd] * descriptors) == 1
    still_serves(guest)


# 17. What cannot be


def impossible() -> dict[str, MemoryRegion]:
    """Regions that are refused beside the guest's own, which is 64 MiB at guest address 0 and at USER_BASE."""
    top = 1 << 64
    return {
        "no bytes": replace(FAR, size=0),
        "guest addresses past the end": replace(FAR, guest_address=top - PAGE, size=2 * PAGE),
        "front-end addresses past the end": replace(FAR, user_address=top - PAGE, size=2 * PAGE),
        "offsets past the end": replace(FAR, mmap_offset=top - PAGE, size=2 * PAGE),
        "all of 2^64 - 1": MemoryRegion(top - 1, top - 1, top - 1, top - 1),
        "a size of 2^64 - 4096": replace(FAR, size=top - PAGE),
        "guest addresses overlap by a page": replace(FAR, guest_address=64 * MIB - PAGE),
        "guest addresses inside": replace(FAR, guest_address=MIB),
        "guest addresses around": replace(FAR, guest_address=0, size=64 * MIB, user_address=1 << 46),
        "front-end addresses overlap by a page": replace(FAR, user_address=USER_BASE + 64 * MIB - PAGE),
        "front-end addresses inside": replace(FAR, user_address=USER_BASE + MIB),
        "the same once more": MemoryRegion(0, 64 * MIB, USER_BASE, 0),
        "offset not on a page": replace(FAR, mmap_offset=512),
        "guest address not on a page": replace(FAR, guest_address=(1 << 40) + 8),
        "front-end address not on a page": replace(FAR, user_address=(1 << 46) + 1),
    }


@pytest.mark.parametrize("how", ["ADD_MEM_REG", "SET_MEM_TABLE"])
def test_case_17_a_region_that_cannot_be(guest: Frontend, how: str) -> None:
    """Refused, and the table before stays in force, also where the rest of the new one was right."""
    # CVE-2020-10722: size and offset whose sum wraps, and a mapping that is smaller than was thought.
    for what, region in impossible().items():
        if how == "ADD_MEM_REG":
            refused = add(guest, region, guest.memory.fd)
        else:
            fd = guest.memory.fd
            refused = replace_table(guest, (*guest.memory.regions, region), fd, fd)
        assert refused == 1, what
        still_serves(guest)


def test_case_17_the_last_page_of_the_address_space(guest: Frontend) -> None:
    """Is one as any other: what ends at 2^64 passes no end, and nothing here wraps."""
    last = MemoryRegion((1 << 64) - PAGE, PAGE, (1 << 64) - PAGE, PAGE)
    with memfd(4 * PAGE) as other:
        os.pwrite(other.fileno(), b"\xaa" * 4 * PAGE, 0)
        assert add(guest, last, other) == 0
        assert report(guest, offered(last.guest_address, 0xFFFFFFFF)) == 0
        assert os.pread(other.fileno(), 4 * PAGE, 0) == b"\xaa" * PAGE + bytes(PAGE) + b"\xaa" * 2 * PAGE
    still_serves(guest)
    assert remove(guest, last) == 0
    still_serves(guest)


# 18. What is no guest memory


@contextlib.contextmanager
def opened(path: str | Path, flags: int) -> Iterator[Fd]:
    with Fd(os.open(path, flags | os.O_CLOEXEC)) as fd:
        yield fd


@contextlib.contextmanager
def strangers() -> Iterator[dict[str, Fd]]:
    """Descriptors that no page can be shared of, most of them of the size that is asked for."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        reading, writing = os.pipe()
        ours, theirs = socket.socketpair()
        stack.callback(ours.close)
        small, sealed, later = enter(memfd(MIB - 1)), enter(memfd(MIB)), enter(memfd(MIB))
        fcntl.fcntl(sealed.fileno(), _F_ADD_SEALS, _F_SEAL_WRITE)
        fcntl.fcntl(later.fileno(), _F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        whole = f"/proc/self/fd/{enter(memfd(MIB)).fileno()}"
        yield {
            "a byte too small": small,
            "a pipe": enter(Fd(reading)),
            "a pipe's other end": enter(Fd(writing)),
            "a socket": enter(Fd(theirs.detach())),
            "a directory": enter(opened("/", os.O_RDONLY | os.O_DIRECTORY)),
            "an eventfd": enter(eventfd()),
            "/dev/zero": enter(opened("/dev/zero", os.O_RDWR)),
            "/dev/null": enter(opened("/dev/null", os.O_RDWR)),
            "a process": enter(Fd(os.pidfd_open(os.getpid()))),
            "read-only memory": enter(opened(whole, os.O_RDONLY)),
            "write-only memory": enter(opened(whole, os.O_WRONLY)),
            "a path to memory": enter(opened(whole, os.O_PATH)),
            "write-sealed memory": sealed,
            "memory sealed against writing to come": later,
        }


def test_case_18_what_is_no_guest_memory(guest: Frontend) -> None:
    """Refused, as a region more and in a whole table; for a directory a page is asked for, which it is as large as."""
    with strangers() as found:
        for what, fd in found.items():
            for size in (MIB, PAGE):
                if what == "a byte too small" and size == PAGE:
                    continue
                region = replace(FAR, size=size)
                assert add(guest, region, fd) == 1, what
                assert replace_table(guest, (*guest.memory.regions, region), guest.memory.fd, fd) == 1, what
        still_serves(guest)


def test_case_18_offset_and_size_past_the_file(guest: Frontend) -> None:
    with memfd(MIB) as fd:
        for offset, size in ((PAGE, MIB), (MIB, PAGE), (MIB - PAGE, 2 * PAGE), (1 << 40, PAGE)):
            assert add(guest, replace(FAR, mmap_offset=offset, size=size), fd) == 1
        assert add(guest, FAR, fd) == 0
    still_serves(guest)


def test_case_18_a_file_on_disk_is_never_punched(guest: Frontend, on_disk: Fd) -> None:
    """It can be mapped, so it is a region, of which nothing is released: its data would be destroyed."""
    os.pwrite(on_disk.fileno(), b"\xaa" * MIB, 0)
    assert add(guest, FAR, on_disk) == 0
    assert report(guest, offered(FAR.guest_address, MIB)) == 0
    data = os.pread(on_disk.fileno(), 2 * MIB, 0)
    assert (len(data), data.count(0xAA)) == (MIB, MIB)
    still_serves(guest)


def test_case_18_memory_that_is_sealed_while_it_is_mapped(local: InProcess) -> None:
    """The host refuses from then on: counted, the buffer is returned, and after some the device is inert."""
    ring = local.rings[REPORTING]
    fill(local, FREE, MAX_HOST_ERRORS * PAGE)
    heads = [ring.add([offered(FREE + turn * PAGE, PAGE)]) for turn in range(MAX_HOST_ERRORS)]
    # What is mapped may be written to, so the rings go on; a hole may not be punched any more.
    fcntl.fcntl(local.memory.fd.fileno(), _F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
    for _ in heads:
        assert not local.balloon.inert
        assert local.step(REPORTING).returned
    assert local.balloon.inert
    assert ring.take_used() == [(head, 0) for head in heads]
    assert local.metrics.value("host_errors_total", str(errno.EPERM)) == MAX_HOST_ERRORS
    assert is_filled(local, FREE, MAX_HOST_ERRORS * PAGE)


# 20. REM_MEM_REG


def test_case_20_a_region_that_is_not_there(guest: Frontend) -> None:
    (known,) = guest.memory.regions
    unknown = [
        FAR,
        replace(known, guest_address=PAGE),
        replace(known, user_address=known.user_address + PAGE),
        replace(known, size=known.size - PAGE),
        replace(known, size=0),
        MemoryRegion(2**64 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1),
    ]
    for region in unknown:
        assert remove(guest, region) == 1
    still_serves(guest)


def test_case_20_a_region_with_running_rings(device: DeviceProcess, guest: Frontend) -> None:
    """They pause until it is there again: QEMU changes a region by taking it away and adding it, and refusing ends that."""
    (known,) = guest.memory.regions
    ring = guest.rings[REPORTING]
    still_serves(guest)
    fill(guest, FREE, PAGE)
    assert remove(guest, known) == 0
    head = ring.offer([offered(FREE, PAGE)])
    for _ in range(5):
        guest.read_config()
    assert (ring.used_index, is_filled(guest, FREE, PAGE)) == (1, True)
    assert add(guest, known, guest.memory.fd) == 0
    assert ring.wait_used(head) == 0
    assert is_empty(guest, FREE, PAGE)
    assert guest.stop()[REPORTING] == 2
    assert len(device.workers()) == 1


def test_case_20_the_ring_in_the_other_region_goes_on() -> None:
    """Reports lie in the region that goes, everything else in the one that stays; in process, to see into both."""
    low, high = MemoryRegion(0, 8 * MIB, USER_BASE, 0), MemoryRegion(8 * MIB, 8 * MIB, 1 << 46, 8 * MIB)
    with InProcess(GuestMemory(16 * MIB, [low, high])) as guest:
        guest.rings[REPORTING] = DriverRing(guest.memory, REPORTING, 128, 8 * MIB)
        guest.start()
        assert remove(guest, high) == 0
        guest.rings[REPORTING].add([offered(MIB * 4, PAGE)])
        assert guest.run(REPORTING) == 0
        still_inflates(guest, 4 * MIB)
        # The front end's question has its answer, too.
        assert guest.stop() == {0: 1, 1: 0, 2: 0, 3: 0, 4: 0}


def test_case_20_a_stray_descriptor(guest: Frontend) -> None:
    """Tolerated and closed: some front ends send it. Two are refused."""
    with memfd(MIB) as fd:
        assert add(guest, FAR, fd) == 0
        region = wire.SingleRegion(0, FAR)
        assert status(guest, Request.REM_MEM_REG, region, [fd, fd]) == 1
        assert status(guest, Request.REM_MEM_REG, region, [fd]) == 0
        assert status(guest, Request.REM_MEM_REG, region, [fd]) == 1
    still_serves(guest)


# 21. SET_MEM_TABLE under running rings


def halves(size: int) -> tuple[MemoryRegion, MemoryRegion]:
    half = size // 2
    return MemoryRegion(0, half, USER_BASE, 0), MemoryRegion(half, half, USER_BASE + half, half)


def test_case_21_a_table_in_which_the_rings_are(guest: Frontend) -> None:
    """They go on where they were, in the new one."""
    fd = guest.memory.fd
    for turn in range(10):
        still_serves(guest)
        table = guest.memory.regions if turn % 2 else halves(guest.memory.size)
        assert replace_table(guest, table, *[fd] * len(table)) == 0
    still_serves(guest)
    assert guest.stop()[REPORTING] == 11


def test_case_21_a_table_in_which_they_are_not(guest: Frontend) -> None:
    """Nothing of the old one is touched any more; they wait for one that has them."""
    ring = guest.rings[REPORTING]
    fill(guest, FREE, PAGE)
    with memfd(MIB) as fd:
        assert replace_table(guest, (FAR,), fd) == 0
        head = ring.offer([offered(FREE, PAGE)])
        for _ in range(5):
            guest.read_config()
        assert (ring.used_index, is_filled(guest, FREE, PAGE)) == (0, True)
    assert replace_table(guest, guest.memory.regions, guest.memory.fd) == 0
    assert ring.wait_used(head) == 0
    still_serves(guest)


def test_case_21_the_next_chain_is_read_in_the_new_table(guest: Frontend) -> None:
    """At the same addresses there is another file, with another chain in the ring: that one counts."""
    still_serves(guest)
    ring = guest.rings[REPORTING]
    with GuestMemoryCopy(guest.memory) as other:
        fill(guest, FREE, 2 * PAGE)
        other.write(FREE, b"\xbb" * 2 * PAGE)
        other.write(ring.descriptors, DESCRIPTOR.encode(Descriptor(FREE + PAGE, PAGE, DESCRIPTOR_WRITE, 0)))
        # The driver's word in the old file, which is not to be heard: the first page.
        guest.memory.write(ring.descriptors, DESCRIPTOR.encode(Descriptor(FREE, PAGE, DESCRIPTOR_WRITE, 0)))
        assert replace_table(guest, other.regions, other.fd) == 0
        other.write(ring.available + 4 + 2, bytes(2))
        other.write(ring.available + 2, (2).to_bytes(2, "little"))
        ring.notify()
        assert ring.wait_call(DEADLINE)
        while other.read(ring.used + 2, 2) != b"\x02\0":
            assert ring.wait_call(DEADLINE)
        assert other.read(FREE, 2 * PAGE) == b"\xbb" * PAGE + bytes(PAGE)
        assert is_filled(guest, FREE, 2 * PAGE)
        assert ring.used_index == 1
    assert replace_table(guest, guest.memory.regions, guest.memory.fd) == 0
    assert len(guest.stop()) == 5


class GuestMemoryCopy(GuestMemory):
    """The same bytes in another file."""

    def __init__(self, original: GuestMemory) -> None:
        super().__init__(original.size, original.regions)
        for address in range(0, 2 * MIB, MIB):
            self.write(address, original.read(address, MIB))

    def __enter__(self) -> GuestMemoryCopy:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def add_another(guest: Frontend) -> int:
    with memfd(MIB) as other:
        return add(guest, FAR, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda guest: replace_table(guest, halves(guest.memory.size), *[guest.memory.fd] * 2),
        add_another,
    ],
    ids=["SET_MEM_TABLE", "ADD_MEM_REG"],
)
def test_case_21_in_the_middle_of_a_chain(change: Callable[[Frontend], int]) -> None:
    """It is abandoned, and begun again in the new table (docs/design.md, rule 4): it was not answered."""
    with InProcess(GuestMemory(256 * MIB)) as guest:
        guest.start()
        ring = guest.rings[REPORTING]
        head = ring.add([offered(64 * MIB, 128 * MIB)])
        assert guest.step(REPORTING).more
        assert (change(guest), ring.used_index) == (0, 0)
        assert finish(guest, ring, head) == 0
        assert sum(length for _start, length in guest.discarder.released) > 128 * MIB
        still_serves(guest)
        assert guest.rings[INFLATE].used_index == 0
