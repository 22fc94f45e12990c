"""Parts become whole pages of their file, in slices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from hostdev.giver import SLICE_BYTES, whole_pages
from hostdev.memory import Part, Region

MIB = 1 << 20
HUGE = 2 * MIB


def region(page_size: int, file_offset: int, guest_address: int) -> Region:
    size = 1 << 40
    each = SimpleNamespace(
        page_size=page_size, file_offset=file_offset, guest_address=guest_address, size=size
    )
    return cast("Region", each)


@pytest.mark.parametrize(
    ("file_offset", "guest_address", "offset", "expected"),
    [
        (0, 0, 0, [(0, 2 * HUGE)]),
        (MIB, 0, 0, [(MIB, HUGE)]),
        (0, MIB, 0, [(0, 2 * HUGE)]),
        (MIB, MIB, MIB, [(MIB, 2 * HUGE)]),
        (3 * MIB // 2, 0, 0, [(MIB // 2, HUGE)]),
    ],
)
def test_pages_are_whole_in_the_file(
    file_offset: int, guest_address: int, offset: int, expected: list[tuple[int, int]]
) -> None:
    """Huge pages begin where the file says, wherever the guest sees them. In offsets of the region."""
    each = region(HUGE, file_offset, guest_address)
    found = [(part.offset, part.length) for part in whole_pages(Part(each, offset, 2 * HUGE))]
    assert found == expected


def test_slices_are_bounded_and_lose_nothing() -> None:
    each = region(4096, 8 * 4096, 0)
    parts = whole_pages(Part(each, 4096, 3 * SLICE_BYTES))
    assert max(part.length for part in parts) <= SLICE_BYTES
    assert sum(part.length for part in parts) == 3 * SLICE_BYTES
    assert [part.offset for part in parts[1:]] == [part.offset + part.length for part in parts[:-1]]
