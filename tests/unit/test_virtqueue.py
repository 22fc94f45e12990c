"""The device side of a split ring: chains that are followed, chains that are refused, rings that break."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence

import pytest

from hostdev.driver import Buffer, DriverRing, GuestMemory
from hostdev.errors import ChainError, RequestError, RingError
from hostdev.fds import Fd
from hostdev.memory import MemoryTable, Region
from hostdev.virtqueue import MAX_INDIRECT, RingLayout, Virtqueue
from hostdev.wire.virtqueue import DESCRIPTOR, Descriptor
from tests.stepping import at_each_line

NEXT, WRITE, INDIRECT = 1, 2, 4
RING_AT, TABLE_AT, DATA_AT = 0x10000, 0x80000, 0x40000


class Bench:
    """One ring between a driver and a device, in one process."""

    def __init__(self, size: int = 8, base: int = 0, *, indirect: bool = True) -> None:
        self.memory = GuestMemory(1 << 20)
        self.table = MemoryTable([Region(self.memory.regions[0], Fd(os.dup(self.memory.fd.fileno())))])
        self.driver = DriverRing(self.memory, 0, size, RING_AT)
        self.driver.next_available = base
        self.driver.set_available_index(base)
        self.memory.write(self.driver.used + 2, struct.pack("<H", base))
        self.driver._seen = base
        self.queue = self.open(base, indirect=indirect)

    def open(self, base: int, *, indirect: bool = True) -> Virtqueue:
        address = self.memory.user_address
        layout = RingLayout(
            self.driver.size,
            address(self.driver.descriptors),
            address(self.driver.available),
            address(self.driver.used),
        )
        return Virtqueue(layout, self.table, base, indirect=indirect)

    def table_of(self, *descriptors: Descriptor, at: int = TABLE_AT) -> None:
        self.memory.write(at, b"".join(DESCRIPTOR.encode(each) for each in descriptors))

    def offer(self, *descriptors: Descriptor) -> None:
        """Write the ring's table from entry 0 on and offer head 0."""
        self.table_of(*descriptors, at=self.driver.descriptors)
        self.driver.publish(0)

    def close(self) -> None:
        self.queue.release()
        for region in self.table.regions:
            region.close()
        self.driver.close()
        self.memory.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def readable(length: int = 8, flags: int = 0, following: int = 0) -> Descriptor:
    return Descriptor(DATA_AT, length, flags, following)


# Every small ring, around both ends of the index.


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("base", [0, 1, 3, 0x7FFF, 0x8000, 0xFFFC, 0xFFFD, 0xFFFE, 0xFFFF])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_small_rings(size: int, base: int, count: int) -> None:
    """Filled with count chains again and again: each is popped once, in order, and comes back with its length."""
    bench = Bench(size, base)
    count = min(count, size)
    for turn in range(2 * size + 3):
        heads = [bench.driver.add([Buffer(DATA_AT + turn, 1 + n)]) for n in range(count)]
        chains = []
        while (chain := bench.queue.pop()) is not None:
            chains.append(chain)
        assert [chain.head for chain in chains] == heads
        assert [chain.descriptors[0].length for chain in chains] == [1 + n for n in range(count)]
        assert bench.queue.base == (base + turn * count) & 0xFFFF
        for chain in chains:
            bench.queue.put(chain.head, 7 + chain.head)
        assert bench.driver.take_used() == [(head, 7 + head) for head in heads]
        assert bench.queue.base == (base + (turn + 1) * count) & 0xFFFF == bench.driver.used_index
    bench.close()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("base", [0, 3, 0xFFFF])
def test_every_available_index(size: int, base: int) -> None:
    """0 ahead is idle, up to size is work, everything beyond breaks the ring."""
    bench = Bench(size, base)
    for ahead in (*range(size + 2), 0x7FFF, 0x8000, 0xFFFF):
        queue = bench.open(base)
        bench.driver.set_available_index((base + ahead) & 0xFFFF)
        if ahead == 0:
            assert queue.pop() is None
        elif ahead <= size:
            assert queue.pop() is not None
        else:
            with pytest.raises(RingError):
                queue.pop()
            assert queue.base == base
        queue.release()
    bench.close()


