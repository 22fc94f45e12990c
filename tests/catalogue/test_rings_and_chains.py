"""Cases 28 to 38: rings that lie, chains that cannot be followed, buffers that are no memory, and a guest that rewrites both.

A ring that lies stops, alone; a chain that cannot be followed is returned unused, and the next one is served.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hostdev import virtqueue
from hostdev.driver import DEADLINE, USER_BASE, Buffer, DriverRing, GuestMemory
from hostdev.frontend import Frontend, start_device
from hostdev.memory import MemoryTable
from hostdev.virtqueue import MAX_INDIRECT
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import DEFAULT_FEATURES, STATISTIC, Feature, Role, Statistic
from hostdev.wire.vhost_user import MemoryRegion, Request
from hostdev.wire.virtqueue import DESCRIPTOR, DESCRIPTOR_SIZE, DESCRIPTOR_STRUCT, Descriptor
from tests.catalogue.acts import (
    FREE,
    INFLATE,
    LIST,
    REPORTING,
    STATISTICS,
    eventfd,
    fill,
    finish,
    is_empty,
    is_filled,
    memfd,
    offered,
    report,
    report_as_much_as_a_ring_holds,
    send_pfns,
    status,
    still_inflates,
    still_serves,
)
from tests.device_program import program
from tests.in_process import MIB, PAGE, InProcess

NEXT, WRITE, INDIRECT = 1, 2, 4
TABLE = 0x200000
MEMORY = 64 * MIB


def publish(guest: Frontend, table: Sequence[Descriptor], role: Role = REPORTING) -> int:
    """Write the ring's table from entry 0 on, and have a chain that begins there come back. Returns the used length."""
    ring = guest.rings[role]
    guest.memory.write(ring.descriptors, b"".join(map(DESCRIPTOR.encode, table)))
    ring.publish(0)
    return finish(guest, ring, 0)


def begin_again(guest: Frontend, base: int = 0) -> None:
    """Stop all rings and start them empty, at an index of one's choice: as a driver does that is loaded again."""
    guest.stop()
    for ring in guest.rings:
        ring.next_available = ring._seen = base
        ring._free, ring._unclaimed = list(range(ring.size)), []
        ring.set_available_index(base)
        guest.memory.write(ring.used + 2, struct.pack("<H", base))
    guest.resume(bases=dict.fromkeys(range(5), base))


