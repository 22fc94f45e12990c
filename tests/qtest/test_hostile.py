"""Chains that no driver should build, put to both devices: loops, tables, lengths, directions, addresses.

Ours counts what is wrong, returns the chain unused and goes on; QEMU's own says NEEDS_RESET at most of them.
"""

from __future__ import annotations

from collections import Counter

import pytest

from hostdev.driver import Buffer
from hostdev.virtqueue import MAX_INDIRECT
from hostdev.wire.balloon import PFN_STRUCT, Role
from hostdev.wire.virtqueue import (
    DESCRIPTOR_INDIRECT,
    DESCRIPTOR_NEXT,
    DESCRIPTOR_SIZE,
    DESCRIPTOR_WRITE,
    Descriptor,
)
from qmp_glue.virtio_pci import Status
from tests.qtest.bench import FREE, LIST, PAGE, RAM_BYTES, RING_SIZE, Bench
from tests.qtest.hostile import (
    INTERRUPTS,
    LAST_ADDRESS,
    MAX_LENGTH,
    PAGES,
    PCI_HOLE,
    ROM_AT,
    ROM_END,
    TABLE,
    Case,
    Witness,
    assert_released,
    await_broken,
    offer,
    pfns,
    put,
    readable,
)

W, NEXT, INDIRECT = DESCRIPTOR_WRITE, DESCRIPTOR_NEXT, DESCRIPTOR_INDIRECT
FIRST, SECOND = Descriptor(FREE, PAGE, W, 0), Descriptor(FREE + PAGE, PAGE, W, 0)
BEFORE_ROM = ROM_AT - DESCRIPTOR_SIZE
FREE_PAGE = FREE // PAGE
ALL = tuple(range(PAGES))
# More than all tests before may have deflated in half a second.
MARK_PAGES = 10_000


def linked(descriptor: Descriptor, successor: int, flags: int = 0) -> Descriptor:
    return Descriptor(descriptor.address, descriptor.length, descriptor.flags | NEXT | flags, successor)


def table_of(length: int, address: int = TABLE, flags: int = INDIRECT) -> Descriptor:
    return Descriptor(address, length, flags, 0)


