"""How much of each region the host holds, where regions have files of their own and where they share one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest

from hostdev import footprint
from hostdev.driver import USER_BASE
from hostdev.fds import Fd
from hostdev.memory import MemoryTable, Region
from hostdev.wire.vhost_user import MemoryRegion

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def memfd() -> Iterator[Fd]:
    with Fd(os.memfd_create("ram", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), 64 * MIB)
        yield fd


def regions(fd: Fd, bounds: Sequence[tuple[int, int]]) -> MemoryTable:
    return MemoryTable(
        Region(MemoryRegion(start, size, USER_BASE + start, start), Fd(os.dup(fd.fileno())))
        for start, size in bounds
    )


def touch(fd: Fd, *pages: int) -> None:
    for page in pages:
        os.pwrite(fd.fileno(), b"x", page * PAGE)


def run(table: MemoryTable) -> tuple[dict[int, int], int]:
    """Return the held bytes by the region's guest address, and the number of slices."""
    slices = 1
    walk = footprint.measure(table)
    while True:
        try:
            next(walk)
        except StopIteration as end:
            held = {region.guest_address: size for region, size in end.value.items()}
            for region in table.regions:
                region.close()
            return held, slices
        slices += 1


def test_one_region_holds_what_its_file_does(memfd: Fd) -> None:
    touch(memfd, 0, 7, 9000)
    assert run(regions(memfd, [(0, 64 * MIB)])) == ({0: 3 * PAGE}, 1)


def test_regions_of_one_file(memfd: Fd) -> None:
    """As on q35: below the VGA window, above it, and what lies between is in no region."""
    touch(memfd, 0, 2, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 5000, 16383)
    bounds = [(0, 0xA0000), (0xC0000, 32 * MIB - 0xC0000), (32 * MIB, 32 * MIB)]
    held, _slices = run(regions(memfd, bounds))
    assert held == {0: 3 * PAGE, 0xC0000: 3 * PAGE, 32 * MIB: PAGE}


def test_files_of_their_own(memfd: Fd) -> None:
    touch(memfd, 1)
    with Fd(os.memfd_create("other", os.MFD_CLOEXEC)) as other:
        os.ftruncate(other.fileno(), 64 * MIB)
        touch(other, 1, 2, 3)
        table = MemoryTable(
            Region(MemoryRegion(start, MIB, USER_BASE + start, 0), Fd(os.dup(fd.fileno())))
            for start, fd in ((0, memfd), (MIB, other))
        )
        assert run(table)[0] == {0: PAGE, MIB: 3 * PAGE}


def test_a_scattered_region_takes_many_slices(memfd: Fd) -> None:
    touch(memfd, *range(0, 4096, 2))
    held, slices = run(regions(memfd, [(0, 16 * MIB), (32 * MIB, 32 * MIB)]))
    assert held == {0: 2048 * PAGE, 32 * MIB: 0}
    # Once for the region, once more in what is not the largest one's.
    assert slices >= 2 * 2048 * 2 // footprint.SLICE_SEEKS


def test_many_regions_are_no_single_slice(memfd: Fd, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(memfd, *range(0, 16384, 2))
    seeks: list[int] = []
    seek = os.lseek

    def counted(fd: int, position: int, whence: int) -> int:
        seeks.append(position)
        return seek(fd, position, whence)

    monkeypatch.setattr(os, "lseek", counted)
    table = regions(memfd, [(number * 2 * MIB, 2 * MIB) for number in range(32)])
    for _ in footprint.measure(table):
        assert len(seeks) <= footprint.SLICE_SEEKS
        seeks.clear()
    for region in table.regions:
        region.close()


def test_no_region() -> None:
    assert run(MemoryTable()) == ({}, 1)


def test_huge_pages_that_regions_share_are_left_out(huge_pages: int) -> None:
    """hugetlbfs calls all of a file data."""
    assert huge_pages >= 4
    with Fd(os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)) as fd:
        os.ftruncate(fd.fileno(), 8 * MIB)
        assert run(regions(fd, [(0, 0xA0000), (0xC0000, 8 * MIB - 0xC0000)]))[0] == {}
        one = regions(fd, [(0, 8 * MIB)])
        one.regions[0].view(3 * MIB, 1)[0] = 1
        assert run(one)[0] == {0: 2 * MIB}
