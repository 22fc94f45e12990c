"""One step does no more than its named constants allow, whatever the guest asks for: counted, not timed."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

import pytest

from hostdev.balloon import SLICE_CALLS
from hostdev.chains import MAX_PFN_BYTES, MAX_STATISTICS
from hostdev.driver import USER_BASE, Buffer, GuestMemory
from hostdev.errors import HostError
from hostdev.giver import MAX_HOST_ERRORS, SLICE_BYTES, whole_pages
from hostdev.memory import MAX_REGIONS, Part
from hostdev.virtqueue import MAX_DIRECT, MAX_INDIRECT
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import STATISTIC_STRUCT, Role
from hostdev.wire.virtqueue import (
    DESCRIPTOR,
    DESCRIPTOR_INDIRECT,
    DESCRIPTOR_NEXT,
    DESCRIPTOR_WRITE,
    Descriptor,
)
from tests.in_process import MIB, PAGE, InProcess
from tests.metered import MOST, Meter, Work

GIB = 1 << 30
LIST, TABLE, FREE = 0x400000, 0x600000, 0x1000000
HOLE = 1 << 40
PFN_COUNT = MAX_PFN_BYTES // 4
SCATTERED = [2 * n for n in range(PFN_COUNT)]


@pytest.fixture
def meter() -> Iterator[Meter]:
    """A guest of 8 GiB, of which nothing is resident."""
    with InProcess(GuestMemory(8 * GIB)) as guest:
        guest.start()
        yield Meter(guest)


def crowded() -> GuestMemory:
    """As many regions as there may be, all but the first of a single page, each behind the other."""
    regions = [wire.MemoryRegion(0, 32 * MIB, USER_BASE, 0)]
    regions += [
        wire.MemoryRegion(32 * MIB + n * PAGE, PAGE, USER_BASE + GIB + 2 * n * PAGE, 32 * MIB + n * PAGE)
        for n in range(MAX_REGIONS - 1)
    ]
    return GuestMemory(64 * MIB, regions)


def offer_table(guest: InProcess, role: Role, entries: list[tuple[int, int]], heads: int = 1) -> None:
    """Offer one indirect table of writable entries, again and again."""
    last = len(entries) - 1
    table = (
        Descriptor(
            address, length, DESCRIPTOR_WRITE | (DESCRIPTOR_NEXT if n < last else 0), n + 1 if n < last else 0
        )
        for n, (address, length) in enumerate(entries)
    )
    data = b"".join(map(DESCRIPTOR.encode, table))
    guest.memory.write(TABLE, data)
    for head in range(heads):
        guest.rings[role].write_descriptor(head, Descriptor(TABLE, len(data), DESCRIPTOR_INDIRECT, 0))
        guest.rings[role].publish(head)


def offer_pfns(guest: InProcess, pfns: list[int]) -> None:
    guest.memory.write(LIST, struct.pack(f"<{len(pfns)}I", *pfns))
    guest.rings[Role.INFLATE].add([Buffer(LIST, 4 * len(pfns))])


def report(meter: Meter, entries: list[tuple[int, int]]) -> None:
    offer_table(meter.guest, Role.REPORTING, entries)
    meter.run(Role.REPORTING)
    assert meter.guest.rings[Role.REPORTING].take_used() == [(0, 0)]


def inflate(meter: Meter, pfns: list[int]) -> None:
    offer_pfns(meter.guest, pfns)
    meter.run(Role.INFLATE)
    assert len(meter.guest.rings[Role.INFLATE].take_used()) == 1


# Reports


def test_one_descriptor_of_4_gib(meter: Meter) -> None:
    report(meter, [(FREE + 1, (4 * GIB) - 1)])
    assert meter.total.bytes == 4 * GIB - PAGE
    assert meter.steps >= 4 * GIB // (2 * SLICE_BYTES)


def test_a_table_of_entries_of_4_gib_is_refused_whole(meter: Meter) -> None:
    report(meter, [(FREE, 4 * GIB - 1)] * MAX_INDIRECT)
    assert (meter.total.bytes, meter.total.descriptors) == (0, MAX_INDIRECT + 1)
    assert meter.guest.metrics.value("guest_errors_total", "too-long") == 1


def test_a_table_of_entries_that_make_4_gib(meter: Meter) -> None:
    report(meter, [(FREE + n * (4 * MIB + PAGE), 4 * MIB) for n in range(MAX_INDIRECT - 1)])
    assert meter.total.bytes == (MAX_INDIRECT - 1) * 4 * MIB


@pytest.mark.parametrize(
    "entry", [(FREE + 1, PAGE), (FREE, PAGE - 1), (FREE, 1), (HOLE, PAGE), (2**64 - 16 * MIB, PAGE)]
)
def test_entries_without_a_whole_page(meter: Meter, entry: tuple[int, int]) -> None:
    """None of them is given back, and still they are looked up a slice at a time."""
    start, length = entry
    report(meter, [(start + 2 * n * PAGE, length) for n in range(MAX_INDIRECT)])
    assert meter.total.pieces == 0
    assert meter.steps > MAX_INDIRECT // SLICE_CALLS


def test_entries_that_name_every_region_again_and_again() -> None:
    with InProcess(crowded()) as guest:
        guest.start()
        meter = Meter(guest)
        report(meter, [(32 * MIB, (MAX_REGIONS - 1) * PAGE)] * MAX_INDIRECT)
        assert meter.total.pieces == MAX_REGIONS - 1


def test_hints_that_name_every_region_again_and_again() -> None:
    with InProcess(crowded()) as guest:
        guest.start()
        meter = Meter(guest)
        offer_table(
            guest, Role.FREE_PAGE_HINT, [(0, 4 * MIB - PAGE), (32 * MIB, 31 * PAGE)] * (MAX_INDIRECT // 2)
        )
        meter.run(Role.FREE_PAGE_HINT)
        assert guest.rings[Role.FREE_PAGE_HINT].take_used() == [(0, 0)]
        assert meter.total.pieces == 0


def test_a_ring_of_the_largest_size() -> None:
    """A chain of as many descriptors as QEMU's rings can have is taken, one of more is refused before all of it is read."""
    with InProcess(GuestMemory(64 * MIB), ring_size=4 * MAX_DIRECT) as guest:
        guest.start()
        meter = Meter(guest)
        for count in (MAX_DIRECT, MAX_DIRECT + 1):
            guest.rings[Role.REPORTING].add(
                [Buffer(FREE + n * PAGE, PAGE, writable=True) for n in range(count)]
            )
        meter.run(Role.REPORTING)
        assert len(guest.rings[Role.REPORTING].take_used()) == 2
        assert meter.total.bytes == MAX_DIRECT * PAGE
        assert guest.metrics.value("guest_errors_total", "loop") == 1