LINKS = {
    "a self loop": Case((linked(FIRST, 0),), None, kind="loop"),
    "a circle of two": Case((linked(FIRST, 1), linked(SECOND, 0)), None, kind="loop"),
    "a circle behind a head": Case(
        (linked(FIRST, 1), linked(SECOND, 2), linked(SECOND, 1)), None, kind="loop"
    ),
    "next just outside": Case((linked(FIRST, RING_SIZE),), None, kind="next-outside"),
    "next far outside": Case((linked(FIRST, 0xFFFF),), None, kind="next-outside"),
    "readable after writable": Case(
        (linked(FIRST, 1), Descriptor(FREE + PAGE, PAGE, 0, 0)), None, kind="readable-after-writable"
    ),
    "flags that mean nothing": Case((Descriptor(FREE, PAGE, 0xFFF8 | W, 0),), (0,), released=(0,)),
}
TABLES = {
    "of length 0": Case((table_of(0),), None, kind="indirect-length"),
    "of one and a half": Case((table_of(24),), None, kind="indirect-length", table=(FIRST,)),
    "of less than one": Case((table_of(15),), None, kind="indirect-length", table=(FIRST,)),
    "of 4 GiB": Case((table_of(MAX_LENGTH & -16),), None, kind="indirect-length", table=(FIRST,)),
    "longer than ours takes": Case(
        (table_of((MAX_INDIRECT + 1) * DESCRIPTOR_SIZE),), (0,), kind="indirect-length", table=(FIRST,)
    ),
    "as long as ours takes": Case(
        (table_of(MAX_INDIRECT * DESCRIPTOR_SIZE),), (0,), released=(0,), table=(FIRST,)
    ),
    # To QEMU the inner one is a readable buffer.
    "in a table": Case((table_of(16),), (), kind="nested-indirect", table=(table_of(16, TABLE + PAGE),)),
    "with a successor": Case(
        (table_of(16, flags=INDIRECT | NEXT), SECOND), (0,), kind="indirect-next", table=(FIRST,)
    ),
    # "The device MUST handle the case of zero or more normal chained descriptors followed by a single descriptor with
    # flags&VIRTQ_DESC_F_INDIRECT" (virtio 1.3, 2.7.5.3.2): ours does.
    "after a descriptor": Case((linked(FIRST, 1), table_of(16)), None, released=(0, 1), table=(SECOND,)),
    "that is writable": Case((table_of(16, flags=INDIRECT | W),), (0,), released=(0,), table=(FIRST,)),
    "behind the end of RAM": Case((table_of(16, RAM_BYTES),), None, kind="indirect-outside"),
    "across the end of RAM": Case(
        (table_of(32, RAM_BYTES - 16),),
        None,
        kind="indirect-outside",
        table=(linked(FIRST, 1),),
        table_at=RAM_BYTES - 16,
    ),
    "among registers": Case((table_of(16, INTERRUPTS),), None, kind="indirect-outside"),
    "across the hole of the ROMs": Case(
        (table_of(32, BEFORE_ROM),),
        None,
        kind="indirect-outside",
        table=(FIRST,),
        table_at=BEFORE_ROM,
    ),
    "past the last address": Case((table_of(32, LAST_ADDRESS - 15),), None, kind="indirect-outside"),
    "with next outside": Case((table_of(16),), None, kind="next-outside", table=(linked(FIRST, 1),)),
    "in a circle": Case((table_of(32),), None, kind="loop", table=(linked(FIRST, 1), linked(SECOND, 0))),
}
ADDRESSES = {
    "no length": Case((Descriptor(FREE, 0, W, 0),), None),
    "no length and no memory": Case((Descriptor(LAST_ADDRESS, 0, W, 0),), None),
    "no length, then one": Case((Descriptor(FREE, 0, W | NEXT, 1), SECOND), None, released=(1,)),
    "around the last address": Case((Descriptor(LAST_ADDRESS - PAGE + 1, 2 * PAGE, W, 0),), ()),
    "the last address, 4 GiB": Case((Descriptor(LAST_ADDRESS, MAX_LENGTH, W, 0),), None),
    "the hole of PCI": Case((Descriptor(PCI_HOLE, PAGE, W, 0),), ()),
    "registers": Case((Descriptor(INTERRUPTS, PAGE, W, 0),), ()),
    "the ROMs": Case((Descriptor(ROM_AT, ROM_END - ROM_AT, W, 0),), None),
    "4 GiB - 1": Case((Descriptor(FREE, MAX_LENGTH, W, 0),), None, released=ALL),
    "4 GiB in all": Case(
        (Descriptor(FREE, 1 << 31, W | NEXT, 1), Descriptor(FREE, 1 << 31, W, 0)), None, released=ALL
    ),
    "4 GiB and a byte in all": Case(
        (Descriptor(FREE, 1 << 31, W | NEXT, 1), Descriptor(FREE, (1 << 31) + 1, W, 0)), None, kind="too-long"
    ),
    "one byte": Case((Descriptor(FREE, 1, W, 0),), ()),
    "a page from the middle": Case((Descriptor(FREE + 8, PAGE, W, 0),), ()),
}
LISTS = {
    "the last number": Case(
        readable((LIST, 12)), (0,), released=(0,), data=pfns(MAX_LENGTH, MAX_LENGTH - 1, FREE_PAGE)
    ),
    "holes": Case(
        readable((LIST, 28)),
        (0,),
        released=(0,),
        data=pfns(0xC0, 0xF0, 0xFF, PCI_HOLE // PAGE, INTERRUPTS // PAGE, RAM_BYTES // PAGE, FREE_PAGE),
    ),
    "no byte": Case(readable((LIST, 0)), None, data=pfns(FREE_PAGE)),
    "no byte of no memory, then a number": Case(
        readable((LAST_ADDRESS, 0), (LIST, 4)), None, released=(0,), data=pfns(FREE_PAGE)
    ),
    "3 bytes": Case(readable((LIST, 3)), (), data=pfns(FREE_PAGE)),
    "7 bytes": Case(readable((LIST, 7)), (0,), released=(0,), data=pfns(FREE_PAGE, FREE_PAGE + 1)),
    "1 + 1 + 1 + 5 bytes": Case(
        readable((LIST, 1), (LIST + 1, 1), (LIST + 2, 1), (LIST + 3, 5)),
        (0, 1),
        released=(0, 1),
        data=pfns(FREE_PAGE, FREE_PAGE + 1),
    ),
    "3 + 6 + 3 bytes": Case(
        readable((LIST, 3), (LIST + 3, 6), (LIST + 9, 3)),
        (0, 1, 2),
        released=(0, 1, 2),
        data=pfns(FREE_PAGE, FREE_PAGE + 1, FREE_PAGE + 2),
    ),
    "no memory": Case(readable((RAM_BYTES, 4)), (), kind="outside"),
    "registers": Case(readable((INTERRUPTS, 4)), (), kind="outside"),
    "a number, then no memory": Case(
        readable((LIST, 4), (LAST_ADDRESS - 1, 4)), (0,), kind="outside", data=pfns(FREE_PAGE)
    ),
    "4 GiB - 1": Case(
        readable((LIST, MAX_LENGTH)), None, released=(0,), kind="pfn-limit", data=pfns(FREE_PAGE)
    ),
    "the wrong direction": Case((Descriptor(LIST, 4, W, 0),), (), data=pfns(FREE_PAGE)),
}
HINTS = {
    "no byte": Case(readable((LIST, 0)), None),
    "3 bytes": Case(readable((LIST, 3)), None),
    "5 bytes": Case(readable((LIST, 5)), ()),
    "2 + 2 bytes": Case(readable((LIST, 2), (LIST + 2, 2)), ()),
    "no memory": Case(readable((RAM_BYTES, 4)), (), kind="outside"),
    "an id and a block": Case((Descriptor(LIST, 4, NEXT, 1), FIRST), (), data=pfns(0x8000_0001)),
    "a block of nothing": Case((Descriptor(FREE, 0, W, 0),), None),
    "a block of no memory": Case((Descriptor(INTERRUPTS, PAGE, W, 0),), ()),
}


def of_role(role: Role, cases: dict[str, Case]) -> list[Case]:
    return [
        Case(
            each.descriptors,
            each.theirs,
            each.released,
            each.kind,
            role,
            each.table,
            each.table_at,
            each.data,
        )
        for each in cases.values()
    ]


GROUPS = {
    "links": (Role.REPORTING, LINKS),
    "a table": (Role.REPORTING, TABLES),
    "an address": (Role.REPORTING, ADDRESSES),
    "page frame numbers": (Role.INFLATE, LISTS),
    "a hint": (Role.FREE_PAGE_HINT, HINTS),
}
CASES = [case for role, cases in GROUPS.values() for case in of_role(role, cases)]
NAMES = [f"{group}: {name}" for group, (_role, cases) in GROUPS.items() for name in cases]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_chain(bench: Bench, witness: Witness, case: Case) -> None:
    ring = bench.rings[case.role]
    put(bench, case)
    before = bench.footprint()
    offer(ring)
    if bench.ours or case.theirs is not None:
        bench.wait_for_index(ring, 1)
        assert ring.take_used() == [(0, 0)]
        assert bench.device.status & Status.NEEDS_RESET == 0
    else:
        await_broken(bench)
        assert ring.used_index == 0
    released = case.released if bench.ours else case.theirs or ()
    assert before - bench.footprint() == len(released) * PAGE
    assert_released(bench, released)
    witness.needs_reset = not bench.ours


def test_each_is_counted_by_its_kind(ours: Bench) -> None:
    """And by no other: the counters grow by what the cases say, after the log has long grown silent."""
    ours.drive()
    before = errors(ours)
    for case in CASES:
        put(ours, case)
        ring = ours.rings[case.role]
        offer(ring)
        ours.wait_for_index(ring, ring.next_available)
    assert errors(ours) - before == Counter(case.kind for case in CASES if case.kind)


def errors(bench: Bench) -> Counter[str]:
    """The errors of the guest that our device has counted by now, by kind.

    Its file may be half a second old: one that has this many more deflated pages is not.
    """
    marked = bench.counters().total("deflated_pages_total") + MARK_PAGES
    assert bench.send(Role.DEFLATE, [Buffer(FREE, MARK_PAGES * PFN_STRUCT.size)]) == 0
    bench.wait_until(
        lambda: bench.counters().total("deflated_pages_total") >= marked, "the counters are not written"
    )
    samples = bench.counters().samples
    return Counter(
        {dict(labels)["kind"]: int(value) for name, labels, value in samples if name == "guest_errors_total"}
    )


def test_numbers_from_all_of_memory(ours: Bench) -> None:
    """65 million in one chain: ours takes the first 16384. QEMU's own takes all, under its big lock: not for a test."""
    ours.drive()
    ours.qtest.write(FREE, pfns(FREE_PAGE + 64))
    ours.fill(FREE + 64 * PAGE, PAGE)
    before = ours.footprint()
    assert ours.send(Role.INFLATE, [Buffer(FREE, RAM_BYTES - FREE)]) == 0
    assert before - ours.footprint() == PAGE
    assert ours.holds(FREE + 64 * PAGE, PAGE, 0)


def test_ten_thousand_kicks(bench: Bench) -> None:
    """For nothing, then for something: each chain comes back once."""
    bench.drive()
    ring = bench.rings[Role.REPORTING]
    witness = Witness(bench)
    for _ in range(10_000):
        ring.notify()
    assert bench.report((FREE, PAGE)) == 0
    assert ring.used_index == 1
    witness.needs_reset = False
    witness.check()
