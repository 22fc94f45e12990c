"""Every small ring: the device's queue against what the text of virtio says, case by case.

The oracle is in oracle_rings.py. Of each case both say which heads are taken, what of each chain is accepted or why it is refused, where the ring breaks, the base, and every
byte of the used ring once all is returned.

1. Size 1: all descriptors (flags, next, address and length) x heads x indices.
2. Size 2: all pairs of descriptors x heads; and all indices, with what is in the available ring, over three tables.
3. Indirect tables of one and two entries, all of them, behind each way to get there.
4. Size 4: all tables over a reduced alphabet x heads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import pytest

from hostdev.errors import ChainError, RingError
from hostdev.fds import Fd
from hostdev.memory import MemoryTable, Region
from hostdev.virtqueue import RingLayout, Virtqueue
from hostdev.wire.vhost_user import MemoryRegion
from hostdev.wire.virtqueue import DESCRIPTOR, Descriptor
from tests.oracle_rings import INDIRECT, NEXT, WRITE, Outcome, judge

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

Taken = list[tuple[int, Outcome]]


# The oracle


@lru_cache(maxsize=4096)
def _encoded(descriptor: Descriptor) -> bytes:
    return DESCRIPTOR.encode(descriptor)


def encoded(descriptors: Iterable[Descriptor]) -> bytes:
    return b"".join(map(_encoded, descriptors))


class Case(NamedTuple):
    """heads: of the available ring, by place. base: where the device begins in it. used: the used index before."""

    ring: Sequence[Descriptor]
    heads: Sequence[int]
    base: int
    ahead: int
    used: int = 0
    nested: Sequence[Descriptor] = (LAST, LAST)
    negotiated: bool = True

    def read(self, address: int, length: int) -> bytes | None:
        """Guest memory, as far as tables lie in it."""
        if address + length > END:
            return None
        return encoded(self.nested if address == TABLE else [LAST])[:length]


def serve(case: Case) -> tuple[Taken, bool]:
    """Return the chains that a device takes, in order, and whether the ring breaks after the last."""
    taken: Taken = []
    for done in range(case.ahead):
        if case.ahead - done > len(case.ring):
            return taken, True
        head = case.heads[(case.base + done) % len(case.ring)]
        if head >= len(case.ring) or head in [each for each, _outcome in taken]:
            return taken, True
        taken.append((head, judge(case.ring, head, case.read, negotiated=case.negotiated)))
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
        self.bytes[: 16 * size] = encoded(case.ring)
        self.bytes[TABLE : TABLE + 32] = encoded(case.nested)
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
