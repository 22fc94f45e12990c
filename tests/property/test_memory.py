"""Properties of the memory table.

1. split() yields parts in order, each inside its region, and their bytes are exactly the bytes of the range that lie in
   regions.
2. read() returns what was written there, or None if one byte of the range is in a hole.
3. Files, file offsets and front-end addresses make no difference to either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostdev.fds import Fd
from hostdev.memory import MemoryTable
from tests.unit.test_memory import PAGE, memfd, region

PAGES = 24


class Model:
    """A guest whose address space is known byte by byte: 0 for a hole, else the low byte of the page's number + 1."""

    def __init__(self, sizes: list[tuple[int, int, int]]) -> None:
        self.pages = bytearray(PAGES * 2)
        regions, page = [], 0
        for hole, size, offset in sizes:
            page += hole
            if page + size > PAGES:
                break
            fd = memfd((offset + size) * PAGE)
            content = [page + n + 1 for n in range(size)]
            os.pwrite(fd.fileno(), b"".join(bytes([number]) * PAGE for number in content), offset * PAGE)
            self.pages[page : page + size] = bytes(content)
            # Front-end addresses in the opposite order, so that nothing can rely on theirs.
            user = (1000 - 10 * page) * PAGE
            regions.append(region(page * PAGE, size * PAGE, user, offset * PAGE, Fd(os.dup(fd.fileno()))))
            fd.close()
            page += size
        self.table = MemoryTable(regions)

    def expected(self, address: int, length: int) -> bytes:
        first = address // PAGE
        image = b"".join(bytes([value]) * PAGE for value in self.pages[first : first + 5])
        return image[address % PAGE :][:length]

    def close(self) -> None:
        for each in self.table.regions:
            each.close()


MODELS = st.builds(
    Model, st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(0, 3)), max_size=6)
)
RANGES = st.tuples(st.integers(0, PAGES * PAGE), st.integers(0, 4 * PAGE))


@pytest.fixture(scope="module", autouse=True)
def flat_descriptors(nothing_is_left_of_others: None) -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@given(MODELS, RANGES)
def test_split_is_the_part_in_regions(model: Model, wanted: tuple[int, int]) -> None:
    address, length = wanted
    covered: list[int] = []
    for part in model.table.split(address, length):
        assert part.length > 0
        assert 0 <= part.offset <= part.offset + part.length <= part.region.size
        start = part.region.guest_address + part.offset
        covered += range(start, start + part.length)
    inside = [address + n for n, value in enumerate(model.expected(address, length)) if value]
    assert covered == inside
    model.close()


@given(MODELS, RANGES)
def test_read_is_what_was_written(model: Model, wanted: tuple[int, int]) -> None:
    expected = model.expected(*wanted)
    assert model.table.read(*wanted) == (None if 0 in expected else expected)
    model.close()
