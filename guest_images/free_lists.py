"""What the modelled allocator is made of: blocks, migrate types, watermarks, and a list as the kernel has it.

Values and one data structure, no policy: that is buddy.py. Everything that looks into a zone uses these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from math import isqrt
from typing import NamedTuple

from guest_images.errors import GuestError

PAGE_SIZE = 4096
# MAX_PAGE_ORDER and pageblock_order of x86-64: blocks of up to 4 MiB, migrate types kept for each 2 MiB.
MAX_PAGE_ORDER = 10
PAGEBLOCK_ORDER = 9
PAGEBLOCK_PAGES = 1 << PAGEBLOCK_ORDER


class ModelError(GuestError):
    """A model is asked for something impossible, or finds itself broken."""


class MigrateType(IntEnum):
    """What can be done with the pages of a pageblock, numbered and ordered as in linux/mmzone.h with CMA."""

    UNMOVABLE = 0
    MOVABLE = 1
    RECLAIMABLE = 2
    HIGHATOMIC = 3
    CMA = 4
    ISOLATE = 5


TYPES = len(MigrateType)
# migratetype_is_mergeable(): below MIGRATE_PCPTYPES, the types that may take blocks from each other.
MERGEABLE_TYPES = MigrateType.RECLAIMABLE + 1


class Block(NamedTuple):
    """2**order pages from page frame number pfn on."""

    pfn: int
    order: int

    @property
    def pages(self) -> int:
        """Number of pages."""
        return 1 << self.order


@dataclass(frozen=True, slots=True)
class Watermarks:
    """A zone's watermarks, in pages, as /proc/zoneinfo shows them."""

    min: int
    low: int
    high: int

    @classmethod
    def of_linux(cls, pages: int, all_pages: int) -> Watermarks:
        """What Linux sets at boot for a zone of so many pages out of all_pages.

        init_per_zone_wmark_min() and __setup_per_zone_wmarks() with the default watermark_scale_factor of 10; without
        the raise that khugepaged makes where transparent huge pages are on.
        """
        min_free_kilobytes = min(max(isqrt(all_pages * 4 * 16), 128), 262144)
        lowest = min_free_kilobytes // 4 * pages // all_pages
        step = max(lowest // 4, pages * 10 // 10000)
        return cls(lowest, lowest + step, lowest + 2 * step)


class FreeList:
    """A doubly linked list of blocks, as the kernel's: its head can be moved to any place in constant time."""

    __slots__ = ("_next", "_previous")

    HEAD = -1

    def __init__(self) -> None:
        self._next = {self.HEAD: self.HEAD}
        self._previous = {self.HEAD: self.HEAD}

    def __len__(self) -> int:
        return len(self._next) - 1

    def __iter__(self) -> Iterator[int]:
        pfn = self._next[self.HEAD]
        while pfn != self.HEAD:
            yield pfn
            pfn = self._next[pfn]

    def following(self, pfn: int) -> int:
        """The block after pfn; HEAD stands before the first and after the last."""
        return self._next[pfn]

    def add(self, pfn: int, *, to_tail: bool) -> None:
        """Put a block first, or last."""
        following, previous = self._next, self._previous
        if to_tail:
            before = previous[-1]
            following[before] = previous[-1] = pfn
            following[pfn], previous[pfn] = -1, before
        else:
            after = following[-1]
            previous[after] = following[-1] = pfn
            following[pfn], previous[pfn] = after, -1

    def remove(self, pfn: int) -> None:
        """Take a block out."""
        after, before = self._next.pop(pfn), self._previous.pop(pfn)
        self._next[before] = after
        self._previous[after] = before

    def rotate_to_front(self, pfn: int) -> None:
        """Make pfn the first block; those before it become the last, in their order (list_rotate_to_front)."""
        self.remove(self.HEAD)
        before = self._previous[pfn]
        self._next[before] = self._previous[pfn] = self.HEAD
        self._next[self.HEAD], self._previous[self.HEAD] = pfn, before


def aligned_blocks(start_pfn: int, end_pfn: int) -> Iterator[Block]:
    """Cut a range of pages into the largest naturally aligned blocks, in ascending order."""
    while start_pfn < end_pfn:
        order = MAX_PAGE_ORDER
        while start_pfn % (1 << order) or start_pfn + (1 << order) > end_pfn:
            order -= 1
        yield Block(start_pfn, order)
        start_pfn += 1 << order
