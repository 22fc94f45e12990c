"""QEMU's flat view of memory, as 11.1 prints it, read into sections; and the memfds of a process found and refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from qmp_glue.errors import VmError
from qmp_glue.ram import Section, find_ram_files, footprint, parse_flat_view

MIB = 1 << 20

# Linux has run on it: the BIOS's shadow is RAM as the chipset was told, and an address space comes before "memory".
SHADOWED = """\
FlatView #0
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-000000007fffffff (prio 0, ram): mem

FlatView #1
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #2
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): mem
  00000000000c0000-00000000000c0fff (prio 0, rom): mem @00000000000c0000
  00000000000c1000-000000007fffffff (prio 0, ram): mem @00000000000c1000
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  0000000100000000-00000001bfffffff (prio 0, ram): mem @0000000080000000
"""

NODES = """\
FlatView #0
 AS "memory", root: system
 Root memory region: system
  0000000000000000-00000000000dffff (prio 0, ram): mem0 KVM
  00000000000e0000-00000000000fffff (prio 0, romd): pc.bios
  0000000000100000-000000000fffffff (prio 0, ram): mem0 @0000000000100000 KVM
  0000000010000000-000000001fffffff (prio 0, ram): mem1 KVM
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_pieces_that_follow_on_are_one_section(end: str) -> None:
    assert parse_flat_view(SHADOWED.replace("\n", end)) == [
        Section(0, 2048 * MIB, 0, 0),
        Section(4096 * MIB, 3072 * MIB, 0, 2048 * MIB),
    ]


def test_nodes_are_files_of_their_own() -> None:
    sections = parse_flat_view(NODES)
    assert sections == [
        Section(0, 0xE0000, 0, 0),
        Section(MIB, 255 * MIB, 0, MIB),
        Section(256 * MIB, 256 * MIB, 1, 0),
    ]
    assert sections[0].end == 0xE0000


@pytest.mark.parametrize("text", ["", 'FlatView #0\n AS "memory", root: system\n  No rendered FlatView\n'])
def test_a_text_without_ram_is_refused(text: str) -> None:
    with pytest.raises(VmError, match="info mtree -f"):
        parse_flat_view(text)


@contextlib.contextmanager
def memfds(*sizes: int) -> Iterator[None]:
    """Have this process open memfds as QEMU's backends do."""
    made = [os.memfd_create("memory-backend-memfd") for _ in sizes]
    try:
        for descriptor, size in zip(made, sizes, strict=True):
            os.ftruncate(descriptor, size)
        yield
    finally:
        for descriptor in made:
            os.close(descriptor)


def test_files_come_in_the_order_of_their_descriptors() -> None:
    with memfds(2 * MIB, MIB, MIB):
        files = find_ram_files(os.getpid(), (2 * MIB, MIB))
        assert [path.stat().st_size for path in files] == [2 * MIB, MIB]
        assert sorted(files, key=lambda path: int(path.name)) == files
        assert footprint(files) == 0


@pytest.mark.parametrize("sizes", [(MIB, 2 * MIB), (2 * MIB, MIB, MIB)])
def test_other_sizes_than_the_machines_are_refused(sizes: tuple[int, ...]) -> None:
    with memfds(2 * MIB, MIB), pytest.raises(VmError, match="a memory-backend-memfd for each"):
        find_ram_files(os.getpid(), sizes)


def test_a_process_that_has_ended_is_told() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    with pytest.raises(VmError, match="has QEMU ended"):
        find_ram_files(pid, (MIB,))
