"""Sets of bytes as sorted, disjoint spans: what two have in common, what one has that another has not, where they lie.

Pure; hostdev.pages has merge(), which makes such a set of any spans. Used for everything that compares the host's map of
a guest's RAM with what the device says it released.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hostdev.pages import Span
from qmp_glue.ram import Section


def total(spans: Sequence[Span]) -> int:
    """Return how many bytes a set has."""
    return sum(span.length for span in spans)


def common(one: Sequence[Span], other: Sequence[Span]) -> list[Span]:
    """Return the bytes that are in both sets."""
    return list(_common(one, other))


def _common(one: Sequence[Span], other: Sequence[Span]) -> Iterator[Span]:
    first = second = 0
    while first < len(one) and second < len(other):
        start = max(one[first].start, other[second].start)
        end = min(one[first].end, other[second].end)
        if start < end:
            yield Span(start, end - start)
        if one[first].end < other[second].end:
            first += 1
        else:
            second += 1


def without(one: Sequence[Span], other: Sequence[Span]) -> list[Span]:
    """Return the bytes of one that are not in other."""
    return list(_without(one, other))


def _without(one: Sequence[Span], other: Sequence[Span]) -> Iterator[Span]:
    position = 0
    for span in one:
        start = span.start
        while position < len(other) and other[position].end <= start:
            position += 1
        ahead = position
        while ahead < len(other) and other[ahead].start < span.end:
            if start < other[ahead].start:
                yield Span(start, other[ahead].start - start)
            start = other[ahead].end
            ahead += 1
        if start < span.end:
            yield Span(start, span.end - start)


def in_file(span: Span, sections: Sequence[Section]) -> Iterator[tuple[int, Span]]:
    """Yield where a range of guest physical bytes lies: the number of the RAM file, and the range of offsets in it."""
    for section in sections:
        start, end = max(span.start, section.address), min(span.end, section.end)
        if start < end:
            yield section.file, Span(section.offset + start - section.address, end - start)
