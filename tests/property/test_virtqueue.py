"""Properties of the device side of a split ring.

1. Whatever bytes are in the descriptor table, the rings and the indirect tables, pop() returns a chain, returns None or
   raises ChainError or RingError; it ends within the ring's size plus one indirect table.
2. A chain that it returns obeys the rules: readable before writable, at most 2^32 bytes, nothing indirect left.
3. Each popped head is outstanding until it is put back; base counts back by those that are outstanding.
4. A driver that keeps the rules gets each of its chains back once, in order, whatever sizes and index it begins with.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostdev.driver import Buffer
from hostdev.errors import ChainError, RingError
from hostdev.virtqueue import MAX_INDIRECT
from hostdev.wire.virtqueue import DESCRIPTOR, Descriptor
from tests.unit.test_virtqueue import DATA_AT, INDIRECT, TABLE_AT, Bench

SIZE = 8
# Small numbers where small numbers matter, so that chains, tables and loops really form.
DESCRIPTORS = st.builds(
    Descriptor,
    st.one_of(st.sampled_from([TABLE_AT, TABLE_AT + 16, DATA_AT]), st.integers(0, 2**64 - 1)),
    st.one_of(st.sampled_from([16, 32, 64]), st.integers(0, 2**32 - 1)),
    st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)),
)
TABLES = st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(SIZE)
    yield bench
    bench.close()


@given(TABLES, TABLES, st.lists(st.integers(0, SIZE), max_size=SIZE), st.booleans())
def test_any_table(
    bench: Bench, table: list[Descriptor], nested: list[Descriptor], heads: list[int], indirect: bool
) -> None:
    bench.memory.write(bench.driver.descriptors, b"".join(map(DESCRIPTOR.encode, table)))
    bench.table_of(*nested)
    queue, start = bench.open(bench.driver.next_available, indirect=indirect), bench.driver.next_available
    for head in heads:
        bench.driver.publish(head)
    outstanding: list[int] = []
    for head in heads:
        try:
            chain = queue.pop()
        except ChainError as error:
            returned = error.head
        except RingError:
            assert head == SIZE or head in outstanding
            break
        else:
            assert chain is not None
            returned = chain.head
            _assert_lawful(chain.descriptors)
        assert returned == head
        outstanding.append(head)
        assert queue.base == start
    for position, head in enumerate(outstanding):
        queue.put(head)
        assert queue.base == (start + position + 1) & 0xFFFF
    queue.release()


def _assert_lawful(chain: tuple[Descriptor, ...]) -> None:
    writable = [entry.is_writable for entry in chain]
    assert writable == sorted(writable)
    assert sum(entry.length for entry in chain) <= 1 << 32
    assert not any(entry.flags & INDIRECT for entry in chain)
    assert 1 <= len(chain) <= SIZE + MAX_INDIRECT


@given(
    st.sampled_from([1, 2, 4, 8, 16]),
    st.integers(0, 0xFFFF),
    st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=30),
)
def test_an_honest_driver(size: int, base: int, chains: list[tuple[int, bool]]) -> None:
    bench = Bench(size, base)
    waiting: list[int] = []
    returned: list[int] = []
    for length, indirect in chains:
        buffers = [Buffer(DATA_AT + n, n + 1) for n in range(length if indirect else min(length, size))]
        if len(bench.driver._free) < (1 if indirect else len(buffers)):
            while (chain := bench.queue.pop()) is not None:
                bench.queue.put(chain.head)
            returned += [head for head, _length in bench.driver.take_used()]
        waiting.append(bench.driver.add(buffers, indirect=indirect))
    while (chain := bench.queue.pop()) is not None:
        bench.queue.put(chain.head)
    returned += [head for head, _length in bench.driver.take_used()]
    assert returned == waiting
    bench.close()
