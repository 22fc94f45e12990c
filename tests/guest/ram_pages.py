"""What the host holds of a paused guest's RAM, page by page with its contents, and what a device's trace named of it.

Neither the guest nor the device is asked what became of a page: that it is held is the file system's word (SEEK_DATA),
what it holds is read from the file, where the guest sees it is QEMU's word. Only what was named is the device's, and that
is what is put to the test. A paused guest touches nothing, so two pictures differ by what happened between them:

1. A page that was held and is not any more was named in between: nothing vanishes that was not released.
2. A page of the freed fill that was named in between does not hold that fill any more: it is a hole, or taken anew and
   written over. Its contents do not occur anywhere else, so a device that names pages and keeps them cannot pass.
3. Each page of the live fill is held; somewhere, for the guest may move it from one node to another, or to make room.
4. What is named are whole pages inside one section of RAM.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from balloonlab.decode import Record, read_trace
from guest_images import agent
from hostdev.wire.trace import Chain, Kind, Release
from qmp_glue.ram import Section, held
from qmp_glue.vm import VirtualMachine

PAGE = 4096


@dataclass(frozen=True)
class Picture:
    """Of a paused guest: sections of RAM, the digest of each page that is held by its guest address, bytes by file.

    records: how many the device's trace had: all that it did before the pause, as QEMU stops the rings then, and no more.
    """

    sections: tuple[Section, ...]
    pages: dict[int, bytes]
    footprints: tuple[int, ...]
    records: int


def digest(page: bytes | memoryview) -> bytes:
    """Return what stands for a page's contents: 16 bytes, so that no two of some millions are equal by chance."""
    return hashlib.blake2b(page, digest_size=16).digest()


async def take_picture(vm: VirtualMachine, trace: Path) -> Picture:
    """Pause the guest, look at its RAM and its device's trace, and let it run on."""
    await vm.stop()
    try:
        sections = tuple(await vm.ram_sections())
        pages: dict[int, bytes] = {}
        for number, file in enumerate(vm.ram_files):
            pages |= _pages_of_file(file, [one for one in sections if one.file == number])
        footprints = tuple(path.stat().st_blocks * 512 for path in vm.ram_files)
        records = len(list(read_trace(trace)))
    finally:
        await vm.cont()
    return Picture(sections, pages, footprints, records)


def _pages_of_file(file: Path, sections: Iterable[Section]) -> dict[int, bytes]:
    extents = held(file)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return {
            section.address + at - section.offset: digest(os.pread(descriptor, PAGE, at))
            for section in sections
            for start, length in extents
            for at in range(
                max(start, section.offset), min(start + length, section.offset + section.length), PAGE
            )
        }
    finally:
        os.close(descriptor)


def pattern_digests(size: int, seed: int) -> frozenset[bytes]:
    """Return the digests of all pages of a fill that the agent holds."""
    pattern = agent.Pattern(seed)
    return frozenset(
        digest(pattern.piece(offset, length)[at : at + PAGE])
        for offset, length in agent.blocks(size)
        for at in range(0, length, PAGE)
    )


# --- the trace ---


def releases(found: Iterable[Record]) -> Iterator[Release]:
    """Yield the ranges that were given back."""
    return (record.value for record in found if record.kind is Kind.RELEASE)


def reporting_rings(found: Iterable[Record], role: int) -> set[int | None]:
    """Return the numbers of the rings whose chains had this role."""
    return {record.ring for record in found if isinstance(record.value, Chain) and record.value.role == role}


def named_pages(ranges: Iterable[Release]) -> set[int]:
    """Return the guest addresses of the pages in ranges."""
    return {page for one in ranges for page in range(one.address, one.address + one.length, PAGE)}


def misplaced(ranges: Iterable[Release], sections: Iterable[Section]) -> list[Release]:
    """Return the ranges that are not whole pages inside one section."""
    places = tuple(sections)
    return [
        one
        for one in ranges
        if one.length <= 0
        or (one.address | one.length) % PAGE
        or not any(part.address <= one.address and one.address + one.length <= part.end for part in places)
    ]


# --- the comparison ---


@dataclass(frozen=True)
class Change:
    """Pages between two pictures, by guest address; the first three lists are defects. live_lost: contents, not places."""

    vanished_unnamed: list[int]
    named_and_kept: list[int]
    live_lost: list[bytes]
    freed_gone: list[int]
    taken_anew: list[int]


def compare(
    before: Picture, after: Picture, named: set[int], *, freed: frozenset[bytes], live: frozenset[bytes]
) -> Change:
    """Compare two pictures; named: pages given back between them; freed and live: digests of two fills."""
    was, now = before.pages, after.pages
    return Change(
        vanished_unnamed=[page for page in was if page not in now and page not in named],
        named_and_kept=[page for page in named if was.get(page) in freed and now.get(page) == was[page]],
        live_lost=sorted(live.difference(now.values())),
        freed_gone=[page for page, contents in was.items() if contents in freed and page not in now],
        taken_anew=[page for page in named if page in now],
    )
