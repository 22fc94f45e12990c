"""The fourth proof of --verify: the guest's memory as QEMU sees it is what the files of guest RAM hold, holes as zeroes.

QEMU writes a dump of a paused guest (dump-guest-memory, an ELF core whose PT_LOAD segments are guest physical memory), and
pyelftools reads it. Before, the holes were read. Then byte by byte: what was a hole reads as zeroes in the dump, what was data
is what pread() gets from the file, all of guest RAM is there, and each page of memory with known contents is there as well,
wherever the guest has put it.

What this proves: that QEMU sees the file which was looked at all the time, and no private copy of it, so that what the other
proofs say of the file is true of the guest; and that no page of the known contents was lost. What it does not prove: that a
hole should be one; the other proofs are for that.

The dump reads every page through QEMU's mapping, which fills every hole with a page of zeroes. So nothing is measured after it.
It reads files; it asks neither QEMU nor the guest. verify.py is its user.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from elftools.elf.elffile import ELFFile

from balloonlab.fleet_options import available_bytes
from balloonlab.measure.ranges import FILE_SHIFT, PAGE, Places, counted, intersect, subtract, total
from balloonlab.measure.report import Check
from balloonlab.sizes import human
from guest_images import agent
from hostdev.discard import Backing, backing_of
from hostdev.fds import Fd
from hostdev.pages import Span, merge, slices

NAME = "verify-dump"
# Compared at once: enough for read() to be fast, and little beside a guest.
PIECE = 1 << 20
# Memory and disk that stay free beside a dump: this machine is not ours alone.
SPARE_BYTES = 256 << 20
# By which a page of a fill is looked for; the page is then compared as a whole. SHAKE-256 repeats none by chance.
PREFIX = 16


@dataclass(frozen=True)
class Segment:
    """A part of guest memory in a dump. offset: in the dump."""

    span: Span
    offset: int


@dataclass(frozen=True)
class Dump:
    """A dump compared, in bytes. not_zero, different: places. missing: RAM that the dump has not, as places.

    lost: of the pages with known contents, how many are nowhere.
    """

    holes: int
    data: int
    not_zero: tuple[Span, ...]
    different: tuple[Span, ...]
    missing: tuple[Span, ...]
    known: int
    lost: int


class Known:
    """Pages with known contents, to be found wherever they are: those of a fill that the guest's agent holds."""

    def __init__(self, size: int, seed: int) -> None:
        """size: bytes of the fill, of which the last page may be in part."""
        pattern = agent.Pattern(seed)
        self._pages = {
            bytes(page[:PREFIX]): page
            for offset, length in agent.blocks(size)
            for page in _pages(pattern.piece(offset, length))
        }
        self.pages = len(self._pages)
        self._found: set[bytes] = set()

    def look(self, piece: bytes) -> None:
        """Look for pages of the fill in whole pages of memory."""
        self._found |= {bytes(page[:PREFIX]) for page in _pages(memoryview(piece)) if self.has(page)}

    def has(self, page: memoryview) -> bool:
        """True if this is a page of the fill."""
        expected = self._pages.get(bytes(page[:PREFIX]))
        return expected is not None and expected == page

    @property
    def lost(self) -> int:
        """How many pages have not been found."""
        return self.pages - len(self._found)


def _pages(piece: memoryview) -> Iterator[memoryview]:
    return (piece[at : at + PAGE] for at in range(0, len(piece) - PAGE + 1, PAGE))


def has_no_room(file: IO[bytes], folder: Path, size: int, filled: int) -> str:
    """Say why no dump can go into a file; nothing where it can. Raises OSError.

    folder: where it lies. size: bytes of guest RAM. filled: of these, what are holes now.
    """
    with Fd(os.dup(file.fileno())) as copy:
        on_disk = backing_of(copy) is Backing.FILE
    if on_disk and shutil.disk_usage(folder).free < size + SPARE_BYTES:
        return (
            f"a dump needs {human(size + SPARE_BYTES)} of disk at {folder}: make room, or name another --out"
        )
    wanted = filled + (0 if on_disk else size) + SPARE_BYTES
    if available_bytes() < wanted:
        return f"a dump needs {human(wanted)} of memory, for it fills every hole: take a smaller guest"
    return ""