def test_base_counts_back_over_what_was_not_returned(bench: Bench) -> None:
    heads = [bench.driver.add([Buffer(DATA_AT, 8)]) for _ in range(3)]
    for _ in heads:
        bench.queue.pop()
    assert bench.queue.base == 0
    bench.queue.put(heads[0])
    assert bench.queue.base == 1
    bench.queue.release()
    bench.queue = bench.open(1)
    again = [bench.queue.pop(), bench.queue.pop()]
    assert [chain.head for chain in again if chain] == heads[1:]
    assert bench.queue.pop() is None


def test_base_counts_back_over_the_wrap() -> None:
    bench = Bench(4, 0xFFFF)
    for _ in range(3):
        bench.driver.add([Buffer(DATA_AT, 8)])
        bench.queue.pop()
    assert bench.queue.base == 0xFFFF
    bench.close()


def test_head_outside_the_ring(bench: Bench) -> None:
    for head in (8, 9, 0xFFFF):
        bench.driver.publish(head)
        with pytest.raises(RingError, match=f"head {head}"):
            bench.queue.pop()
        bench.queue.release()
        bench.queue = bench.open(bench.driver.next_available)


def test_same_head_twice(bench: Bench) -> None:
    bench.offer(readable())
    bench.driver.publish(0)
    assert bench.queue.pop() is not None
    with pytest.raises(RingError, match="again"):
        bench.queue.pop()


def test_same_head_again_after_its_return(bench: Bench) -> None:
    for _ in range(20):
        bench.offer(readable())
        chain = bench.queue.pop()
        assert chain is not None
        bench.queue.put(chain.head)


# Chains


def test_a_chain_in_order(bench: Bench) -> None:
    buffers = [Buffer(DATA_AT, 1), Buffer(DATA_AT + 64, 2), Buffer(DATA_AT + 128, 3, writable=True)]
    for indirect in (False, True):
        head = bench.driver.add(buffers, indirect=indirect)
        chain = bench.queue.pop()
        assert chain is not None
        assert chain.head == head
        seen = [Buffer(each.address, each.length, each.is_writable) for each in chain.descriptors]
        assert seen == buffers


REFUSED: dict[str, tuple[str, Sequence[Descriptor]]] = {
    "to itself": ("loop", [readable(flags=NEXT, following=0)]),
    "two in a circle": ("loop", [readable(flags=NEXT, following=1), readable(flags=NEXT, following=0)]),
    "next is size": ("next-outside", [readable(flags=NEXT, following=8)]),
    "next is 65535": ("next-outside", [readable(flags=NEXT, following=0xFFFF)]),
    "readable after writable": (
        "readable-after-writable",
        [readable(flags=NEXT | WRITE, following=1), readable()],
    ),
    "2^32 + 1 bytes": (
        "too-long",
        [readable(0xFFFFFFFF, NEXT, 1), readable(2)],
    ),
    "indirect with a successor": (
        "indirect-next",
        [Descriptor(TABLE_AT, 16, INDIRECT | NEXT, 1), readable()],
    ),
    "indirect of no bytes": ("indirect-length", [Descriptor(TABLE_AT, 0, INDIRECT, 0)]),
    "indirect of 15 bytes": ("indirect-length", [Descriptor(TABLE_AT, 15, INDIRECT, 0)]),
    "indirect of 24 bytes": ("indirect-length", [Descriptor(TABLE_AT, 24, INDIRECT, 0)]),
    "indirect too long": (
        "indirect-length",
        [Descriptor(TABLE_AT, 16 * (MAX_INDIRECT + 1), INDIRECT, 0)],
    ),
    "indirect of 2^32 - 16 bytes": ("indirect-length", [Descriptor(TABLE_AT, 0xFFFFFFF0, INDIRECT, 0)]),
    "indirect outside memory": ("indirect-outside", [Descriptor(1 << 40, 16, INDIRECT, 0)]),
    "indirect half outside memory": ("indirect-outside", [Descriptor((1 << 20) - 16, 32, INDIRECT, 0)]),
    "indirect at the end of the address space": (
        "indirect-outside",
        [Descriptor((1 << 64) - 16, 32, INDIRECT, 0)],
    ),
}


