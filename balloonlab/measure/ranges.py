"""Sets of bytes as ranges: differences, intersections, and where guest addresses lie in the files of guest RAM.

Pure. Used by all of --verify and by the meter; its properties are in tests/property/test_measure_ranges.py. A *place* is a byte of guest RAM
as the host has it, on one line of numbers for all files: the number of the file in the upper bits, the offset in the lower.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from balloonlab.sizes import human
from hostdev.pages import Span, merge
from qmp_glue.ram import Section

# 256 TiB a file: more than x86 has physical addresses for in any machine of today.
FILE_SHIFT = 48
PAGE = 4096


def total(spans: Iterable[Span]) -> int:
    """Return how many bytes separate spans have."""
    return sum(span.length for span in spans)


def intersect(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Return the bytes that are in both. Both sorted and separate, as merge() makes them; so is the result."""
    return list(_intersections(spans, others))


def _intersections(spans: Sequence[Span], others: Sequence[Span]) -> Iterator[Span]:
    one = two = 0
    while one < len(spans) and two < len(others):
        start = max(spans[one].start, others[two].start)
        end = min(spans[one].end, others[two].end)
        if start < end:
            yield Span(start, end - start)
        if spans[one].end < others[two].end:
            one += 1
        else:
            two += 1


def subtract(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Return the bytes that are in spans and not in others. Both sorted and separate; so is the result."""
    return list(_differences(spans, others))


def _differences(spans: Sequence[Span], others: Sequence[Span]) -> Iterator[Span]:
    two = 0
    for span in spans:
        start = span.start
        while two < len(others) and others[two].end <= start:
            two += 1
        ahead = two
        while ahead < len(others) and others[ahead].start < span.end:
            if start < others[ahead].start:
                yield Span(start, others[ahead].start - start)
            start = others[ahead].end
            ahead += 1
        if start < span.end:
            yield Span(start, span.end - start)


class Places:
    """Guest physical addresses to places and back."""

    def __init__(self, sections: Iterable[Section]) -> None:
        self.sections = tuple(sections)

    @property
    def all(self) -> list[Span]:
        """All guest RAM, as places."""
        return merge(Span(_place(one), one.length) for one in self.sections)

    def of(self, addresses: Iterable[Span]) -> list[Span]:
        """Return the places of guest addresses; what is no RAM has none."""
        wanted = merge(addresses)
        return merge(
            Span(part.start - section.address + _place(section), part.length)
            for section in self.sections
            for part in _intersections(wanted, [Span(section.address, section.length)])
        )

    def addresses(self, places: Iterable[Span]) -> list[Span]:
        """Return the guest addresses of places; what the guest does not see has none."""
        wanted = merge(places)
        return merge(
            Span(part.start - _place(section) + section.address, part.length)
            for section in self.sections
            for part in _intersections(wanted, [Span(_place(section), section.length)])
        )

    def describe(self, places: Sequence[Span]) -> str:
        """Return how much these places are and where the first is, by guest address."""
        size, found = total(places), self.addresses(places)
        where = f"guest address {found[0].start:#x}" if found else "no address that the guest sees"
        return f"{counted(size)} ({human(size)}), the first at {where}"


def in_file(number: int, extents: Iterable[tuple[int, int]]) -> list[Span]:
    """Return the places of (offset, length) pairs in a file of this number."""
    return merge(Span((number << FILE_SHIFT) + offset, length) for offset, length in extents)


def _place(section: Section) -> int:
    return (section.file << FILE_SHIFT) + section.offset


def counted(size: int) -> str:
    """Return bytes as pages: "1 page", "1,024 pages"."""
    pages = size // PAGE
    return f"{pages:,} page" + ("s" if pages != 1 else "")
