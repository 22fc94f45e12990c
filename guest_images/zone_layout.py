"""Makes modelled zones that look like a real guest's: from the counts that /proc shows of its free lists.

Linux says how many blocks of each order and migrate type are free (/proc/pagetypeinfo, readable by root), where each zone
is and its watermarks (/proc/zoneinfo). It does not say where the blocks are, in which order its lists have them, nor
which are reported already. So the blocks are placed: from the lowest address up, largest first, no two that would
merge, small ones in pageblocks of their migrate type, lists in ascending order; everything between them is in use.

Pure text and arithmetic. For comparing a modelled guest with a real one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from guest_images.buddy import Zone
from guest_images.free_lists import (
    MAX_PAGE_ORDER,
    PAGEBLOCK_ORDER,
    PAGEBLOCK_PAGES,
    Block,
    MigrateType,
    ModelError,
    Watermarks,
    aligned_blocks,
)

# Free blocks of each order from 0 up, for each migrate type.
Counts = Mapping[MigrateType, Sequence[int]]

_ORDERS = MAX_PAGE_ORDER + 1
_TYPE_NAMES = {name.lower(): migrate_type for name, migrate_type in MigrateType.__members__.items()}
_FREE_LINE = re.compile(r"Node\s+0, zone\s+(\w+), type\s+(\w+)((?:\s+>?\d+)+)")
_ZONE_LINE = re.compile(r"Node\s+0, zone\s+(\w+)")
_VALUE_LINE = re.compile(r"\s+(min|low|high|spanned|managed|start_pfn):?\s+(\d+)\s*$")


class LayoutError(ModelError):
    """Counts do not fit into their zone, or a text of /proc is not what it should be."""


@dataclass(frozen=True, slots=True)
class ZoneInfo:
    """What /proc/zoneinfo says of a zone, in pages. spanned includes holes, managed does not."""

    name: str
    start_pfn: int
    spanned: int
    managed: int
    watermarks: Watermarks


def parse_zoneinfo(text: str) -> dict[str, ZoneInfo]:
    """Read /proc/zoneinfo of a guest with one node; empty zones are left out. Raises LayoutError."""
    zones: dict[str, ZoneInfo] = {}
    for section in re.split(r"^(?=Node )", text, flags=re.MULTILINE):
        name = _ZONE_LINE.match(section)
        if name is None:
            continue
        # The first of each: "high:" is also a line of every per-CPU list.
        values: dict[str, int] = {}
        for line in section.splitlines():
            found = _VALUE_LINE.match(line)
            if found:
                values.setdefault(found[1], int(found[2]))
        zones |= _zone_info(name[1], values)
    if not zones:
        raise LayoutError("no zone found: give the text of the guest's /proc/zoneinfo")
    return zones


def _zone_info(name: str, values: Mapping[str, int]) -> dict[str, ZoneInfo]:
    if not values.get("managed"):
        return {}
    try:
        marks = Watermarks(values["min"], values["low"], values["high"])
        return {name: ZoneInfo(name, values["start_pfn"], values["spanned"], values["managed"], marks)}
    except KeyError as error:
        raise LayoutError(f"zone {name} has no {error}: give the whole text of /proc/zoneinfo") from None


def parse_pagetypeinfo(text: str) -> dict[str, dict[MigrateType, tuple[int, ...]]]:
    """Read the free counts in /proc/pagetypeinfo of a guest with one node, by zone. Raises LayoutError.

    A list of more than 100000 blocks is shown as ">100000" and taken as 100000 (pagetypeinfo_showfree_print).
    """
    zones: dict[str, dict[MigrateType, tuple[int, ...]]] = {}
    for found in _FREE_LINE.finditer(text):
        name, type_name, numbers = found.groups()
        migrate_type = _TYPE_NAMES.get(type_name.lower())
        counts = tuple(int(number.lstrip(">")) for number in numbers.split())
        if migrate_type is not None and len(counts) == _ORDERS:
            zones.setdefault(name, {})[migrate_type] = counts
    if not zones:
        raise LayoutError(
            f"no free lists of {_ORDERS} orders found: give the text of /proc/pagetypeinfo, read as root"
        )
    return zones


def zone_from_counts(name: str, start_pfn: int, end_pfn: int, watermarks: Watermarks, counts: Counts) -> Zone:
    """Make a zone with so many free blocks; the rest of it is used. Raises LayoutError if they do not fit."""
    zone = Zone(name, start_pfn, end_pfn, watermarks)
    zone.arrange(_Placement(start_pfn, end_pfn).place(counts))
    return zone


def zones_of_guest(zoneinfo: str, pagetypeinfo: str) -> list[Zone]:
    """Make the zones of a real guest from the two texts, read at the same moment. Raises LayoutError.

    A zone that has no free lists in the second text is left out.
    """
    counts = parse_pagetypeinfo(pagetypeinfo)
    zones = []
    for name, info in parse_zoneinfo(zoneinfo).items():
        if name in counts:
            span = pageblock_span(info.start_pfn, info.spanned)
            zones.append(zone_from_counts(name, *span, info.watermarks, counts[name]))
    return zones


@dataclass
class _Placement:
    """Free blocks laid into gaps. A gap is an aligned piece of the zone that is not settled yet; what is left is used.

    No two free blocks may merge. A gap that is split is never free as a whole, as the last half that comes of the
    splitting, the sibling of the block placed, is tainted: it is not taken whole, so that a page of it stays used.
    """

    start_pfn: int
    end_pfn: int
    placed: list[tuple[Block, MigrateType]] = field(default_factory=list)
    # Untyped gaps of pageblocks and more, and smaller ones by type; (tainted, pfn) for each order.
    _large: list[list[tuple[bool, int]]] = field(default_factory=lambda: [[] for _ in range(_ORDERS)])
    _small: dict[MigrateType, list[list[tuple[bool, int]]]] = field(default_factory=dict)

    def place(self, counts: Counts) -> list[tuple[Block, MigrateType]]:
        """Place all blocks, then make the gaps' remains used. Returns free blocks by ascending address."""
        for block in reversed(list(aligned_blocks(self.start_pfn, self.end_pfn))):
            self._large[block.order].append((False, block.pfn))
        for order in range(MAX_PAGE_ORDER, -1, -1):
            for migrate_type in MigrateType:
                for _ in range(_count(counts, migrate_type, order)):
                    self._place(order, migrate_type)
        return sorted(self.placed)

    def _place(self, order: int, migrate_type: MigrateType) -> None:
        gaps, gap_order, tainted, pfn = self._find(order, migrate_type)
        gaps[gap_order].remove((tainted, pfn))
        small = self._small.setdefault(migrate_type, [[] for _ in range(_ORDERS)])
        for half in range(gap_order - 1, order - 1, -1):
            keep = self._large if half >= PAGEBLOCK_ORDER else small
            keep[half].append((half == order, pfn + (1 << half)))
        self.placed.append((Block(pfn, order), migrate_type))

    def _find(
        self, order: int, migrate_type: MigrateType
    ) -> tuple[list[list[tuple[bool, int]]], int, bool, int]:
        """Find the smallest gap for a block: whole if it is of that order and not tainted, to be split otherwise."""
        for gaps in (self._small.get(migrate_type, []), self._large):
            for gap_order in range(order, len(gaps)):
                for tainted, pfn in reversed(gaps[gap_order]):
                    if gap_order > order or not tainted:
                        return gaps, gap_order, tainted, pfn
        raise LayoutError(
            f"the zone from page {self.start_pfn} to {self.end_pfn} has no room for a free block of order {order} and "
            f"type {migrate_type.name}: give counts and the zone's span of the same moment of the same guest"
        )


def _count(counts: Counts, migrate_type: MigrateType, order: int) -> int:
    orders = counts.get(migrate_type, ())
    return orders[order] if order < len(orders) else 0


def pageblock_span(start_pfn: int, spanned: int) -> tuple[int, int]:
    """First page and end of the pageblocks that a zone's span touches: what the modelled zone covers.

    What the real zone does not have of the first and the last of them counts as used, as its holes do.
    """
    end_pfn = start_pfn + spanned
    return start_pfn & -PAGEBLOCK_PAGES, -(-end_pfn // PAGEBLOCK_PAGES) * PAGEBLOCK_PAGES
