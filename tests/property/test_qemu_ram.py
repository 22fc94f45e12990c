"""Properties of what is said to be held of a RAM file, with a real memfd.

1. After any pages were written and any given back, exactly those that were written last are held, zeroes included.
2. The footprint is the sum of what is held.
3. Extents are in order, whole pages, and no two touch.
"""

from __future__ import annotations

import mmap
import os
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from qmp_glue.ram import footprint, held

PAGE = mmap.PAGESIZE
PAGES = 64

acts = st.lists(st.tuples(st.sampled_from(["write", "zero", "free"]), st.integers(0, PAGES - 1)), max_size=80)


@given(acts)
def test_what_was_written_last_is_held(done: list[tuple[str, int]]) -> None:
    descriptor = os.memfd_create("ram")
    try:
        os.ftruncate(descriptor, PAGES * PAGE)
        expected: set[int] = set()
        with mmap.mmap(descriptor, PAGES * PAGE) as mapping:
            for act, page in done:
                if act == "free":
                    mapping.madvise(mmap.MADV_REMOVE, page * PAGE, PAGE)
                    expected.discard(page)
                else:
                    mapping[page * PAGE] = act == "write"
                    expected.add(page)
        file = Path(f"/proc/self/fd/{descriptor}")
        extents = held(file)
        assert {
            page for start, length in extents for page in range(start // PAGE, (start + length) // PAGE)
        } == expected
        assert footprint([file]) == sum(length for _, length in extents)
        assert all(length > 0 and start % PAGE == 0 and length % PAGE == 0 for start, length in extents)
        assert all(start + length < following for (start, length), (following, _) in pairwise(extents))
    finally:
        os.close(descriptor)
