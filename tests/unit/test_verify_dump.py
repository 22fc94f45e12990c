"""A dump beside the files of guest RAM: whatever is not as it should be in one of them is found, and named by its address."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from elftools.common.exceptions import ELFError

from balloonlab.measure.ranges import PAGE, Places, in_file
from balloonlab.measure.verify_dump import (
    PIECE,
    Comparison,
    Dump,
    Known,
    check_dump,
    has_no_room,
    read_segments,
)
from guest_images.agent import Pattern
from hostdev.fds import Fd
from hostdev.pages import Span
from qmp_glue.ram import Section, held
from tests.unit.elf_files import HEADER, PROGRAM, PT_LOAD, PT_NOTE

# Two nodes, the second one below a gap; the first is seen in two parts, as below and above the PCI hole.
LOW, HIGH, OTHER = 0x100000, 0x100000000, 0x180000000
SIZE = 2 * PIECE
SECTIONS = [Section(LOW, PIECE, 0, 0), Section(HIGH, PIECE, 0, PIECE), Section(OTHER, SIZE, 1, 0)]
SEED, FILL = 3, 64 * PAGE
CANARY = PIECE + 32 * PAGE


@dataclass
class Machine:
    """Two files of RAM, and guest memory as a dump has it."""

    files: list[int]
    memory: dict[int, bytearray]
    # Of the second node only as much is dumped.
    cut: int = 0

    def paths(self) -> list[Path]:
        return [Path(f"/proc/self/fd/{descriptor}") for descriptor in self.files]

    def compare(self) -> Dump:
        places = Places(SECTIONS)
        data = [span for number, path in enumerate(self.paths()) for span in in_file(number, held(path))]
        with tempfile.TemporaryFile() as dump:
            dump.write(self._elf())
            dump.flush()
            return Comparison(dump, self.paths(), places, data).compare(Known(FILL, SEED))

    def _elf(self) -> bytes:
        """An ELF core as QEMU writes it; one segment is no RAM of ours (a ROM)."""
        parts = {address: bytes(data) for address, data in self.memory.items()} | {0xFFFC0000: b"\xff" * PAGE}
        parts[OTHER] = parts[OTHER][: SIZE - self.cut]
        at = struct.calcsize(HEADER) + (len(parts) + 1) * struct.calcsize(PROGRAM)
        headers = struct.pack(PROGRAM, PT_NOTE, 0, at, 0, 0, 0, 0, 0)
        for address, data in parts.items():
            headers += struct.pack(PROGRAM, PT_LOAD, 0, at, 0, address, len(data), len(data), 0)
            at += len(data)
        start = struct.calcsize(HEADER)
        head = struct.pack(
            HEADER,
            b"\x7fELF\2\1\1".ljust(16, b"\0"),
            4,
            62,
            1,
            0,
            start,
            0,
            0,
            64,
            56,
            len(parts) + 1,
            0,
            0,
            0,
        )
        return head + headers + b"".join(parts.values())


@pytest.fixture
def machine() -> Iterator[Machine]:
    files = [os.memfd_create("ram") for _ in range(2)]
    for descriptor in files:
        os.ftruncate(descriptor, SIZE)
    os.pwrite(files[0], b"kernel" * 1000, 3 * PAGE)
    # Over the border of two pieces that are compared, and seen at two addresses.
    os.pwrite(files[0], b"both" * PAGE, PIECE - 2 * PAGE)
    os.pwrite(files[1], bytes(Pattern(SEED).piece(0, FILL)), CANARY)
    low, other = bytearray(os.pread(files[0], SIZE, 0)), bytearray(os.pread(files[1], SIZE, 0))
    yield Machine(files, {LOW: low[:PIECE], HIGH: low[PIECE:], OTHER: other})
    for descriptor in files:
        os.close(descriptor)


def test_a_dump_that_is_as_it_should_be(machine: Machine) -> None:
    dump = machine.compare()
    data = (2 + 4 + 64) * PAGE
    assert dump == Dump(2 * SIZE - data, data, (), (), (), 64, 0)
    check = check_dump(dump, Places(SECTIONS))
    assert check.outcome == "pass"
    assert check.message.startswith("954 pages (3.7 MiB) were holes, 70 pages (280 KiB) were data")


@pytest.mark.parametrize("at", [LOW + 100 * PAGE + 5, HIGH + 2 * PAGE, OTHER + SIZE - 1])
def test_a_hole_that_is_not_zero_is_found(machine: Machine, at: int) -> None:
    base = max(address for address in machine.memory if address <= at)
    machine.memory[base][at - base] = 1
    dump = machine.compare()
    assert Places(SECTIONS).addresses(dump.not_zero) == [Span(at // PAGE * PAGE, PAGE)]
    assert (dump.different, dump.missing, dump.lost) == ((), (), 0)
    check = check_dump(dump, Places(SECTIONS))
    assert check.outcome == "fail"
    assert (
        f"holes that are not zero in the dump: 1 page (4.0 KiB), the first at guest address {at // PAGE * PAGE:#x};"
        in check.message
    )


@pytest.mark.parametrize("at", [LOW + 3 * PAGE, LOW + PIECE - 1, HIGH])
def test_data_that_is_something_else_is_found(machine: Machine, at: int) -> None:
    base = max(address for address in machine.memory if address <= at)
    machine.memory[base][at - base] ^= 0xFF
    dump = machine.compare()
    assert Places(SECTIONS).addresses(dump.different) == [Span(at // PAGE * PAGE, PAGE)]
    assert (dump.not_zero, dump.missing, dump.lost) == ((), (), 0)
    assert "data that is something else in the dump: 1 page" in check_dump(dump, Places(SECTIONS)).message


def test_memory_that_the_dump_has_not_is_found(machine: Machine) -> None:
    machine.cut = 3 * PAGE
    dump = machine.compare()
    assert Places(SECTIONS).addresses(dump.missing) == [Span(OTHER + SIZE - 3 * PAGE, 3 * PAGE)]
    assert dump.not_zero == ()
    check = check_dump(dump, Places(SECTIONS))
    assert check.outcome == "fail"
    assert "guest RAM that the dump has not: 3 pages" in check.message


@pytest.mark.parametrize("zeroed", [slice(5, 6), slice(0, 64)])
def test_pages_of_known_contents_that_are_nowhere_are_counted(machine: Machine, zeroed: slice) -> None:
    """A page too many released: the file has a hole there, and the guest reads zeroes."""
    start, length = CANARY + zeroed.start * PAGE, (zeroed.stop - zeroed.start) * PAGE
    os.pwrite(machine.files[1], bytes(length), start)
    machine.memory[OTHER][start : start + length] = bytes(length)
    dump = machine.compare()
    assert (dump.lost, dump.known) == (length // PAGE, 64)
    assert (dump.not_zero, dump.different, dump.missing) == ((), (), ())
    assert (
        f"pages with known contents that are nowhere: {length // PAGE} of 64"
        in check_dump(dump, Places(SECTIONS)).message
    )


def test_pages_are_known_wherever_they_are_but_not_where_a_byte_differs() -> None:
    known = Known(FILL, SEED)
    fill = bytes(Pattern(SEED).piece(0, FILL))
    known.look(bytes(PAGE) + fill[5 * PAGE :])
    assert known.lost == 5
    spoilt = bytearray(fill[:PAGE])
    spoilt[-1] ^= 1
    known.look(bytes(spoilt))
    known.look(fill[1:])
    assert known.lost == 5
    assert known.has(memoryview(fill)[:PAGE])
    assert not known.has(memoryview(bytes(PAGE)))


def test_what_is_no_dump_is_an_error() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(100))
        file.flush()
        with pytest.raises(ELFError):
            read_segments(file)


def test_a_dump_that_has_no_room_is_not_made(tmp_path: Path, on_disk: Fd) -> None:
    """More than any machine has; which of the two it lacks depends on where the file is."""
    more = 1 << 60
    with os.fdopen(os.dup(on_disk.fileno()), "r+b") as file:
        assert "1048576 TiB of disk at" in has_no_room(file, tmp_path, more, 0)
        assert "1048576 TiB of memory" in has_no_room(file, tmp_path, PAGE, more)
        assert has_no_room(file, tmp_path, PAGE, PAGE) == ""
    with os.fdopen(os.memfd_create("dump"), "r+b") as file:
        assert "1048576 TiB of memory" in has_no_room(file, tmp_path, more, PAGE)
