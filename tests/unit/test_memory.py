"""The memory table: descriptions that are refused, and ranges that cross the edges of regions."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from hostdev.driver import USER_BASE, GuestMemory
from hostdev.errors import RequestError
from hostdev.fds import Fd
from hostdev.memory import MAX_REGIONS, MemoryTable, Part, Region, doubled
from hostdev.wire.vhost_user import MemoryRegion

PAGE = 4096


def memfd(size: int) -> Fd:
    fd = Fd(os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), size)
    return fd


def region(guest: int, size: int, user: int | None = None, offset: int = 0, fd: Fd | None = None) -> Region:
    description = MemoryRegion(guest, size, USER_BASE + guest if user is None else user, offset)
    return Region(description, fd or memfd(offset + size))


@pytest.fixture
def table() -> Iterator[MemoryTable]:
    """[0, 4) pages from page 8 of one file; [4, 6) from another; a hole of 2; [8, 9) from page 1 of the first."""
    low, high = memfd(12 * PAGE), memfd(2 * PAGE)
    os.pwrite(low.fileno(), b"".join(bytes([page]) * PAGE for page in range(12)), 0)
    os.pwrite(high.fileno(), b"\xa0" * PAGE + b"\xa1" * PAGE, 0)
    again = Fd(os.dup(low.fileno()))
    regions = [
        region(8 * PAGE, PAGE, offset=PAGE, fd=again),
        region(0, 4 * PAGE, offset=8 * PAGE, fd=low),
        region(4 * PAGE, 2 * PAGE, fd=high),
    ]
    yield MemoryTable(regions)
    for each in regions:
        each.close()


def _parts(table: MemoryTable, address: int, length: int) -> list[tuple[int, int, int]]:
    return [(part.region.guest_address, part.offset, part.length) for part in table.split(address, length)]


def test_regions_are_in_the_order_of_guest_addresses(table: MemoryTable) -> None:
    assert [each.guest_address for each in table.regions] == [0, 4 * PAGE, 8 * PAGE]


def test_a_range_over_two_regions(table: MemoryTable) -> None:
    assert _parts(table, 3 * PAGE + 5, PAGE) == [(0, 3 * PAGE + 5, PAGE - 5), (4 * PAGE, 0, 5)]


def test_a_range_over_everything_leaves_the_hole_out(table: MemoryTable) -> None:
    everything = [(0, 0, 4 * PAGE), (4 * PAGE, 0, 2 * PAGE), (8 * PAGE, 0, PAGE)]
    assert _parts(table, 0, 1 << 63) == everything
    assert _parts(table, 0, 9 * PAGE) == everything


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (6 * PAGE, 2 * PAGE),
        (6 * PAGE, 1),
        (9 * PAGE, 1),
        (1 << 63, 1 << 32),
        ((1 << 64) - 1, 1 << 32),
        (0, 0),
        (PAGE, 0),
    ],
)
def test_ranges_that_are_nowhere(table: MemoryTable, address: int, length: int) -> None:
    assert _parts(table, address, length) == []


def test_ranges_that_touch_an_edge(table: MemoryTable) -> None:
    assert _parts(table, 6 * PAGE - 1, 2) == [(4 * PAGE, 2 * PAGE - 1, 1)]
    assert _parts(table, 8 * PAGE - 1, 2) == [(8 * PAGE, 0, 1)]
    assert _parts(table, 9 * PAGE - 1, 1 << 40) == [(8 * PAGE, PAGE - 1, 1)]


def test_reading_takes_the_file_offset_into_account(table: MemoryTable) -> None:
    assert table.read(0, 1) == b"\x08"
    assert table.read(4 * PAGE - 2, 4) == b"\x0b\x0b\xa0\xa0"
    assert table.read(8 * PAGE, PAGE) == b"\x01" * PAGE


def test_reading_is_all_or_nothing(table: MemoryTable) -> None:
    assert table.read(6 * PAGE - 1, 2) is None
    assert table.read(5 * PAGE, 4 * PAGE) is None
    assert table.read((1 << 64) - 1, 1) is None
    assert table.read(1 << 50, 0) == b""


def test_reading_makes_nothing_resident() -> None:
    memory = GuestMemory(1 << 20)
    table = MemoryTable([Region(memory.regions[0], Fd(os.dup(memory.fd.fileno())))])
    assert table.read(0, 1 << 20) == bytes(1 << 20)
    assert memory.footprint() == 0
    table.regions[0].close()
    memory.close()


def test_reading_a_file_that_became_shorter() -> None:
    with memfd(2 * PAGE) as fd:
        table = MemoryTable([region(0, 2 * PAGE, fd=Fd(os.dup(fd.fileno())))])
        os.ftruncate(fd.fileno(), PAGE)
        assert table.read(PAGE - 1, 2) is None
        table.regions[0].close()


def test_reading_a_page_that_cannot_be_read(table: MemoryTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> bytes:
        raise OSError(errno.EIO, "hardware error")

    monkeypatch.setattr(os, "pread", fail)
    assert table.read(0, 1) is None


def test_views_are_by_the_front_ends_address_and_inside_one_region(table: MemoryTable) -> None:
    with table.view(USER_BASE + PAGE, 2) as view:
        assert bytes(view) == b"\x09\x09"
        view[0] = 0xFF
        assert table.read(PAGE, 2) == b"\xff\x09"
    for address, length in ((4 * PAGE - 1, 2), (6 * PAGE, 1), (-PAGE, 1), (9 * PAGE - 1, 2)):
        with pytest.raises(RequestError, match="no memory region"):
            table.view(USER_BASE + address, length)


def test_find_is_exact(table: MemoryTable) -> None:
    found = MemoryRegion(4 * PAGE, 2 * PAGE, USER_BASE + 4 * PAGE, 0)
    assert table.find(found) is table.regions[1]
    for wrong in (
        MemoryRegion(4 * PAGE, PAGE, USER_BASE + 4 * PAGE, 0),
        MemoryRegion(5 * PAGE, 2 * PAGE, USER_BASE + 4 * PAGE, 0),
        MemoryRegion(4 * PAGE, 2 * PAGE, USER_BASE, 0),
    ):
        assert table.find(wrong) is None


# Tables that are refused


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 2 * PAGE, 0x10000), (PAGE, PAGE, 0x20000)),
        ((0, 2 * PAGE, 0x10000), (0, 2 * PAGE, 0x20000)),
        ((PAGE, PAGE, 0x10000), (0, 8 * PAGE, 0x20000)),
        ((0, 2 * PAGE, 0x10000), (0x100000, PAGE, 0x10000 + PAGE)),
        ((0, 2 * PAGE, 0x10000), (0x100000, PAGE, 0x10000)),
    ],
)
def test_overlaps(first: tuple[int, int, int], second: tuple[int, int, int]) -> None:
    regions = [region(*first), region(*second)]
    with pytest.raises(RequestError, match="overlap"):
        MemoryTable(regions)
    for each in regions:
        each.close()


def test_neighbours_do_not_overlap() -> None:
    regions = [region(0, PAGE, 0x10000), region(PAGE, PAGE, 0x10000 + PAGE)]
    assert len(MemoryTable(regions).regions) == 2
    for each in regions:
        each.close()


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 2), (2, 2)], set()),
        ([(0, 2), (1, 2)], {0, 1}),
        ([(0, 4), (1, 1), (3, 1), (4, 1)], {0, 1, 2}),
        ([(0, 4), (1, 1), (2, 4), (6, 1), (5, 1)], {0, 1, 2, 4}),
        ([(3, 1), (3, 1)], {0, 1}),
    ],
)
def test_regions_that_share_bytes_of_a_file(spans: list[tuple[int, int]], expected: set[int]) -> None:
    """Offsets and lengths in pages; guest addresses do not overlap. The same offsets of another file are other bytes."""
    with memfd(16 * PAGE) as file:
        twice = [
            region(16 * PAGE * number, length * PAGE, offset=offset * PAGE, fd=Fd(os.dup(file.fileno())))
            for number, (offset, length) in enumerate(spans)
        ]
    elsewhere = region(1 << 30, 8 * PAGE)
    found = doubled([*twice, elsewhere])
    assert {number for number, each in enumerate(twice) if each in found} == expected
    assert elsewhere not in found
    for each in (*twice, elsewhere):
        each.close()


def test_peeking_is_by_the_front_ends_address_and_inside_one_region(table: MemoryTable) -> None:
    assert table.peek(USER_BASE + 3 * PAGE + 4, 2) == b"\x0b\x0b"
    assert table.peek(USER_BASE + 4 * PAGE - 1, 2) is None
    assert table.peek(USER_BASE + 6 * PAGE, 1) is None


def test_too_many_regions() -> None:
    regions = [region(2 * n * PAGE, PAGE) for n in range(MAX_REGIONS + 1)]
    assert len(MemoryTable(regions[:-1]).regions) == MAX_REGIONS
    with pytest.raises(RequestError, match="more than"):
        MemoryTable(regions)
    for each in regions:
        each.close()


@pytest.mark.parametrize(
    "description",
    [
        MemoryRegion(0, 0, 0, 0),
        MemoryRegion(0, 3 * PAGE, 0, 0),
        MemoryRegion(0, 2 * PAGE, 0, PAGE),
        MemoryRegion(0, PAGE, 0, 2 * PAGE),
        MemoryRegion(0, PAGE, 0, 1),
        MemoryRegion(1, PAGE, 0, 0),
        MemoryRegion(0, PAGE, 1, 0),
        MemoryRegion((1 << 64) - PAGE, 2 * PAGE, 0, 0),
        MemoryRegion(0, 2 * PAGE, (1 << 64) - PAGE, 0),
        MemoryRegion(0, 2 * PAGE, 0, (1 << 64) - PAGE),
        MemoryRegion(0, (1 << 64) - 1, 0, 0),
        MemoryRegion((1 << 64) - 1, (1 << 64) - 1, (1 << 64) - 1, (1 << 64) - 1),
    ],
    ids=str,
)
def test_descriptions_that_do_not_fit(description: MemoryRegion) -> None:
    with memfd(2 * PAGE) as fd:
        with pytest.raises(RequestError):
            Region(description, fd)
        assert not fd.closed


@pytest.mark.parametrize(("offset", "size"), [(0, 3), (1, 2), (2, 1), (1 << 20, 1)])
def test_what_is_behind_the_files_end_is_said(offset: int, size: int) -> None:
    """In pages. mmap would refuse it too, in words that help nobody."""
    with memfd(2 * PAGE) as fd, pytest.raises(RequestError, match="memory backend and of -m must agree"):
        Region(MemoryRegion(0, size * PAGE, 0, offset * PAGE), fd)


@pytest.mark.parametrize("offset", [1 << 63, (1 << 63) - PAGE, (1 << 64) - 2 * PAGE])
def test_what_no_file_can_hold_is_refused_unmapped_as_well(offset: int) -> None:
    """Where its file is not looked at; a read there would not be an OSError."""
    with memfd(2 * PAGE) as fd, pytest.raises(RequestError, match="than a file can be long"):
        Region(MemoryRegion(0, PAGE, 0, offset), fd, mapped=False)


def test_the_last_page_of_the_address_space() -> None:
    each = region((1 << 64) - PAGE, PAGE, (1 << 64) - PAGE)
    assert (each.guest_end, each.user_end) == (1 << 64, 1 << 64)
    assert _parts(MemoryTable([each]), (1 << 64) - 2, 1 << 32) == [(each.guest_address, PAGE - 2, 2)]
    each.close()


def _pipe() -> Fd:
    reading, writing = os.pipe()
    os.close(writing)
    return Fd(reading)


def _socket() -> Fd:
    ours, theirs = socket.socketpair()
    theirs.close()
    return Fd(ours.detach())


def _read_only() -> Fd:
    with memfd(PAGE) as fd:
        return Fd(os.open(f"/proc/self/fd/{fd.fileno()}", os.O_RDONLY | os.O_CLOEXEC))


def _sealed(seals: int) -> Callable[[], Fd]:
    def make() -> Fd:
        fd = memfd(PAGE)
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
        return fd

    return make


NO_MEMORY: dict[str, Callable[[], Fd]] = {
    "pipe": _pipe,
    "socket": _socket,
    "eventfd": lambda: Fd(os.eventfd(0)),
    "directory": lambda: Fd(os.open("/", os.O_RDONLY)),
    "/dev/zero": lambda: Fd(os.open("/dev/zero", os.O_RDWR)),
    "/dev/null": lambda: Fd(os.open("/dev/null", os.O_RDWR)),
    "read-only": _read_only,
    "write-sealed": _sealed(0x8),
    "future-write-sealed": _sealed(0x10),
}


@pytest.mark.parametrize("make", NO_MEMORY.values(), ids=NO_MEMORY.keys())
def test_descriptors_that_are_no_guest_memory(make: Callable[[], Fd]) -> None:
    with make() as fd, pytest.raises(RequestError):
        Region(MemoryRegion(0, PAGE, 0, 0), fd)


def test_an_impossible_length_of_a_sparse_file() -> None:
    with memfd(1 << 60) as fd, pytest.raises(RequestError, match="cannot be mapped"):
        Region(MemoryRegion(0, 1 << 60, 0, 0), fd)


# Pages


def test_pages_are_base_pages_where_st_blksize_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """tmpfs with huge=always, or shmem_enabled=always, has st_blksize 2 MiB and gives single pages back all the same."""
    monkeypatch.setattr(
        os, "fstat", lambda _fd: SimpleNamespace(st_blksize=2 << 20, st_size=PAGE, st_dev=0, st_ino=0)
    )
    each = region(0, PAGE)
    assert each.page_size == PAGE
    each.close()


def test_closing_closes_mapping_and_descriptor() -> None:
    each = region(0, PAGE)
    each.close()
    assert each.mapping.closed
    assert each.fd.closed


def test_a_part_is_a_plain_tuple(table: MemoryTable) -> None:
    assert next(table.split(1, 2)) == Part(table.regions[0], 1, 2)


def test_a_file_that_has_no_seals_may_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_seals(*_arguments: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    each = region(0, PAGE)
    monkeypatch.setattr(fcntl, "fcntl", no_seals)
    assert each.may_shrink
    each.close()


def test_the_footprint_counts_each_file_once() -> None:
    with memfd(4 * PAGE) as file:
        os.pwrite(file.fileno(), bytes(3 * PAGE), 0)
        table = MemoryTable(
            [
                region(0, PAGE, fd=Fd(os.dup(file.fileno()))),
                region(8 * PAGE, PAGE, offset=2 * PAGE, fd=Fd(os.dup(file.fileno()))),
            ]
        )
    assert table.footprint() == 3 * PAGE
    for each in table.regions:
        each.close()


@pytest.mark.parametrize("offset", [1 << 63, (1 << 63) - PAGE, (1 << 64) - 2 * PAGE])
def test_offsets_that_no_file_has(offset: int) -> None:
    """Also where the file is not asked: one that is not mapped is read by pread, which takes no such offset."""
    with memfd(PAGE) as fd, pytest.raises(RequestError, match="than a file can be long"):
        Region(MemoryRegion(0, PAGE, 0, offset), fd, mapped=False)