# Inflation, statistics


@pytest.mark.parametrize(
    "first", [FREE // PAGE, HOLE >> 12, 2**32 - 2 * PFN_COUNT], ids=["memory", "hole", "end"]
)
def test_a_list_of_scattered_frames(meter: Meter, first: int) -> None:
    pfns = [first + number & 0xFFFFFFFF for number in SCATTERED]
    random.Random(1).shuffle(pfns)
    inflate(meter, pfns)
    assert meter.steps >= PFN_COUNT // SLICE_CALLS


def test_frames_smaller_than_the_hosts_pages(meter: Meter) -> None:
    """On huge pages no frame is a whole page."""
    for region in meter.guest.session.memory.regions:
        region.page_size = 2 * MIB
    inflate(meter, [FREE // PAGE + number for number in SCATTERED])
    assert meter.total.pieces == 0
    assert meter.steps >= PFN_COUNT // SLICE_CALLS


def test_a_list_longer_than_its_bound(meter: Meter) -> None:
    meter.guest.rings[Role.INFLATE].add([Buffer(FREE, 2 * GIB), Buffer(FREE, 2 * GIB)])
    meter.run(Role.INFLATE)
    assert meter.total.read_bytes == MAX_PFN_BYTES


def test_a_list_of_single_bytes() -> None:
    with InProcess(GuestMemory(64 * MIB), ring_size=MAX_DIRECT) as guest:
        guest.start()
        meter = Meter(guest)
        guest.memory.write(LIST, bytes(PAGE))
        guest.rings[Role.INFLATE].add([Buffer(LIST + n, 1) for n in range(MAX_DIRECT)])
        meter.run(Role.INFLATE)
        assert meter.worst.reads == MAX_DIRECT
        assert len(guest.rings[Role.INFLATE].take_used()) == 1


def test_statistics_without_end(meter: Meter) -> None:
    meter.guest.rings[Role.STATISTICS].add([Buffer(FREE, 2 * GIB)])
    meter.run(Role.STATISTICS)
    assert meter.total.read_bytes == MAX_STATISTICS * STATISTIC_STRUCT.size


# What is kept takes as many steps as what is given back


def _none(_meter: Meter) -> None:
    """--discard none: see keep()."""


def _inert(meter: Meter) -> None:
    meter.guest.balloon.make_inert("a test")


def _inhibited(meter: Meter) -> None:
    meter.guest.balloon.giver.inhibit(inhibited=True)


def _poisoned(meter: Meter) -> None:
    meter.guest.balloon.giver.poisoned = True


@pytest.mark.parametrize("keep", [_none, _inert, _inhibited, _poisoned])
def test_what_is_kept(keep: Callable[[Meter], None]) -> None:
    with InProcess(GuestMemory(8 * GIB), discard="none" if keep is _none else "auto") as guest:
        guest.start()
        meter = Meter(guest)
        keep(meter)
        report(meter, [(FREE, 4 * GIB - PAGE)])
        assert (guest.discarder.released, meter.total.bytes) == ([], 4 * GIB - PAGE)
        assert guest.metrics.value("withheld_bytes_total") == 4 * GIB - PAGE


def test_what_the_host_refuses(meter: Meter) -> None:
    """Refusals count as work, too, and after some the device stops asking."""
    meter.guest.discarder.error = HostError("no")
    report(meter, [(FREE + 2 * n * PAGE, PAGE) for n in range(MAX_INDIRECT)])
    assert meter.guest.metrics.value("host_errors_total") == MAX_HOST_ERRORS
    assert meter.steps == MAX_INDIRECT // SLICE_CALLS + 1  # the last one finds the ring empty


# Floods


def flood(meter: Meter, chains: int) -> None:
    """A driver that refills its ring whenever there is room; each step gives one chain back."""
    ring = meter.guest.rings[Role.REPORTING]
    returned = offered = 0
    while returned < chains:
        while len(ring._free) and offered < chains:
            ring.add([Buffer(FREE + offered % 1024 * PAGE, PAGE, writable=True)])
            offered += 1
        before = ring.used_index
        assert meter.guest.step(Role.REPORTING).returned
        assert ring.used_index - before & 0xFFFF == 1
        returned += len(ring.take_used())


def test_a_flood_of_chains(meter: Meter) -> None:
    flood(meter, 10_000)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_flood_of_a_million_chains(meter: Meter) -> None:
    flood(meter, 1_000_000)


def test_the_bounds_are_reached(meter: Meter) -> None:
    """Or they would bound nothing. One read of a table, and of each piece and the next, a look for it and its region."""
    offer_table(
        meter.guest, Role.REPORTING, [(FREE + 2 * n * PAGE, PAGE) for n in range(MAX_INDIRECT)], heads=3
    )
    meter.run(Role.REPORTING)
    assert meter.worst == Work(
        descriptors=MAX_INDIRECT + 1,
        reads=1,
        read_bytes=16 * MAX_INDIRECT,
        looked_up=2 + 2 * (SLICE_CALLS + 1),
        pieces=SLICE_CALLS,
        bytes=SLICE_CALLS * PAGE,
    )
    assert meter.worst.pieces == MOST.pieces


# Pieces of whole pages, whatever their size


@pytest.mark.parametrize("offset", [0, 640 << 10])
@pytest.mark.parametrize("page_size", [PAGE, 2 * MIB, 32 * MIB, GIB])
def test_no_piece_is_a_part_of_a_page(meter: Meter, page_size: int, offset: int) -> None:
    """Of the file: a region need not begin with a page."""
    (region,) = meter.guest.session.memory.regions
    region.page_size, region.file_offset = page_size, offset
    pieces = whole_pages(Part(region, PAGE, 4 * GIB))
    places = [piece.offset + offset for piece in pieces]
    assert 0 <= places[0] - offset - PAGE < page_size
    assert 0 <= 4 * GIB + PAGE - (pieces[-1].offset + pieces[-1].length) < page_size
    assert not any((place | piece.length) % page_size for place, piece in zip(places, pieces, strict=True))
    assert {piece.length for piece in pieces[1:-1]} == {max(SLICE_BYTES, page_size)}
