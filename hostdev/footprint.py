"""How much of each region the host holds, worked out in bounded slices.

st_blocks is of a whole file, and regions share files: on q35 a guest's RAM is one file in two regions, or in three above
the PCI hole. So the smaller regions are walked with SEEK_DATA, and the largest gets what is left of st_blocks. Of huge
pages that cannot be done: regions that share such a file are left out. What is in swap counts, as in st_blocks. The guest goes on living meanwhile: figures are of no single moment. Used by commands.py.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Generator

from hostdev.fds import Fd
from hostdev.memory import BLOCK_BYTES, MemoryTable, Region

# Steps from hole to data and back in one slice: 1 us each, and 7 us more for each MiB of data that a step passes over.
SLICE_SEEKS = 1024

Slices = Generator[None, None, dict[Region, int]]


def measure(table: MemoryTable) -> Slices:
    """Work out the bytes that each region holds, where that can be told; a slice of work ends at each yield. Raises OSError."""
    held: dict[Region, int] = {}
    for file in {region.file for region in table.regions}:
        regions = [region for region in table.regions if region.file == file]
        if len(regions) > 1 and regions[0].page_size > mmap.PAGESIZE:
            continue  # hugetlbfs calls all of a file data
        largest = max(regions, key=lambda region: region.size)
        rest = 0
        for region in regions:
            if region is not largest:
                held[region] = yield from _walk(region.fd, region.file_offset, region.size)
        status = os.fstat(largest.fd.fileno())
        end = largest.file_offset + largest.size
        for start, length in ((0, largest.file_offset), (end, max(0, status.st_size - end))):
            rest += yield from _walk(largest.fd, start, length)
        held[largest] = max(0, status.st_blocks * BLOCK_BYTES - rest)
    return held


def _walk(fd: Fd, start: int, length: int) -> Generator[None, None, int]:
    """Sum the bytes of data between start and start + length.

    Moves the file offset, which QEMU shares and does not use: it maps the file.
    """
    held = seeks = 0
    position, end = start, start + length
    while position < end:
        data = _seek(fd, position, os.SEEK_DATA, end)
        position = _seek(fd, data, os.SEEK_HOLE, end)
        held += position - data
        seeks += 2
        if seeks % SLICE_SEEKS == 0:
            yield
    if seeks % SLICE_SEEKS:
        yield  # 32 regions of a little less than a slice each would be one
    return held


def _seek(fd: Fd, position: int, whence: int, end: int) -> int:
    """Return where the next data or hole begins, at most end."""
    if position >= end:
        return end
    try:
        return min(os.lseek(fd.fileno(), position, whence), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from here on, or the file has become shorter
            return end
        raise
