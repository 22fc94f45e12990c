"""A real guest's free lists at two moments, and modelled zones that begin where it is.

zone_layout.py reads one moment's texts and places the blocks. Which of them are reported already, /proc does not say, and
one moment cannot tell. Two can: one before memory is freed, when page reporting has nothing left to do, and one right
after. What was free at the first and is still there has been reported; what has come since has not.

Pure text and arithmetic. balloonlab.fidelity takes the texts of a real guest and compares what the zones do with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from guest_images.buddy import Zone
from guest_images.free_lists import MAX_PAGE_ORDER, PAGE_SIZE, MigrateType
from guest_images.page_reporting import Parameters
from guest_images.zone_layout import zones_of_guest

# A line of each per-CPU page set in /proc/zoneinfo.
_PER_CPU_COUNT = re.compile(r"^\s+count:\s+(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ProcState:
    """One moment: the texts of /proc/zoneinfo and /proc/pagetypeinfo."""

    zoneinfo: str
    pagetypeinfo: str

    def zones(self) -> list[Zone]:
        """Make zones with these free lists, nothing marked. Raises LayoutError."""
        return zones_of_guest(self.zoneinfo, self.pagetypeinfo)

    @property
    def per_cpu_bytes(self) -> int:
        """Free memory in the per-CPU lists: not on the zones' lists, so it is neither merged nor reported."""
        return sum(map(int, _PER_CPU_COUNT.findall(self.zoneinfo))) * PAGE_SIZE


def zones_after(before: ProcState, after: ProcState, parameters: Parameters) -> list[Zone]:
    """Make the zones of a guest that had settled before a free, as they are right after it. Raises LayoutError.

    Of each list of largest blocks, as many are marked as it had before: the last ones, where page reporting puts them.
    Nothing is marked in a zone that is too near its low watermark to be reported, nor in smaller blocks: an allocation
    takes the smallest block that fits, so small ones beside a fill are what splits have left since the last pass, and
    the parts of a block that is split do not inherit its mark (expand() in mm/page_alloc.c).
    """
    settled = {zone.name: zone for zone in before.zones()}
    zones = after.zones()
    for zone in zones:
        earlier = settled.get(zone.name)
        if earlier is not None and _is_reported(zone, parameters):
            _mark_kept(earlier, zone)
    return zones


def _is_reported(zone: Zone, parameters: Parameters) -> bool:
    """page_reporting_process_zone()'s test.

    Asked after the free: a fill may leave less in a zone, of blocks that were reported when there was more.
    """
    return zone.watermark_ok(0, zone.watermarks.low + (parameters.capacity << parameters.order))


def _mark_kept(before: Zone, after: Zone) -> None:
    """Mark the largest blocks, as many as were there before."""
    for migrate_type in MigrateType:
        blocks = list(after.list_of(MAX_PAGE_ORDER, migrate_type))
        count = min(len(blocks), len(before.list_of(MAX_PAGE_ORDER, migrate_type)))
        for pfn in blocks[len(blocks) - count :]:
            after.mark_reported(pfn)
