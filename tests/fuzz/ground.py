"""Guest memory for the targets about rings, made once a process: four regions in two files, with holes between them.

What it says of an address is worked out here anew, and not asked of hostdev.memory, which is what is being tested.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Iterable
from itertools import accumulate

from hostdev.driver import USER_BASE
from hostdev.fds import Fd
from hostdev.memory import Region
from hostdev.wire.vhost_user import MemoryRegion

PAGE = 4096
_KIB = 1 << 10
# Guest address, size, file, offset in it: one with more pages than a slice of work may have calls, two that touch but are of two files, and one above 4 GiB, which no 32-bit page
# frame number of a small guest names by chance.
_LAYOUT = (
    (0, 512 * _KIB, 0, 0),
    (1024 * _KIB, 4096 * _KIB, 0, 1024 * _KIB),
    (5120 * _KIB, 256 * _KIB, 1, 64 * _KIB),
    (4 << 30, 64 * _KIB, 0, 5376 * _KIB),
)
_FILE_BYTES = 6 << 20

# The rings lie in the first region, a part of each on a page of its own; behind them is room for what they name.
RING_SIZE = 16
RING_STRIDE = 3 * PAGE
DATA = 0x10000
DATA_END = 512 * _KIB


class Ground:
    """The regions, mapped."""

    def __init__(self) -> None:
        files = [os.memfd_create("fuzz-ram", os.MFD_CLOEXEC) for _ in range(2)]
        for file in files:
            os.ftruncate(file, _FILE_BYTES)
        self.regions = tuple(
            Region(MemoryRegion(address, size, USER_BASE + address, offset), Fd(os.dup(files[file])))
            for address, size, file, offset in _LAYOUT
        )
        for file in files:
            os.close(file)

    def clear(self) -> None:
        """Have all of it read as zeroes again."""
        for region in self.regions:
            region.advise(mmap.MADV_REMOVE, 0, region.size)

    def write(self, address: int, data: bytes) -> None:
        """Write what of this lies in the region that holds the address."""
        for region in self.regions:
            if region.guest_address <= address < region.guest_end:
                piece = data[: region.guest_end - address]
                os.pwrite(region.fd.fileno(), piece, region.file_offset + address - region.guest_address)

    def read(self, regions: Iterable[Region], address: int, length: int) -> bytes | None:
        """Read from these regions; None unless all of it is in them."""
        data = bytearray()
        while length > len(data):
            at = address + len(data)
            for region in regions:
                if region.guest_address <= at < region.guest_end:
                    size = min(length - len(data), region.guest_end - at)
                    offset = region.file_offset + at - region.guest_address
                    data += os.pread(region.fd.fileno(), size, offset)
                    break
            else:
                return None
        return bytes(data)


@functools.cache
def ground() -> Ground:
    """Return the one there is."""
    return Ground()


def whole_pages(regions: Iterable[Region], ranges: Iterable[tuple[int, int]]) -> set[int]:
    """Return the guest pages in these regions of which every byte is in one of the ranges (start, end), by number.

    Counted by how many ranges begin and end up to each place, so that it shares no step with hostdev.pages.
    """
    edges: dict[int, int] = {}
    for start, end in ranges:
        if start < end:
            edges[start] = edges.get(start, 0) + 1
            edges[end] = edges.get(end, 0) - 1
    places = sorted(edges)
    depths = list(accumulate(edges[place] for place in places))
    pages: set[int] = set()
    opened = 0
    for number, (place, depth) in enumerate(zip(places, depths, strict=True)):
        if depth and not (number and depths[number - 1]):
            opened = place
        elif not depth:
            for region in regions:
                first, last = max(opened, region.guest_address), min(place, region.guest_end)
                pages.update(range(-(-first // PAGE), last // PAGE))
    return pages