@pytest.mark.parametrize(("kind", "table"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_chains(bench: Bench, kind: str, table: Sequence[Descriptor]) -> None:
    """A refused chain counts as popped, is put back by its head, and the next one is served."""
    bench.offer(*table)
    with pytest.raises(ChainError) as caught:
        bench.queue.pop()
    assert (caught.value.head, caught.value.kind) == (0, kind)
    bench.queue.put(caught.value.head)
    assert bench.queue.base == 1
    bench.offer(readable())
    assert bench.queue.pop() is not None


def test_a_chain_of_exactly_two_to_the_32_bytes(bench: Bench) -> None:
    bench.offer(readable(0xFFFFFFFF, NEXT, 1), readable(1))
    chain = bench.queue.pop()
    assert chain is not None
    assert sum(each.length for each in chain.descriptors) == 1 << 32


def test_a_chain_as_long_as_the_ring(bench: Bench) -> None:
    bench.offer(*[readable(flags=NEXT if n < 7 else 0, following=n + 1) for n in range(8)])
    chain = bench.queue.pop()
    assert chain is not None
    assert len(chain.descriptors) == 8


def test_indirect_without_the_feature() -> None:
    bench = Bench(indirect=False)
    bench.table_of(readable())
    bench.offer(Descriptor(TABLE_AT, 16, INDIRECT, 0))
    with pytest.raises(ChainError) as caught:
        bench.queue.pop()
    assert caught.value.kind == "indirect-not-negotiated"
    bench.close()


def test_nested_indirect(bench: Bench) -> None:
    bench.table_of(Descriptor(TABLE_AT + 64, 16, INDIRECT, 0))
    bench.offer(Descriptor(TABLE_AT, 16, INDIRECT, 0))
    with pytest.raises(ChainError) as caught:
        bench.queue.pop()
    assert caught.value.kind == "nested-indirect"


def test_loop_and_next_outside_in_an_indirect_table(bench: Bench) -> None:
    for following, kind in ((0, "loop"), (2, "next-outside")):
        bench.table_of(readable(flags=NEXT, following=1), readable(flags=NEXT, following=following))
        bench.offer(Descriptor(TABLE_AT, 32, INDIRECT, 0))
        with pytest.raises(ChainError) as caught:
            bench.queue.pop()
        assert caught.value.kind == kind
        bench.queue.put(0)


def test_indirect_at_the_end_of_a_chain(bench: Bench) -> None:
    """virtio 1.3, 2.7.5.3.2: the device MUST handle normal descriptors followed by one that is indirect."""
    bench.table_of(readable(3, NEXT, 1), readable(4, WRITE))
    bench.offer(readable(1, NEXT, 1), readable(2, NEXT, 2), Descriptor(TABLE_AT, 32, INDIRECT, 0))
    chain = bench.queue.pop()
    assert chain is not None
    assert [each.length for each in chain.descriptors] == [1, 2, 3, 4]


def test_direction_is_checked_across_an_indirect_table(bench: Bench) -> None:
    bench.table_of(readable())
    bench.offer(readable(1, NEXT | WRITE, 1), Descriptor(TABLE_AT, 16, INDIRECT, 0))
    with pytest.raises(ChainError) as caught:
        bench.queue.pop()
    assert caught.value.kind == "readable-after-writable"


def test_the_copy_is_used_not_the_original(bench: Bench) -> None:
    """What a popped chain says does not follow what the guest writes into its table afterwards."""
    for indirect in (False, True):
        head = bench.driver.add([Buffer(DATA_AT, 8), Buffer(DATA_AT, 9)], indirect=indirect)
        chain = bench.queue.pop()
        assert chain is not None
        bench.memory.write(bench.driver.descriptors, b"\xff" * 16 * 8)
        bench.memory.write(bench.driver._tables, b"\xff" * 1024)
        assert [each.length for each in chain.descriptors] == [8, 9]
        bench.queue.put(head)


class _ChangingTable:
    """A MemoryTable whose indirect tables are different at every read, as with a guest that rewrites them."""

    def __init__(self, table: MemoryTable, *contents: bytes) -> None:
        self._table = table
        self.contents = list(contents)

    def view(self, user_address: int, length: int) -> memoryview:
        return self._table.view(user_address, length)

    def read(self, _address: int, _length: int) -> bytes:
        return self.contents.pop(0)


def test_an_indirect_table_is_read_once(bench: Bench) -> None:
    good, bad = DESCRIPTOR.encode(readable(5)), DESCRIPTOR.encode(readable(6, INDIRECT))
    changing = _ChangingTable(bench.table, good, bad)
    bench.queue._memory = changing  # type: ignore[assignment]
    bench.offer(Descriptor(TABLE_AT, 16, INDIRECT, 0))
    chain = bench.queue.pop()
    assert chain is not None
    assert chain.descriptors[0].length == 5
    assert changing.contents == [bad]


# Where a ring may be


@pytest.mark.parametrize("size", [0, 3, 65536, 32769, 2**31, 2**32 - 1])
def test_impossible_sizes(bench: Bench, size: int) -> None:
    address = bench.memory.user_address(RING_AT)
    with pytest.raises(RequestError, match="power of two"):
        Virtqueue(RingLayout(size, address, address, address), bench.table, 0, indirect=True)


@pytest.mark.parametrize("part", ["descriptor", "available", "used"])
@pytest.mark.parametrize("wrong", ["unaligned", "outside", "over the end", "top of the address space"])
def test_impossible_addresses(bench: Bench, part: str, wrong: str) -> None:
    address = bench.memory.user_address
    addresses = dict.fromkeys(("descriptor", "available", "used"), address(RING_AT))
    end = address((1 << 20) - 16) + 16
    places = {
        "unaligned": address(RING_AT) + 1,
        "outside": address(0) - 4096,
        "over the end": end - 16,
        "top of the address space": (1 << 64) - 16,
    }
    addresses[part] = places[wrong]
    with pytest.raises(RequestError):
        Virtqueue(RingLayout(128, **addresses), bench.table, 0, indirect=True)


def test_a_ring_that_cannot_be_leaves_its_region_to_be_unmapped(bench: Bench) -> None:
    """Also while somebody has the error in hand, and with it the frames in which the views were made."""
    bench.queue.release()
    address = bench.memory.user_address(RING_AT)
    with pytest.raises(RequestError, match="no memory region") as caught:
        Virtqueue(RingLayout(8, address, address, 0), bench.table, 0, indirect=True)
    for region in bench.table.regions:
        region.close()
    assert "no memory region" in str(caught.value)


def test_a_ring_at_the_very_end(bench: Bench) -> None:
    end = bench.memory.user_address((1 << 20) - 16) + 16
    address = bench.memory.user_address(RING_AT)
    layout = RingLayout(8, end - 128, address, address + 64)
    queue = Virtqueue(layout, bench.table, 0, indirect=True)
    assert queue.pop() is None
    queue.release()


def test_a_released_ring_lets_its_region_be_unmapped() -> None:
    bench = Bench()
    bench.queue.release()
    for region in bench.table.regions:
        region.close()
    assert all(region.mapping.closed for region in bench.table.regions)
    bench.close()


def test_what_is_published_is_written(bench: Bench) -> None:
    """Before each line that returns a chain: a driver may look at any moment, and the index says what it finds."""
    seen: list[tuple[int, int]] = []
    stale = struct.pack("<II", 77, 77)

    def look() -> None:
        index = bench.driver.used_index
        element = bench.memory.read(bench.driver.used + 4 + 8 * ((index - 1) % 8), 8)
        seen.append((index, struct.unpack("<II", element)[0]))

    for number in range(12):
        bench.memory.write(bench.driver.used + 4 + 8 * (number % 8), stale)
        head = bench.driver.add([Buffer(DATA_AT, 8)])
        assert bench.queue.take() == head
        seen.clear()
        with at_each_line(Virtqueue.put, look):
            bench.queue.put(head)
        assert [index for index, _head in seen].count(number) > 2
        assert seen[-1][0] == number + 1
        assert {found for index, found in seen if index == number + 1} == {head}
        bench.driver.take_used()