def wait_broken(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(DEADLINE * 1000), "the ring does not stop"
    os.eventfd_read(fd)


# 28. The available index


def test_case_28_an_available_index_that_lies(tmp_path: Path) -> None:
    """That ring stops, once, with one line in the log and the error descriptor signalled; its base is as before."""
    lies = (129, 130, 0x4000, 0x8000, 0xFFFF, 0xFFFF - 128)
    with program(tmp_path / "balloon.sock") as device, eventfd() as error:
        with Frontend(device.connect()) as guest:
            guest.start()
            ring = guest.rings[REPORTING]
            status(guest, Request.SET_VRING_ERR, wire.U64(REPORTING), [error])
            for turn, ahead in enumerate(lies):
                still_serves(guest)
                fill(guest, FREE, PAGE)
                ring.write_descriptor(0, Descriptor(FREE, PAGE, WRITE, 0))
                ring.set_available_index((ring.next_available + ahead) & 0xFFFF)
                ring.notify()
                wait_broken(error.fileno())
                for _ in range(5):
                    ring.notify()
                    guest.read_config()
                assert is_filled(guest, FREE, PAGE)
                still_inflates(guest, FREE + 4 * PAGE)
                ring.set_available_index(ring.next_available)
                bases = guest.stop()
                assert bases[REPORTING] == ring.used_index == turn + 1
                guest.resume(bases=bases)
            still_serves(guest)
        said = device.end()[1]
    assert said.count("is broken and stops") == len(lies)


# 29. Where indices wrap


@pytest.mark.parametrize("size", [1, 2, 128])
def test_case_29_indices_that_wrap(size: int) -> None:
    """From 0xFFF0 on, in rings of one descriptor and more."""
    with start_device() as device, Frontend(device.connect(), ring_size=size) as guest:
        guest.start()
        begin_again(guest, 0xFFF0)
        for _ in range(40):
            still_serves(guest)
        assert guest.rings[REPORTING].used_index == 0xFFF0 + 40 & 0xFFFF
        assert guest.stop() == {0: 0xFFF0, 1: 0xFFF0, 2: 0xFFF0, 3: 0xFFF0, 4: 0xFFF0 + 40 & 0xFFFF}


def test_case_29_a_full_ring_over_the_wrap(guest: Frontend) -> None:
    begin_again(guest, 0xFFFF - 63)
    report_as_much_as_a_ring_holds(guest)


# 30. Heads


@pytest.mark.parametrize("head", [128, 129, 0x8000, 0xFFFF])
def test_case_30_a_head_outside_the_ring(guest: Frontend, head: int) -> None:
    ring = guest.rings[REPORTING]
    still_serves(guest)
    with eventfd() as error:
        status(guest, Request.SET_VRING_ERR, wire.U64(REPORTING), [error])
        ring.publish(head)
        ring.notify()
        wait_broken(error.fileno())
    still_inflates(guest)
    assert guest.stop()[REPORTING] == 1


def test_case_30_a_head_that_is_in_flight(guest: Frontend) -> None:
    """One that the device keeps, for statistics, is offered again: that ring stops."""
    # CVE-2026-45782: two chains with one head in flight, and the second one's end was the first one's use after free.
    ring = guest.rings[STATISTICS]
    guest.memory.write(LIST, STATISTIC.encode(Statistic(4, 1)))
    with eventfd() as error:
        status(guest, Request.SET_VRING_ERR, wire.U64(STATISTICS), [error])
        head = ring.offer([Buffer(LIST, 10)])
        ring.publish(head)
        ring.notify()
        wait_broken(error.fileno())
    assert ring.used_index == 0
    still_serves(guest)
    still_inflates(guest)
    assert guest.stop()[STATISTICS] == 0


def test_case_30_a_head_that_came_back_may_come_again(guest: Frontend) -> None:
    """Twice in the ring, but never in flight twice: a report is returned before the next is taken."""
    ring = guest.rings[REPORTING]
    ring.write_descriptor(0, Descriptor(FREE, PAGE, WRITE, 0))
    fill(guest, FREE, PAGE)
    for _ in range(3):
        ring.publish(0)
    ring.notify()
    while ring.used_index < 3:
        assert ring.wait_call(DEADLINE)
    assert is_empty(guest, FREE, PAGE)
    assert ring.take_used() == [(0, 0)] * 3
    still_serves(guest)


# 31 to 33, 36. Chains that cannot be followed


def page(number: int, flags: int = WRITE, following: int = 0, length: int = PAGE) -> Descriptor:
    """A descriptor that names one of the pages which none of these chains may release."""
    return Descriptor(FREE + number * PAGE, length, flags, following)


def refused(
    guest: Frontend, chains: dict[str, Sequence[Descriptor]], table: Sequence[Descriptor] = ()
) -> None:
    """Each is returned unused, and the next report is served."""
    guest.memory.write(TABLE, b"".join(map(DESCRIPTOR.encode, table)))
    for what, chain in chains.items():
        fill(guest, FREE, 8 * PAGE)
        assert publish(guest, chain) == 0, what
        assert is_filled(guest, FREE, 8 * PAGE), what
        still_serves(guest, FREE + 32 * PAGE)
    still_inflates(guest)


def test_case_31_chains_without_an_end(guest: Frontend) -> None:
    # CVE-2019-9547: a circular chain, followed for ever.
    # DPDK 6ec1778134: no bound on next and no end of the loop, once more in code that was new.
    more = NEXT | WRITE
    refused(
        guest,
        {
            "next is the size": [page(0, more, 128)],
            "next is 65535": [page(0, more, 0xFFFF)],
            "to itself": [page(0, more, 0)],
            "a circle of two": [page(0, more, 1), page(1, more, 0)],
            "a circle after some": [page(0, more, 1), page(1, more, 2), page(2, more, 1)],
            "a circle of all": [page(n % 8, more, (n + 1) % 128) for n in range(128)],
            "no bytes, to itself": [page(0, more, 0, length=0)],
        },
    )


def test_case_31_as_long_as_the_ring(guest: Frontend) -> None:
    """That is not too long: all of it is served."""
    fill(guest, FREE, 128 * PAGE)
    chain = [page(n, WRITE | (NEXT if n < 127 else 0), n + 1) for n in range(128)]
    assert publish(guest, chain) == 0
    assert is_empty(guest, FREE, 128 * PAGE)
    still_serves(guest)


class CountedReads:
    """Stands in for the layout of a descriptor: counts reads, and lets the guest do something after each."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.after_read: Callable[[], object] = bool

    def unpack_from(self, table: memoryview, at: int) -> tuple[int, ...]:
        self.places.append(at)
        read = DESCRIPTOR_STRUCT.unpack_from(table, at)
        self.after_read()
        return read


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> CountedReads:
    reads = CountedReads()
    monkeypatch.setattr(virtqueue, "DESCRIPTOR_STRUCT", reads)
    return reads


def test_case_31_no_more_steps_than_descriptors(local: InProcess, reads: CountedReads) -> None:
    publish(local, [page(0, NEXT | WRITE, 1), page(1, NEXT | WRITE, 0)])
    assert len(reads.places) == local.rings[REPORTING].size
    still_serves(local)


def test_case_32_indirect_without_the_feature() -> None:
    features = DEFAULT_FEATURES & ~Feature.RING_INDIRECT_DESC
    with start_device() as device, Frontend(device.connect(), features=features) as guest:
        guest.start()
        refused(guest, {"one": [Descriptor(TABLE, 16, INDIRECT, 0)]}, [page(0)])


def test_case_32_indirect_tables_that_cannot_be(guest: Frontend) -> None:
    lengths = (0, 1, 15, 17, 24, 16 * (MAX_INDIRECT + 1), 16 * 65537, 0xFFFFFFF0, 0xFFFFFFFF)
    chains = {f"{length} bytes": [Descriptor(TABLE, length, INDIRECT, 0)] for length in lengths}
    outside = (MEMORY, MEMORY - 16, 1 << 40, 2**64 - 32, 2**64 - 16, 2**64 - 1)
    chains |= {f"at {address:#x}": [Descriptor(address, 32, INDIRECT, 0)] for address in outside}
    refused(
        guest,
        {
            **chains,
            "with a successor": [Descriptor(TABLE, 16, INDIRECT | NEXT, 1), page(1)],
            "in the middle": [page(1, NEXT | WRITE, 1), Descriptor(TABLE, 16, INDIRECT | NEXT, 2), page(2)],
        },
        [page(0)],
    )


def test_case_32_what_an_indirect_table_says(guest: Frontend) -> None:
    one = [Descriptor(TABLE, 32, INDIRECT, 0)]
    nested = Descriptor(TABLE + 64, 16, INDIRECT, 0)
    tables: dict[str, list[Descriptor]] = {
        "a nested one": [nested, page(1)],
        "a nested one at the end": [page(0, NEXT | WRITE, 1), nested],
        "a loop": [page(0, NEXT | WRITE, 1), page(1, NEXT | WRITE, 0)],
        "next outside": [page(0, NEXT | WRITE, 2), page(1)],
        "next far outside": [page(0, NEXT | WRITE, 0xFFFF), page(1)],
        "readable after writable": [page(0, NEXT | WRITE, 1), page(1, 0)],
        "more than 2^32 bytes": [page(0, NEXT | WRITE, 1, length=0xFFFFFFFF), page(1, WRITE, length=2)],
    }
    for what, table in tables.items():
        refused(guest, {what: one}, [*table, page(2), page(3), page(4)])


def test_case_32_a_table_across_regions() -> None:
    """One after the other they are memory like any other, read in pieces; a hole in between is none."""
    # CVE-2018-1059: read through the first region's mapping, past its end.
    half = 8 * MIB
    low, high = MemoryRegion(0, half, USER_BASE, half), MemoryRegion(half, half, 1 << 46, 0)
    for gap in (0, PAGE):
        regions = [low, MemoryRegion(half + gap, half, high.user_address, 0)]
        with InProcess(GuestMemory(2 * half, regions)) as guest:
            guest.start()
            first, second = 2 * MIB, 3 * MIB
            fill(guest, first, PAGE)
            fill(guest, second, PAGE)
            table = [Descriptor(first, PAGE, NEXT | WRITE, 1), Descriptor(second, PAGE, WRITE, 0)]
            guest.memory.write(half - DESCRIPTOR_SIZE, DESCRIPTOR.encode(table[0]))
            guest.memory.write(half + gap, DESCRIPTOR.encode(table[1]))
            publish(guest, [Descriptor(half - DESCRIPTOR_SIZE, 32, INDIRECT, 0)])
            assert is_empty(guest, first, PAGE) == is_empty(guest, second, PAGE) == (gap == 0)
            still_serves(guest, 4 * MIB)


def test_case_33_readable_after_writable(guest: Frontend) -> None:
    refused(
        guest,
        {
            "at once": [page(0, NEXT | WRITE, 1), page(1, 0)],
            "at the end": [page(0, NEXT, 1), page(1, NEXT | WRITE, 2), page(2, 0)],
            "in between": [page(0, NEXT | WRITE, 1), page(1, NEXT, 2), page(2)],
            "no bytes": [page(0, NEXT | WRITE, 1), page(1, 0, length=0)],
        },
    )


def test_case_36_more_bytes_than_a_chain_may_have(guest: Frontend) -> None:
    """virtio 1.3, 2.7.4: at most 2^32. Exactly so many are allowed, and what is memory of them is released."""
    # CVE-2016-7422: a length that nobody bounded.
    # CVE-2020-14378: what was left of a length, below 0.
    whole = 0xFFFFFFFF
    refused(
        guest,
        {
            "2^32 + 1": [page(0, NEXT | WRITE, 1, whole), page(1, WRITE, length=2)],
            "128 times 4 GiB": [
                page(n % 8, WRITE | (NEXT if n < 127 else 0), n + 1, whole) for n in range(128)
            ],
            "readable ones count": [page(0, NEXT, 1, whole), page(1, NEXT, 2, whole), page(2)],
        },
    )
    fill(guest, FREE, 8 * PAGE)
    far = Descriptor(1 << 40, 0xFFFFFFFF - 2 * PAGE + 1, NEXT | WRITE, 1)
    assert publish(guest, [far, page(0, WRITE, length=2 * PAGE)]) == 0
    assert is_empty(guest, FREE, 2 * PAGE)
    assert is_filled(guest, FREE + 2 * PAGE, 6 * PAGE)


# 34. No bytes


def test_case_34_buffers_of_no_bytes(guest: Frontend) -> None:
    """Skipped, wherever they are; what is beside them counts."""
    # CVE-2016-6490: no bytes, and a loop that waits for some.
    # CVE-2020-10725: an address that is not checked where there are no bytes.
    for address in (0, FREE, FREE + 1, MEMORY, 1 << 40, 2**64 - 1):
        for flags in (WRITE, 0):
            assert publish(guest, [Descriptor(address, 0, flags, 0)]) == 0
        fill(guest, FREE, 2 * PAGE)
        chain = [Descriptor(address, 0, NEXT | WRITE, 1), page(0, NEXT | WRITE, 2)]
        assert publish(guest, [*chain, Descriptor(address, 0, WRITE, 0)]) == 0
        assert is_empty(guest, FREE, PAGE)
        assert is_filled(guest, FREE + PAGE, PAGE)
        fill(guest, FREE, PAGE)
        guest.memory.write(LIST, struct.pack("<I", FREE // PAGE))
        names = [Descriptor(address, 0, NEXT, 1), Descriptor(LIST, 4, NEXT, 2), Descriptor(address, 0, 0, 0)]
        assert publish(guest, names, INFLATE) == 0
        assert is_empty(guest, FREE, PAGE)
    still_serves(guest)


# 35. Buffers that are not all memory


def test_case_35_past_what_there_is(guest: Frontend) -> None:
    """What of it is memory is released, in whole pages; nothing wraps, and nothing is taken past the end."""
    # CVE-2019-18960: a check of the bounds of a descriptor that let some past them.
    # CVE-2023-41051: the same in what all accesses to guest memory go through.
    end = MEMORY
    fill(guest, end - 4 * PAGE, 4 * PAGE)
    nothing = [(end, MIB), (end, 0xFFFFFFFF), (1 << 40, MIB), (1 << 63, MIB), (2**64 - PAGE, PAGE)]
    nothing += [(2**64 - PAGE, 0xFFFFFFFF), (2**64 - 1, 1), (2**64 - 1, 0xFFFFFFFF), (end - 100, 0xFFFFF000)]
    for address, length in nothing:
        assert report(guest, offered(address, length)) == 0
        assert is_filled(guest, end - 4 * PAGE, 4 * PAGE), hex(address)
    assert report(guest, offered(end - 2 * PAGE - 1, 0xFFFFFFFF)) == 0
    assert is_filled(guest, end - 4 * PAGE, 2 * PAGE)
    assert is_empty(guest, end - 2 * PAGE, 2 * PAGE)
    still_serves(guest)


def test_case_35_into_a_hole_and_out_of_it() -> None:
    """The gap below 4 GiB, of which a front end sends no memory, and the file goes on where the region ends."""
    # Cloud Hypervisor 326cd8807: a range that begins in a region was punched past its end, in a file that goes on.
    low, high = MemoryRegion(0, 16 * MIB, USER_BASE, 0), MemoryRegion(1 << 32, 16 * MIB, 1 << 46, 24 * MIB)
    memory = GuestMemory(48 * MIB, [low, high])
    with start_device() as device, Frontend(device.connect(), memory=memory) as guest:
        guest.start()
        number = memory.fd.fileno()
        os.pwrite(number, b"\xaa" * MIB, 15 * MIB)
        os.pwrite(number, b"\xaa" * 8 * MIB, 16 * MIB)
        os.pwrite(number, b"\xaa" * 24 * MIB, 24 * MIB)
        assert report(guest, offered(15 * MIB, 8 * MIB)) == 0
        assert os.pread(number, MIB, 15 * MIB) == bytes(MIB)
        assert report(guest, offered((1 << 32) - MIB, 3 * MIB), offered((1 << 32) + 15 * MIB, 8 * MIB)) == 0
        assert os.pread(number, 2 * MIB, 24 * MIB) == bytes(2 * MIB)
        assert os.pread(number, MIB, 39 * MIB) == bytes(MIB)
        # Between the regions, and behind the last one, is not guest memory.
        assert os.pread(number, 8 * MIB, 16 * MIB) == b"\xaa" * 8 * MIB
        assert os.pread(number, 13 * MIB, 26 * MIB) == b"\xaa" * 13 * MIB
        assert os.pread(number, 8 * MIB, 40 * MIB) == b"\xaa" * 8 * MIB
        assert report(guest, offered(20 * MIB, 100 * MIB)) == 0
        still_serves(guest)


def test_case_35_two_files_side_by_side(guest: Frontend) -> None:
    """One range, adjacent for the guest: of either file its own part, at its own offset."""
    # CVE-2018-1059: memory that is contiguous for the guest is not for the host.
    size = 4 * MIB
    region = MemoryRegion(MEMORY, size, 1 << 46, MIB)
    with memfd(2 * size) as other:
        number = other.fileno()
        os.pwrite(number, b"\xbb" * 2 * size, 0)
        assert status(guest, Request.ADD_MEM_REG, wire.SingleRegion(0, region), [other]) == 0
        fill(guest, MEMORY - 2 * MIB, 2 * MIB)
        assert report(guest, offered(MEMORY - MIB, 2 * MIB)) == 0
        assert is_filled(guest, MEMORY - 2 * MIB, MIB)
        assert is_empty(guest, MEMORY - MIB, MIB)
        assert os.pread(number, MIB, 0) == b"\xbb" * MIB
        assert os.pread(number, MIB, MIB) == bytes(MIB)
        assert os.pread(number, 2 * size - 2 * MIB, 2 * MIB) == b"\xbb" * (2 * size - 2 * MIB)
        assert report(guest, offered(MEMORY + size - PAGE, 0xFFFFFFFF)) == 0
        assert os.pread(number, PAGE, MIB + size - PAGE) == bytes(PAGE)
        assert os.pread(number, size - MIB, MIB + size) == b"\xbb" * (size - MIB)
    still_serves(guest)


# 37. A guest that rewrites what the device reads


@pytest.mark.parametrize("indirect", [False, True])
def test_case_37_a_descriptor_is_read_once(local: InProcess, reads: CountedReads, indirect: bool) -> None:
    """What it said then is checked and used; after each read the guest writes something else over all of them."""
    # CVE-2020-14375: descriptors that were checked in guest memory, and used as they were there later.
    # CVE-2024-11614: fields that are fetched twice.
    other = DESCRIPTOR.encode(Descriptor(4 * MIB, MIB, WRITE, 0xFFFF))
    ring = local.rings[REPORTING]
    fill(local, 2 * MIB, MIB)
    fill(local, 4 * MIB, MIB)
    head = ring.add([offered(2 * MIB, PAGE)], indirect=indirect)

    def rewrite() -> None:
        local.memory.write(ring.descriptors, other * ring.size)
        # Not before it has been read at all.
        if len(reads.places) > 1:
            local.memory.write(ring._tables, other * 4)

    reads.after_read = rewrite
    assert finish(local, ring, head) == 0
    assert local.discarder.released == [(2 * MIB, PAGE)]
    assert is_filled(local, 4 * MIB, MIB)
    assert len(reads.places) == 1 + indirect
    reads.after_read = bool
    begin_again(local)
    still_serves(local)


def test_case_37_a_list_is_read_once(local: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page frame numbers are copied; whoever would look again would find others."""
    read = MemoryTable.read
    seen: list[int] = []

    def read_once(table: MemoryTable, address: int, length: int) -> bytes | None:
        data = read(table, address, length)
        if address == LIST:
            seen.append(length)
            local.memory.write(LIST, struct.pack("<I", 4 * MIB // PAGE))
        return data

    fill(local, 2 * MIB, PAGE)
    fill(local, 4 * MIB, PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryTable, "read", read_once)
        assert send_pfns(local, [2 * MIB // PAGE]) == 0
    assert seen == [4]
    assert local.discarder.released == [(2 * MIB, PAGE)]
    still_serves(local)


def test_case_37_a_guest_that_never_stops_rewriting(guest: Frontend) -> None:
    """Against the processes, a thousand times while they read: only what it has ever named is gone, and they serve on."""
    ring = guest.rings[REPORTING]
    named = [Descriptor(FREE + n * PAGE, PAGE, WRITE, 0) for n in range(16)]
    fill(guest, FREE - PAGE, 18 * PAGE)
    for turn in range(1000):
        ring.write_descriptor(0, named[turn % 16])
        ring.publish(0)
        ring.notify()
        while ring.used_index != ring.next_available:
            for each in named:
                ring.write_descriptor(0, each)
    assert is_filled(guest, FREE - PAGE, PAGE)
    assert is_filled(guest, FREE + 16 * PAGE, PAGE)
    ring.take_used()
    still_serves(guest)


# 38. A guest that gives its own rings away


@pytest.mark.parametrize("how", ["report", "inflate"])
def test_case_38_the_rings_own_memory(guest: Frontend, how: str) -> None:
    """It reads as zeroes afterwards: an index that goes backwards, so that ring stops as in case 28. The rest is served."""
    ring = guest.rings[REPORTING if how == "report" else INFLATE]
    other = guest.rings[INFLATE if how == "report" else REPORTING]
    still_serves(guest)
    still_inflates(guest)
    first = ring.descriptors // PAGE
    pages = range(first, (ring.used + 6 + 8 * ring.size) // PAGE + 1)
    with eventfd() as error:
        status(guest, Request.SET_VRING_ERR, wire.U64(ring.index), [error])
        if how == "report":
            ring.add([offered(first * PAGE, len(pages) * PAGE)])
        else:
            guest.memory.write(LIST, struct.pack(f"<{len(pages)}I", *pages))
            ring.add([Buffer(LIST, 4 * len(pages))])
        ring.notify()
        wait_broken(error.fileno())
    if how == "report":
        still_inflates(guest)
    else:
        still_serves(guest)
    assert other.used_index == 2
    begin_again(guest)
    still_serves(guest)
    still_inflates(guest)


def test_case_38_all_of_its_memory(guest: Frontend) -> None:
    """All rings, their tables, and the list that said so."""
    pages = MEMORY // PAGE
    fill(guest, FREE, MIB)
    at = 32 * MIB
    guest.memory.write(at, struct.pack(f"<{pages}I", *range(pages)))
    ring = guest.rings[INFLATE]
    with eventfd() as error:
        status(guest, Request.SET_VRING_ERR, wire.U64(INFLATE), [error])
        ring.offer([Buffer(at, 4 * pages)])
        wait_broken(error.fileno())
    # What is there again is what the device looks at since, an available and a used index of each ring.
    assert guest.memory.footprint() <= 10 * PAGE
    begin_again(guest)
    still_serves(guest)
    still_inflates(guest)


def test_case_38_the_list_inside_what_it_names(guest: Frontend) -> None:
    assert send_pfns(guest, [LIST // PAGE, FREE // PAGE]) == 0
    assert is_empty(guest, LIST, PAGE)
    still_inflates(guest)


def test_case_38_the_indirect_table_inside_what_it_names(guest: Frontend) -> None:
    ring = DriverRing(guest.memory, REPORTING, 128, guest.rings[REPORTING].descriptors)
    ring.close()
    tables = ring._tables // PAGE * PAGE
    assert report(guest, offered(tables + PAGE, 16 * PAGE), offered(FREE, PAGE), indirect=True) == 0
    assert is_empty(guest, FREE, PAGE)
    still_serves(guest)