def read_segments(dump: IO[bytes]) -> list[Segment]:
    """Return the parts of guest memory in an ELF core. Raises elftools' ELFError."""
    return [
        Segment(Span(one["p_paddr"], one["p_filesz"]), one["p_offset"])
        for one in ELFFile(dump).iter_segments("PT_LOAD")
    ]


class Comparison:
    """A dump beside the files of guest RAM."""

    def __init__(self, dump: IO[bytes], files: Sequence[Path], places: Places, held: Sequence[Span]) -> None:
        """held: places that were data before the dump was made."""
        self._dump = dump
        self._files = files
        self._places = places
        self._held = held
        self._segments = read_segments(dump)

    def compare(self, known: Known) -> Dump:
        """Compare every byte. Raises OSError."""
        ram = self._places.all
        dumped = self._places.of(segment.span for segment in self._segments)
        holes, data = subtract(dumped, self._held), intersect(dumped, self._held)
        return Dump(
            holes=total(holes),
            data=total(data),
            not_zero=tuple(merge(self._not_zero(holes))),
            different=tuple(merge(self._different(data, known))),
            missing=tuple(subtract(ram, dumped)),
            known=known.pages,
            lost=known.lost,
        )

    def _not_zero(self, holes: Sequence[Span]) -> Iterator[Span]:
        zeroes = bytes(PIECE)
        for piece in _pieces(holes):
            yield from _differing(piece, self._dumped(piece), zeroes[: piece.length])

    def _different(self, data: Sequence[Span], known: Known) -> Iterator[Span]:
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in self._files]
            for piece in _pieces(data):
                number, offset = piece.start >> FILE_SHIFT, piece.start & ((1 << FILE_SHIFT) - 1)
                dumped = self._dumped(piece)
                known.look(dumped)
                yield from _differing(piece, dumped, os.pread(files[number].fileno(), piece.length, offset))

    def _dumped(self, piece: Span) -> bytes:
        """Return what the dump has of a piece, which may be in several segments."""
        found = bytearray(piece.length)
        for address in self._places.addresses([piece]):
            for segment in self._segments:
                for part in intersect([address], [segment.span]):
                    at = segment.offset + part.start - segment.span.start
                    (place,) = self._places.of([part])
                    start = place.start - piece.start
                    found[start : start + part.length] = os.pread(self._dump.fileno(), part.length, at)
        return bytes(found)


def _pieces(spans: Sequence[Span]) -> Iterator[Span]:
    return (piece for span in spans for piece in slices(span, PIECE))


def _differing(place: Span, found: bytes, expected: bytes) -> Iterator[Span]:
    """Yield the pages that differ."""
    if found == expected:
        return
    for at in range(0, place.length, PAGE):
        if found[at : at + PAGE] != expected[at : at + PAGE]:
            yield Span(place.start + at, min(PAGE, place.length - at))


def check_dump(dump: Dump, places: Places) -> Check:
    """Say what was found."""
    told = f"{counted(dump.holes)} ({human(dump.holes)}) were holes, {counted(dump.data)} ({human(dump.data)}) were data"
    wrong = [
        *_wrong("holes that are not zero in the dump", dump.not_zero, places),
        *_wrong("data that is something else in the dump", dump.different, places),
        *_wrong("guest RAM that the dump has not", dump.missing, places),
    ]
    if dump.lost:
        wrong.append(f"pages with known contents that are nowhere: {dump.lost:,} of {dump.known:,}")
    if wrong:
        return Check(name=NAME, outcome="fail", message="; ".join([*wrong, told]))
    known = f", and all {dump.known:,} pages with known contents are there" if dump.known else ""
    return Check(name=NAME, outcome="pass", message=f"{told}: in the dump as in the file{known}")


def _wrong(what: str, found: Sequence[Span], places: Places) -> Iterator[str]:
    if found:
        yield f"{what}: {places.describe(found)}"
