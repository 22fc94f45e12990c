"""Targets and logical sizes.

Properties, for any guest memory of whole pages and any request:
- the balloon is never larger than the guest's memory, and never more than num_pages can say;
- the logical size that comes of a target is the size asked for, at most one page more, where the memory allows it;
- a request of the whole memory or more is an empty balloon;
- percents grow with the number, 100 is everything;
- a logical size is never negative, whatever the guest says that it holds.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hostdev.target import MAX_PAGES, Target, balloon_pages, logical_size

PAGE = 4096
memories = st.integers(1, 1 << 34).map(lambda pages: pages * PAGE)


@given(memories, st.integers(1, 1 << 50))
def test_sizes(memory: int, size: int) -> None:
    pages = balloon_pages(memory, Target(size=size).bytes_of(memory))
    assert 0 <= pages <= min(MAX_PAGES, memory // PAGE)
    if size >= memory:
        assert pages == 0
    elif pages < MAX_PAGES:
        assert 0 <= logical_size(memory, pages) - size < PAGE


@given(memories, st.integers(1, 99))
def test_percents(memory: int, percent: int) -> None:
    sizes = [Target(percent=each).bytes_of(memory) for each in (percent, percent + 1, 100)]
    assert sizes == sorted(sizes)
    assert sizes[2] == memory
    assert abs(sizes[0] - memory * percent / 100) <= max(1, memory * 1e-12)


@given(memories, st.integers(0, 0xFFFF_FFFF))
def test_what_the_guest_says(memory: int, actual: int) -> None:
    assert 0 <= logical_size(memory, actual) <= memory
