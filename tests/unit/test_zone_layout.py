"""Zones from what /proc says: the two texts, and the free lists that come of them."""

from __future__ import annotations

import pytest

from guest_images.free_lists import Block, MigrateType, Watermarks
from guest_images.zone_layout import (
    LayoutError,
    ZoneInfo,
    pageblock_span,
    parse_pagetypeinfo,
    parse_zoneinfo,
    zone_from_counts,
    zones_of_guest,
)

MARKS = Watermarks(10, 20, 30)
MOVABLE, UNMOVABLE = MigrateType.MOVABLE, MigrateType.UNMOVABLE

ZONEINFO = """Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 17
  pages free     2048
        boost    0
        min      33
        low      41
        high     49
        spanned  4095
        present  3998
        managed  3840
        cma      0
        protection: (0, 950, 950, 950, 950)
      nr_free_pages 2048
  pagesets
    cpu: 0
              count: 5
              high:  700
              batch: 1
  node_unreclaimable:  0
  start_pfn:           1
Node 0, zone    DMA32
  pages free     2048
        min      2000
        low      2500
        high     3000
        spanned  258016
        managed  241000
  pagesets
    cpu: 0
              high:  700
  start_pfn:           4096
Node 0, zone   Normal
  pages free     0
        min      0
        low      0
        high     0
        spanned  0
        present  0
        managed  0
"""

PAGETYPEINFO = """Page block order: 9
Pages per block:  512

Free pages count per migrate type at order       0      1      2      3      4      5      6      7      8      9     10 
Node    0, zone    DMA32, type    Unmovable      1      0      2      0      0      0      0      1      0      1      0 
Node    0, zone    DMA32, type      Movable >100000      1      1      1      1      1      1      0      1      2     50 
Node    0, zone    DMA32, type  Reclaimable      3      0      0      0      0      0      0      0      0      0      0 
Node    0, zone    DMA32, type   HighAtomic      0      0      0      0      0      0      0      0      0      0      0 

Number of blocks type     Unmovable      Movable  Reclaimable   HighAtomic 
Node 0, zone    DMA32           10          480            5            0 
"""  # noqa: W291  (as the kernel prints it)


def test_zoneinfo() -> None:
    zones = parse_zoneinfo(ZONEINFO)
    assert zones == {
        "DMA": ZoneInfo("DMA", 1, 4095, 3840, Watermarks(33, 41, 49)),
        "DMA32": ZoneInfo("DMA32", 4096, 258016, 241000, Watermarks(2000, 2500, 3000)),
    }
    assert pageblock_span(1, 4095) == (0, 4096)
    assert pageblock_span(4096, 258016) == (4096, 262144)


def test_pagetypeinfo() -> None:
    zones = parse_pagetypeinfo(PAGETYPEINFO)
    assert list(zones) == ["DMA32"]
    assert zones["DMA32"][MOVABLE] == (100000, 1, 1, 1, 1, 1, 1, 0, 1, 2, 50)
    assert zones["DMA32"][UNMOVABLE] == (1, 0, 2, 0, 0, 0, 0, 1, 0, 1, 0)
    assert sum(zones["DMA32"][MigrateType.HIGHATOMIC]) == 0


def test_the_machine_that_runs_this_can_be_read() -> None:
    with open("/proc/zoneinfo") as file:  # noqa: PTH123
        zones = parse_zoneinfo(file.read())
    assert all(zone.managed <= zone.spanned for zone in zones.values())


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_zoneinfo, "", "give the text of the guest's /proc/zoneinfo"),
        (parse_zoneinfo, "Node 0, zone DMA\n  managed 5\n", "whole text"),
        (parse_pagetypeinfo, "", "read as root"),
        (parse_pagetypeinfo, "Node    0, zone   DMA, type   Movable 1 2 3", "11 orders"),
    ],
)
def test_other_texts(parse: object, text: str, message: str) -> None:
    assert callable(parse)
    with pytest.raises(LayoutError, match=message):
        parse(text)


def test_a_zone_of_counts() -> None:
    counts = {
        MOVABLE: (3, 0, 1, 0, 0, 0, 0, 0, 1, 2, 4),
        UNMOVABLE: (5, 1),
        MigrateType.ISOLATE: (0,) * 9 + (1,),
    }
    zone = zone_from_counts("Normal", 512, 16384, MARKS, counts)
    zone.check()
    shown = {
        migrate_type: tuple(len(zone.list_of(order, migrate_type)) for order in range(11))
        for migrate_type in (MOVABLE, UNMOVABLE, MigrateType.ISOLATE)
    }
    assert shown[MOVABLE] == counts[MOVABLE]
    assert shown[UNMOVABLE] == (5, 1) + (0,) * 9
    assert shown[MigrateType.ISOLATE] == (0,) * 9 + (1, 0)
    assert zone.free_pages == 3 + 4 + 256 + 2 * 512 + 4 * 1024 + 5 + 2
    assert zone.watermarks == MARKS


def test_the_zones_of_a_guest() -> None:
    (zone,) = zones_of_guest(ZONEINFO, PAGETYPEINFO.replace(">100000", "1000"))
    zone.check()
    assert (zone.name, zone.start_pfn, zone.end_pfn) == ("DMA32", 4096, 262144)
    assert (zone.free_blocks(10), zone.free_blocks(9), zone.free_blocks(0)) == (50, 3, 1004)
    assert zone.watermarks == Watermarks(2000, 2500, 3000)


def test_what_is_not_free_is_used_and_can_be_freed() -> None:
    zone = zone_from_counts("Normal", 0, 4096, MARKS, {MOVABLE: (7, 3, 1)})
    for block in list(zone.used_blocks()):
        zone.free(block.pfn)
    zone.check()
    assert zone.free_pages == 4096


def test_the_other_half_of_a_free_block_is_not_free() -> None:
    """Two free blocks of order 9 need two blocks of order 10: they would merge."""
    zone = zone_from_counts("Normal", 0, 2048, MARKS, {MOVABLE: (0,) * 9 + (2,)})
    assert sorted(zone.list_of(9, MOVABLE)) == [0, 1024]
    assert list(zone.used_blocks()) == [Block(512, 9), Block(1536, 9)]


@pytest.mark.parametrize("counts", [(0,) * 9 + (3,), (0,) * 10 + (3,), (2000,)])
def test_counts_that_do_not_fit(counts: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="has no room for a free block of order"):
        zone_from_counts("Normal", 0, 2048, MARKS, {MOVABLE: counts})
