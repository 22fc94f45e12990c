"""Which pages of guest memory a chain names, and so may and must be given back for it: worked out page by page.

Written from virtio 1.3, 5.5.6, and the rule that only whole pages are given back; it uses none of the device's arithmetic.
Not a test; the tests compare the device with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from hostdev.wire.balloon import Role
from hostdev.wire.vhost_user import MemoryRegion
from hostdev.wire.virtqueue import Descriptor
from tests.oracle_rings import WRITE, Read

PAGE = 4096
# Bytes of a list of frame numbers that are looked at.
LIST_LIMIT = 64 << 10
# Of what is read of a statistics buffer, and of a command id.
LIMITS = {Role.INFLATE: LIST_LIMIT, Role.DEFLATE: LIST_LIMIT, Role.STATISTICS: 2560, Role.FREE_PAGE_HINT: 4}


def named(ranges: Iterable[tuple[int, int]], regions: Sequence[MemoryRegion]) -> set[int]:
    """Numbers of the pages of memory all bytes of which are in one of these ranges, or in several together."""
    whole: set[int] = set()
    pieces: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, length in ranges:
        for region in regions:
            first = max(start, region.guest_address)
            end = min(start + length, region.guest_address + region.size)
            if first < end:
                whole.update(range(first // PAGE + 1, (end - 1) // PAGE))
                for page in {first // PAGE, (end - 1) // PAGE}:
                    pieces[page].append((max(first, page * PAGE), min(end, (page + 1) * PAGE)))
    return whole | {page for page, parts in pieces.items() if _cover(sorted(parts), page * PAGE)}


def _cover(parts: list[tuple[int, int]], start: int) -> bool:
    """True if sorted parts leave no byte out of the page that begins at start."""
    position = start
    for first, end in parts:
        if first > position:
            return False
        position = max(position, end)
    return position == start + PAGE


def is_memory(page: int, regions: Iterable[MemoryRegion]) -> bool:
    """True if a page is in a region."""
    return any(region.guest_address <= page * PAGE < region.guest_address + region.size for region in regions)


def gathered(chain: Sequence[Descriptor], read: Read, limit: int) -> bytes | None:
    """The readable bytes of a chain as far as they are looked at, None if one of these is outside memory."""
    data = b""
    for entry in chain:
        wanted = min(entry.length, limit - len(data))
        if not entry.flags & WRITE and wanted > 0:
            piece = read(entry.address, wanted)
            if piece is None:
                return None
            data += piece
    return data


def given_back(
    role: Role | None, chain: Sequence[Descriptor], read: Read, regions: Sequence[MemoryRegion]
) -> set[int] | None:
    """Numbers of the pages that are to be given back for a chain. None if the chain is refused for a buffer outside memory."""
    if role is None:
        return set()
    if role is Role.REPORTING:
        return named(((entry.address, entry.length) for entry in chain if entry.flags & WRITE), regions)
    data = gathered(chain, read, LIMITS[role])
    if data is None:
        return None
    if role is not Role.INFLATE:
        return set()
    frames = {int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data) - 3, 4)}
    return {frame for frame in frames if is_memory(frame, regions)}
