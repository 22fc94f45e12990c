"""Chains over the holes in a PC's memory: under the ROMs, and with a VGA under its window.

The guest's RAM is one file without holes; what the guest cannot see of it is not its memory and is no part of a region.
Ours gives back what of a range is in regions, and lets alone what lies in the file between them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostdev.wire.balloon import Role
from hostdev.wire.virtqueue import DESCRIPTOR_INDIRECT, DESCRIPTOR_SIZE, DESCRIPTOR_WRITE, Descriptor
from qmp_glue.find import Qemu
from tests.qtest.bench import FREE, PAGE, PATTERN, RING_BYTES, Bench
from tests.qtest.hostile import ROM_AT, ROM_END, Witness, offer, put_table

VGA_AT = 0xA0000
PAGES = 4
# The inflate ring begins where the hole ends; behind it is room.
LAST = ROM_END + RING_BYTES // 2


@pytest.fixture(scope="module")
def kept() -> Iterator[dict[int, Bench]]:
    """The benches of this module, by where their hole begins."""
    kept: dict[int, Bench] = {}
    yield kept
    for each in kept.values():
        assert each.close() == (0, 0)


@pytest.fixture(params=[ROM_AT, VGA_AT], ids=["ROMs", "VGA and ROMs"])
def hole(request: pytest.FixtureRequest) -> int:
    """Where the hole begins; it ends with the first MiB."""
    return int(request.param)


@pytest.fixture
def bench(
    hole: int, kept: dict[int, Bench], qemu: Qemu, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """All that lies under the hole is full of the pattern, and still is at the end."""
    if hole not in kept:
        extra = ("-device", "VGA") if hole == VGA_AT else ()
        kept[hole] = Bench(qemu, tmp_path_factory.mktemp("hole"), ours=True, extra=extra)
        kept[hole].start()
    bench = kept[hole]
    bench.renew()
    bench.drive()
    first = bench.command("query-memory")[0]
    assert (first["guest-address"], first["size"]) == (0, hole)
    witness = Witness(bench)
    with bench.vm.ram_file.open("r+b", buffering=0) as ram:
        ram.seek(hole)
        ram.write(bytes([PATTERN]) * (ROM_END - hole))
    yield bench
    assert bench.holds(hole, ROM_END - hole)
    witness.check()


def test_a_report(bench: Bench, hole: int) -> None:
    first = hole - PAGES * PAGE
    bench.fill(first - PAGE, (PAGES + 1) * PAGE)
    bench.fill(LAST - PAGE, 2 * PAGE)
    assert bench.report((first, LAST - first)) == 0
    assert bench.holds(first - PAGE, PAGE)
    assert bench.holds(first, PAGES * PAGE, 0)
    assert bench.holds(LAST - PAGE, PAGE, 0)
    assert bench.holds(LAST, PAGE)


@pytest.mark.parametrize("edge", [PAGE - 1, 1, -1], ids=["a page short", "a byte in", "a byte out"])
def test_a_report_up_to_the_edge(bench: Bench, hole: int, edge: int) -> None:
    """The page at the edge goes if all of it was named."""
    bench.fill(hole - 2 * PAGE, 2 * PAGE)
    start = hole - 2 * PAGE
    released = bench.given_back(lambda: bench.report((start, 2 * PAGE - edge)))
    assert released == (PAGE if edge > 0 else 2 * PAGE)


def test_an_inflation_by_every_page_of_the_hole(bench: Bench, hole: int) -> None:
    bench.fill(hole - PAGE, PAGE)
    pages = range(hole - PAGE, ROM_END, PAGE)
    assert bench.given_back(lambda: bench.send_pages(Role.INFLATE, pages)) == PAGE


def test_an_indirect_table_across_the_edge(bench: Bench, hole: int) -> None:
    """Half of it is memory: none of it is taken."""
    bench.fill(FREE, PAGE)
    place = hole - DESCRIPTOR_SIZE
    put_table(bench, place, [Descriptor(FREE, PAGE, DESCRIPTOR_WRITE, 0)])
    ring = bench.rings[Role.REPORTING]
    ring.write_descriptor(0, Descriptor(place, 2 * DESCRIPTOR_SIZE, DESCRIPTOR_INDIRECT, 0))
    offer(ring)
    bench.wait_for_index(ring, 1)
    assert bench.holds(FREE, PAGE)
