"""Every small ring: the device's queue against what the text of virtio says, case by case.

The oracle below is written from virtio 1.3, 2.7 and from nothing of the device, as plainly as it can be. Of each case both
say which heads are taken, what of each chain is accepted or why it is refused, where the ring breaks, the base, and every
byte of the used ring once all is returned.

1. Size 1: all descriptors (flags, next, address and length) x heads x indices.
2. Size 2: all pairs of descriptors x heads; and all indices, with what is in the available ring, over three tables.
3. Indirect tables of one and two entries, all of them, behind each way to get there.
4. Size 4: all tables over a reduced alphabet x heads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import pytest

from hostdev.errors import ChainError, RingError
from hostdev.fds import Fd
from hostdev.memory import MemoryTable, Region
from hostdev.virtqueue import RingLayout, Virtqueue
from hostdev.wire.vhost_user import MemoryRegion
from hostdev.wire.virtqueue import DESCRIPTOR, Descriptor

NEXT, WRITE, INDIRECT = 1, 2, 4
FLAGS = range(8)
# Guest memory: two pages from 0 on. The ring is in the first, indirect tables are in the second.
END = 0x2000
AVAILABLE, USED, TABLE = 0x100, 0x200, 0x1000
EDGE = END - 16
# Address and length: a table of one and of two entries, one that ends with memory, one that crosses its end, one outside,
# none, one that is not of whole entries, one of more than all others leave room for in 4 GiB.
PLACES = (
    (TABLE, 16),
    (TABLE, 32),
    (EDGE, 16),
    (EDGE, 32),
    (END, 16),
    (TABLE, 0),
    (TABLE, 24),
    (TABLE, 0xFFFFFFF0),
)
BASES = (0, 1, 2, 0x7FFF, 0x8000, 0xFFFD, 0xFFFE, 0xFFFF)
AHEAD = (0, 1, 2, 3, 0x8000, 0xFFFF)
LAST = Descriptor(TABLE, 16, 0, 0)

# What becomes of a chain: its descriptors, or the kind of error.
Outcome = tuple[Descriptor, ...] | str
Taken = list[tuple[int, Outcome]]


# The oracle


def follow(table: Sequence[Descriptor], index: int) -> list[Descriptor] | str:
    """2.7.5: from index on to the first descriptor without NEXT."""
    found: list[Descriptor] = []
    visited = set()
    while index not in visited:
        visited.add(index)
        found.append(table[index])
        if not table[index].flags & NEXT:
            return found
        # 2.7.5.3.1: "A driver MUST NOT set both VIRTQ_DESC_F_INDIRECT and VIRTQ_DESC_F_NEXT in flags."
        if table[index].flags & INDIRECT:
            return "indirect-next"
        index = table[index].next
        if index >= len(table):
            return "next-outside"
    # 2.7.5.2: "Drivers MUST NOT add a descriptor chain longer than 2^32 bytes in total; this implies that loops in the
    # descriptor chain are forbidden!"
    return "loop"


def judge(
    ring: Sequence[Descriptor], head: int, nested: Sequence[Descriptor], *, negotiated: bool
) -> Outcome:
    """What a device is to make of the chain that begins with head. nested: what lies at TABLE; EDGE holds LAST."""
    chain = follow(ring, head)
    if isinstance(chain, str):
        return chain
    if chain[-1].flags & INDIRECT:
        inner = judge_table(chain.pop(), nested, negotiated=negotiated)
        if isinstance(inner, str):
            return inner
        chain += inner
    directions = [bool(entry.flags & WRITE) for entry in chain]
    # 2.7.4.2: "The driver MUST place any device-writable descriptor elements after any device-readable descriptor elements."
    if directions != sorted(directions):
        return "readable-after-writable"
    return "too-long" if sum(entry.length for entry in chain) > 1 << 32 else tuple(chain)


def judge_table(
    entry: Descriptor, nested: Sequence[Descriptor], *, negotiated: bool
) -> list[Descriptor] | str:
    """2.7.5.3: a table of indirect descriptors."""
    if not negotiated:
        return "indirect-not-negotiated"
    if entry.length not in (16, 32):
        return "indirect-length"
    if entry.address + entry.length > END:
        return "indirect-outside"
    table = nested[: entry.length // 16] if entry.address == TABLE else [LAST]
    inner = follow(table, 0)
    if isinstance(inner, list) and inner[-1].flags & INDIRECT:
        return "nested-indirect"
    return inner


class Case(NamedTuple):
    """heads: of the available ring, by place. base: where the device begins in it. used: the used index before."""

    ring: Sequence[Descriptor]
    heads: Sequence[int]
    base: int
    ahead: int
    used: int = 0
    nested: Sequence[Descriptor] = (LAST, LAST)
    negotiated: bool = True


def serve(case: Case) -> tuple[Taken, bool]:
    """Return the chains that a device takes, in order, and whether the ring breaks after the last."""
    taken: Taken = []
    for done in range(case.ahead):
        if case.ahead - done > len(case.ring):
            return taken, True
        head = case.heads[(case.base + done) % len(case.ring)]
        if head >= len(case.ring) or head in [each for each, _outcome in taken]:
            return taken, True
        taken.append((head, judge(case.ring, head, case.nested, negotiated=case.negotiated)))
    return taken, False


# The device


class Bench:
    """Two pages of guest memory, and a queue in them for each case. cases: how many there were."""

    def __init__(self) -> None:
        fd = Fd(os.memfd_create("small-ring", os.MFD_CLOEXEC))
        os.ftruncate(fd.fileno(), END)
        self.region = Region(MemoryRegion(0, END, 0, 0), fd)
        self.memory = MemoryTable([self.region])
        self.bytes = self.region.view(0, END)
        self.bytes[EDGE:END] = DESCRIPTOR.encode(LAST)
        self.cases = 0
        self._encoded: dict[Descriptor, bytes] = {}

    def encoded(self, descriptors: Iterable[Descriptor]) -> bytes:
        return b"".join(map(self._one, descriptors))

    def _one(self, descriptor: Descriptor) -> bytes:
        if descriptor not in self._encoded:
            self._encoded[descriptor] = DESCRIPTOR.encode(descriptor)
        return self._encoded[descriptor]

    def check(self, case: Case) -> None:
        """Have the device serve this ring, and compare with the oracle."""
        self.cases += 1
        size = len(case.ring)
        self._write(case)
        layout = RingLayout(size, 0, AVAILABLE, USED)
        queue = Virtqueue(layout, self.memory, case.base, indirect=case.negotiated)
        expected, breaks = serve(case)
        assert take_all(queue) == (expected, breaks), case
        assert queue.next_available == (case.base + len(expected)) & 0xFFFF, case
        assert (queue.base, queue.outstanding) == (case.base, len(expected)), case
        for head, _outcome in expected:
            queue.put(head, head + 1)
        assert queue.base == (case.base + len(expected)) & 0xFFFF, case
        assert self.bytes[USED : USED + 4 + 8 * size] == used_ring(size, case.used, expected), case
        queue.release()

    def _write(self, case: Case) -> None:
        size, index = len(case.ring), (case.base + case.ahead) & 0xFFFF
        self.bytes[: 16 * size] = self.encoded(case.ring)
        self.bytes[TABLE : TABLE + 32] = self.encoded(case.nested)
        available = b"".join(number.to_bytes(2, "little") for number in (0, index, *case.heads))
        self.bytes[AVAILABLE : AVAILABLE + len(available)] = available
        self.bytes[USED : USED + 4 + 8 * size] = bytes(2) + case.used.to_bytes(2, "little") + bytes(8 * size)

    def close(self) -> None:
        self.bytes.release()
        self.region.close()


def take_all(queue: Virtqueue) -> tuple[Taken, bool]:
    """Take what there is, and tell whether the ring broke."""
    taken: Taken = []
    while True:
        try:
            chain = queue.pop()
        except ChainError as error:
            taken.append((error.head, error.kind))
        except RingError:
            return taken, True
        else:
            if chain is None:
                return taken, False
            taken.append((chain.head, chain.descriptors))


def used_ring(size: int, used: int, taken: Taken) -> bytes:
    """2.7.8: flags, index, and an element for each chain at its place."""
    elements = [bytes(8)] * size
    for number, (head, _outcome) in enumerate(taken):
        elements[(used + number) % size] = head.to_bytes(4, "little") + (head + 1).to_bytes(4, "little")
    index = (used + len(taken)) & 0xFFFF
    return bytes(2) + index.to_bytes(2, "little") + b"".join(elements)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def descriptors(size: int) -> list[Descriptor]:
    """All of the alphabet, for a ring of this size: next may be one past the end."""
    letters = product(PLACES, FLAGS, range(size + 1))
    return [Descriptor(address, length, flags, following) for (address, length), flags, following in letters]


# The cases


def test_all_rings_of_one(bench: Bench) -> None:
    indices = product(BASES, AHEAD, (0, 1, 0xFFFF))
    for base, ahead, used in indices:
        for descriptor, head, negotiated in product(descriptors(1), (0, 1), (True, False)):
            bench.check(Case([descriptor], [head], base, ahead, used, negotiated=negotiated))
    assert bench.cases == 8 * 6 * 3 * 128 * 2 * 2


def test_all_rings_of_two(bench: Bench) -> None:
    """The index wraps between the two. Each order of the heads, one of them alone, and one of them twice."""
    for ring in product(descriptors(2), repeat=2):
        bench.check(Case(ring, (1, 0), 0xFFFF, 2))
        bench.check(Case(ring, (0, 1), 0xFFFF, 2))
        bench.check(Case(ring, (1, 1), 0xFFFF, 2))
    assert bench.cases == 3 * 192**2


def test_all_indices_of_rings_of_two(bench: Bench) -> None:
    tables = (
        (LAST, LAST),
        (Descriptor(TABLE, 16, NEXT, 1), Descriptor(TABLE, 32, INDIRECT, 0)),
        (Descriptor(TABLE, 16, NEXT, 0), Descriptor(TABLE, 16, WRITE | NEXT, 0)),
    )
    heads = list(product(range(3), repeat=2))
    for ring, pair, base, ahead, used in product(tables, heads, BASES, AHEAD, (0, 1, 0xFFFF)):
        bench.check(Case(ring, pair, base, ahead, used))
    assert bench.cases == 3 * 9 * 8 * 6 * 3


def test_all_indirect_tables(bench: Bench) -> None:
    """Behind a descriptor of either direction, alone or after one that is readable or writable, of one or two entries."""
    entries = [Descriptor(TABLE, 16, flags, following) for flags, following in product(FLAGS, range(3))]
    ways = product((None, 0, WRITE), (0, WRITE), (16, 32))
    for (before, flags, length), nested in product(ways, product(entries, repeat=2)):
        table = Descriptor(TABLE, length, INDIRECT | flags, 0)
        if before is None:
            bench.check(Case([table, LAST], (0, 0), 0, 1, nested=nested))
        else:
            bench.check(Case([Descriptor(TABLE, 1, before | NEXT, 1), table], (0, 0), 0, 1, nested=nested))
    assert bench.cases == 3 * 2 * 2 * 24**2


def test_all_rings_of_four(bench: Bench) -> None:
    """Over descriptors that end a chain or go on, to each place inside and one outside; each ring from all of its heads."""
    ends = [Descriptor(TABLE, 16, flags, 0) for flags in (0, WRITE, INDIRECT, INDIRECT | NEXT)]
    outside = Descriptor(END, 16, INDIRECT, 0)
    steps = [Descriptor(TABLE, 16, flags | NEXT, following) for flags in (0, WRITE) for following in range(5)]
    for number, ring in enumerate(product([*ends, outside, *steps], repeat=4)):
        # The first chain at each place of the available ring, and a base that lets the index wrap in each place.
        heads = [(place + number) % 4 for place in range(4)]
        bench.check(Case(ring, heads, (0xFFFC + number // 4) & 0xFFFF, 4))
    assert bench.cases == 15**4
