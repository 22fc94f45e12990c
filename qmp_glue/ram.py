"""Guest RAM as the host holds it: the files behind it, what of them is held, and where the guest sees it.

It measures and changes nothing. Files are found by what QEMU has open; what a file holds is told by its file system, so
no guest, device or QEMU is asked; where a guest sees it is told by QEMU's own flat view of memory, over QMP. vm.py and
guest tests use it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmp_glue.commandline import MEMORY_ID
from qmp_glue.errors import VmError

__all__ = ["Section", "find_ram_files", "footprint", "held", "parse_flat_view"]

BLOCK_BYTES = 512  # The unit of st_blocks, whatever the file system (stat(2)).
_MEMFD = "memfd:memory-backend-memfd"  # What backends/hostmem-memfd.c names its files (QEMU 11.1).


@dataclass(frozen=True, order=True)
class Section:
    """A range of guest physical bytes that is RAM: ``file`` is the number of its backend, ``offset`` where in it."""

    address: int
    length: int
    file: int
    offset: int

    @property
    def end(self) -> int:
        """The first guest physical address after it."""
        return self.address + self.length


def find_ram_files(pid: int, sizes: Sequence[int]) -> list[Path]:
    """Find the memfds of QEMU's memory backends, as ``/proc/PID/fd/N``, in the order in which it made them.

    sizes: bytes of each, in that order, which is that of their descriptors: nothing is closed between the first and the
    last. Those that came later, such as a plugged module's, are left out. Raises VmError where it has others.
    """
    try:
        found = dict(sorted(_memfds(pid)))
    except OSError as error:
        raise VmError(
            f"descriptors of pid {pid} cannot be listed ({error.strerror}): has QEMU ended?"
        ) from error
    if list(found.values())[: len(sizes)] != list(sizes):
        raise VmError(
            f"pid {pid} has memory-backend-memfds of {list(found.values())} bytes, its machine's guest RAM is of "
            f"{list(sizes)}: give the machine a memory-backend-memfd for each"
        )
    return [Path(f"/proc/{pid}/fd/{number}") for number in list(found)[: len(sizes)]]


def _memfds(pid: int) -> Iterator[tuple[int, int]]:
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # QEMU may close others meanwhile
            if path.readlink().name.startswith(_MEMFD):
                yield int(path.name), path.stat().st_size


def footprint(files: Sequence[Path]) -> int:
    """Return the bytes that the host holds of these files, in memory or swap. Raises OSError."""
    return sum(path.stat().st_blocks for path in files) * BLOCK_BYTES


def held(file: Path) -> list[tuple[int, int]]:
    """Return (offset, length) of what the host holds of a file; the rest are holes. Raises OSError.

    On tmpfs a page is data once it was touched, zeroes included, also while it is swapped out (lseek(2), mm/shmem.c).
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return list(_extents(descriptor))
    finally:
        os.close(descriptor)


def _extents(descriptor: int) -> Iterator[tuple[int, int]]:
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end - start


_VIEW = re.compile(r"^FlatView #\d+$", re.MULTILINE)
_LINE = re.compile(
    rf"^  ([0-9a-f]+)-([0-9a-f]+) \(prio -?\d+, (?:ram|rom)\): {MEMORY_ID}(\d*)(?: @([0-9a-f]+))?(?: KVM)?\s*$",
    re.MULTILINE,
)


def parse_flat_view(text: str) -> list[Section]:
    """Read where guest RAM is from what the monitor's ``info mtree -f`` prints. Raises VmError.

    Pieces that follow on from each other in memory and in their file, as around the BIOS's shadow, are one section.
    """
    views = _VIEW.split("\n".join(text.splitlines()))  # the monitor ends its lines with CR LF
    view = next((part for part in views if ' AS "memory", root: system' in part), "")
    sections: list[Section] = []
    for first, last, number, offset in _LINE.findall(view):
        start = int(first, 16)
        piece = Section(start, int(last, 16) + 1 - start, int(number or 0), int(offset or "0", 16))
        if sections and _follows(sections[-1], piece):
            before = sections.pop()
            piece = Section(before.address, before.length + piece.length, before.file, before.offset)
        sections.append(piece)
    if not sections:
        raise VmError("no guest RAM in QEMU's flat view: give the text that 'info mtree -f' prints")
    return sections


def _follows(before: Section, piece: Section) -> bool:
    continued = (before.end, before.file, before.offset + before.length)
    return continued == (piece.address, piece.file, piece.offset)
