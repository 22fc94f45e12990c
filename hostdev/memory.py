"""The guest's memory table: addresses of the guest and of the front end -> a region and an offset in it.

Reads of guest buffers go through pread: reading a hole through a mapping would allocate it and charge us for it. Only
the rings are used through the mapping, because their indices must be read and written whole.

A file that somebody cuts short is a SIGBUS for whoever touches a mapping of what is gone; pread comes back short. So
where that has happened regions are not mapped at all.

Not thread-safe and not a policy: what may be released is discard.py's and balloon.py's business. Used by session.py
(builds the table), virtqueue.py (rings) and balloon.py (buffers).
"""

from __future__ import annotations

import fcntl
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from hostdev.errors import RequestError
from hostdev.fds import Fd, seals
from hostdev.wire.vhost_user import MemoryRegion

# What QEMU's libvhost-user offers. Each slot costs two descriptors here, ours and the one that mmap duplicates.
MAX_REGIONS = 32

BLOCK_BYTES = 512  # The unit of st_blocks, whatever the file system (stat(2)).

_ADDRESS_SPACE = 1 << 64
# No file is longer: off_t has a sign. A mapping would be refused; of a region that is not mapped the file is read.
_LONGEST_FILE = (1 << 63) - 1


class Region:
    """One region of guest memory. Owns its descriptor and its mapping, if it has one, until close()."""

    def __init__(self, description: MemoryRegion, fd: Fd, *, mapped: bool = True) -> None:
        """Check the description, against the file as well if it is to be mapped, and map it.

        Raises RequestError; fd is then still the caller's.
        """
        _check(description)
        if mapped:
            _check_file(description, fd)
        status = os.fstat(fd.fileno())
        self.file = status.st_dev, status.st_ino
        self.guest_address = description.guest_address
        self.size = description.size
        self.user_address = description.user_address
        self.file_offset = description.mmap_offset
        # What a punch must be aligned to: the huge page on hugetlbfs, the base page on tmpfs. Not st_blksize, which is
        # 2 MiB on a tmpfs with transparent huge pages, where single pages can be given back (Linux, shmem_getattr).
        self.page_size = max(os.fstatvfs(fd.fileno()).f_bsize, mmap.PAGESIZE)
        # A mapping of huge pages begins and ends with one (Linux, hugetlb_get_unmapped_area and hugetlb_vm_op_split); a
        # region need not: q35's first one is 640 KiB.
        start = self.file_offset // self.page_size * self.page_size
        end = -(-(self.file_offset + self.size) // self.page_size) * self.page_size
        self._lead = self.file_offset - start
        self._mapping = _map(fd, start, end - start) if mapped else None
        self.fd = fd

    @property
    def guest_end(self) -> int:
        """The first guest physical address after the region."""
        return self.guest_address + self.size

    @property
    def user_end(self) -> int:
        """The first front-end address after the region."""
        return self.user_address + self.size

    @property
    def file_end(self) -> int:
        """The first offset in the file after the region."""
        return self.file_offset + self.size

    @property
    def mapping(self) -> mmap.mmap:
        """The mapping of a region that is mapped."""
        assert self._mapping is not None
        return self._mapping

    def view(self, offset: int, length: int) -> memoryview:
        """Return a writable view of length bytes at offset; both must be inside the region, and that mapped."""
        return memoryview(self.mapping)[self._lead + offset : self._lead + offset + length]

    def advise(self, advice: int, offset: int, length: int) -> None:
        """Call madvise on length bytes at offset, inside the region, which is mapped. Raises OSError."""
        self.mapping.madvise(advice, self._lead + offset, length)

    @property
    def may_shrink(self) -> bool:
        """True if nothing keeps the file from being cut short: QEMU seals a memfd against that, unless told otherwise."""
        return not seals(self.fd) & fcntl.F_SEAL_SHRINK

    def close(self) -> None:
        """Unmap and close. Views into the mapping must have been released before."""
        if self._mapping is not None:
            self._mapping.close()
        self.fd.close()


def _map(fd: Fd, start: int, length: int) -> mmap.mmap:
    try:
        mapping = mmap.mmap(fd.fileno(), length, mmap.MAP_SHARED, offset=start)
    except (OSError, ValueError) as error:
        raise RequestError(f"guest memory cannot be mapped: {error}") from error
    mapping.madvise(mmap.MADV_DONTDUMP)
    return mapping


def _check(description: MemoryRegion) -> None:
    """Refuse a description that does not fit the address space."""
    if description.size == 0:
        raise RequestError("memory region of size 0")
    for base in (description.guest_address, description.user_address):
        if base + description.size > _ADDRESS_SPACE:
            raise RequestError("memory region passes the end of the address space")
    if description.mmap_offset + description.size > _LONGEST_FILE:
        raise RequestError("memory region is farther in its file than a file can be long")
    # The front end's address too: rings are checked for alignment by it, and their indices must be stored whole.
    if (description.mmap_offset | description.guest_address | description.user_address) % mmap.PAGESIZE:
        raise RequestError("memory region is not aligned to a page")


def _check_file(description: MemoryRegion, fd: Fd) -> None:
    """Refuse a description that does not fit its file."""
    if os.fstat(fd.fileno()).st_size < description.mmap_offset + description.size:
        raise RequestError(
            "memory region is longer than its file: size of the memory backend and of -m must agree"
        )


class Part(NamedTuple):
    """A piece of guest memory inside one region. offset: bytes from the region's start."""

    region: Region
    offset: int
    length: int


class MemoryTable:
    """The regions of one guest, ordered by guest address; they overlap neither there nor in the front end's space."""

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        """Raises RequestError for overlaps or too many regions; the regions are then still the caller's."""
        self.regions = tuple(sorted(regions, key=lambda region: region.guest_address))
        if len(self.regions) > MAX_REGIONS:
            raise RequestError(f"more than {MAX_REGIONS} memory regions")
        self._starts = [region.guest_address for region in self.regions]
        _refuse_overlap([(region.guest_address, region.guest_end) for region in self.regions])
        _refuse_overlap(sorted((region.user_address, region.user_end) for region in self.regions))

    def split(self, address: int, length: int) -> Iterator[Part]:
        """Yield the parts of a guest physical range that lie in regions, in order. Holes are left out."""
        end = address + length
        index = max(0, bisect_right(self._starts, address) - 1)
        for region in self.regions[index:]:
            if region.guest_address >= end:
                return
            first, last = max(address, region.guest_address), min(end, region.guest_end)
            if first < last:
                yield Part(region, first - region.guest_address, last - first)

    def read(self, address: int, length: int) -> bytes | None:
        """Copy length bytes at a guest physical address; None unless all of them are inside regions and readable."""
        try:
            pieces = [
                os.pread(part.region.fd.fileno(), part.length, part.region.file_offset + part.offset)
                for part in self.split(address, length)
            ]
        except OSError:
            return None  # EIO: a page with a hardware error
        data = b"".join(pieces)
        return data if len(data) == length else None

    def peek(self, user_address: int, length: int) -> bytes | None:
        """Copy length bytes at a front-end address; None unless one region holds them all and they are readable."""
        for region in self.regions:
            if region.user_address <= user_address and user_address + length <= region.user_end:
                return self.read(region.guest_address + user_address - region.user_address, length)
        return None

    def view(self, user_address: int, length: int) -> memoryview:
        """Return a writable view of length bytes at a front-end address. Raises RequestError if no region holds it.

        The view must be released before its region is closed.
        """
        for region in self.regions:
            if region.user_address <= user_address and user_address + length <= region.user_end:
                return region.view(user_address - region.user_address, length)
        if not self.regions:
            # QEMU leaves regions out whose memory it cannot share, and says nothing.
            raise RequestError("no guest memory was sent: the memory backend is not shared, add share=on")
        raise RequestError("no memory region holds this part of the ring")

    def span(self) -> int:
        """Bytes of guest memory as QEMU's -m counts them: of each file, from the first byte in a region to the last.

        More than the regions hold: QEMU leaves out what of its RAM the guest sees as something else, on q35 the 128 KiB
        behind the VGA window.
        """
        bounds: dict[tuple[int, int], tuple[int, int]] = {}
        for region in self.regions:
            start, end = region.file_offset, region.file_end
            first, last = bounds.get(region.file, (start, end))
            bounds[region.file] = min(first, start), max(last, end)
        return sum(last - first for first, last in bounds.values())

    def footprint(self) -> int:
        """Bytes that the host holds of the files behind the regions, in memory or swap."""
        files = {region.file: os.fstat(region.fd.fileno()) for region in self.regions}
        return sum(status.st_blocks for status in files.values()) * BLOCK_BYTES

    def find(self, description: MemoryRegion) -> Region | None:
        """Return the region with this guest address, front-end address and size, as REM_MEM_REG names it."""
        for region in self.regions:
            known = (region.guest_address, region.user_address, region.size)
            if known == (description.guest_address, description.user_address, description.size):
                return region
        return None


def _refuse_overlap(bounds: list[tuple[int, int]]) -> None:
    for (_start, end), (start, _end) in pairwise(bounds):
        if start < end:
            raise RequestError("memory regions overlap")


def doubled(regions: Iterable[Region]) -> set[Region]:
    """Return the regions that have bytes of their file in common with another: a page of one is in use in the other, maybe."""
    found: set[Region] = set()
    furthest: Region | None = None
    for region in sorted(regions, key=lambda region: (region.file, region.file_offset)):
        same_file = furthest is not None and furthest.file == region.file
        if furthest is not None and same_file and region.file_offset < furthest.file_end:
            found |= {furthest, region}
        if furthest is None or not same_file or region.file_end > furthest.file_end:
            furthest = region
    return found
