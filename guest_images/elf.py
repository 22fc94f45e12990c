"""Reads what a guest image needs to know of ELF files, with pyelftools.

Three questions: where a `vmlinux` starts in PVH mode, what a kernel module says of itself, and which files a program
needs to run. It is not a loader and resolves no symbols. `guest_images.kernel`, `.modules` and `.userland` use it.
"""

from __future__ import annotations

import struct
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from construct import Int32ul, Int64ul, Select, Struct, Terminated
from elftools.common.exceptions import ELFError
from elftools.construct.core import ConstructError as ElftoolsConstructError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment, NoteSegment

from guest_images.errors import ElfError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

# XEN_ELFNOTE_PHYS32_ENTRY, include/xen/interface/elfnote.h of Linux 6.12: the physical address of the PVH entry.
PVH_NOTE_NAME = "Xen"
PVH_NOTE_TYPE = 18
# Linux writes the address with _ASM_PTR, 8 bytes on x86-64; Xen allows 4 as well.
PVH_ENTRY = Select(
    Struct("address" / Int64ul, Terminated),
    Struct("address" / Int32ul, Terminated),
)

# Where Debian's amd64 packages keep shared libraries, inside an unpacked tree.
LIBRARY_DIRS = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib64", "lib64", "usr/lib", "lib")

# pyelftools checks little of a corrupt file: these are what its code was seen to fall over with.
_CORRUPT = (
    ELFError,
    ElftoolsConstructError,
    struct.error,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
)


@dataclass(frozen=True)
class ModuleInfo:
    """What a kernel module says of itself; names have underscores, as the kernel lists them."""

    name: str
    depends: tuple[str, ...] = ()
    softdep_pre: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


def pvh_entry(file: BinaryIO, name: str) -> int | None:
    """Return the physical address at which a `vmlinux` starts in PVH mode, None if it cannot. Raises ElfError."""
    with _opened(file, name) as elf:
        for segment in elf.iter_segments():
            if isinstance(segment, NoteSegment):
                for note in segment.iter_notes():
                    if (note["n_name"], cast("Any", note["n_type"])) == (PVH_NOTE_NAME, PVH_NOTE_TYPE):
                        return _entry_address(note["n_descdata"], name)
    return None


def _entry_address(descriptor: bytes, name: str) -> int:
    if len(descriptor) not in (Int32ul.sizeof(), Int64ul.sizeof()):
        raise ElfError(
            f"{name}: its PVH note holds {len(descriptor)} bytes, not an address: boot its vmlinuz instead"
        )
    return int(PVH_ENTRY.parse(descriptor).address)


def module_info(file: BinaryIO, name: str) -> ModuleInfo:
    """Return the `.modinfo` of an uncompressed kernel module. Raises ElfError."""
    with _opened(file, name) as elf:
        section = elf.get_section_by_name(".modinfo")
        if section is None:
            raise ElfError(
                f"{name} has no .modinfo section: it is no kernel module, give one built by the kernel"
            )
        strings = section.data().decode().split("\0")
    pairs = [tuple(string.split("=", 1)) for string in strings if "=" in string]
    fields = {key: [value for k, value in pairs if k == key] for key, _ in pairs}
    if not fields.get("name"):
        raise ElfError(
            f"{name}: its .modinfo names no module: it is damaged or older than Linux 4.13, take another"
        )
    return ModuleInfo(
        name=_kernel_name(fields["name"][0]),
        depends=tuple(
            _kernel_name(word) for line in fields.get("depends", []) for word in line.split(",") if word
        ),
        softdep_pre=tuple(_kernel_name(word) for line in fields.get("softdep", []) for word in _pre(line)),
        aliases=tuple(fields.get("alias", [])),
    )


def _kernel_name(word: str) -> str:
    return word.strip().replace("-", "_")


def _pre(softdep: str) -> list[str]:
    """Return the words between "pre:" and "post:" (modprobe.d(5), softdep)."""
    words, wanted = [], False
    for word in softdep.split():
        if word in ("pre:", "post:"):
            wanted = word == "pre:"
        elif wanted:
            words.append(word)
    return words


def runtime_files(root: Path, programs: Iterable[str]) -> list[str]:
    """Return the programs, their interpreters and all libraries they need, as sorted paths below `root`.

    Only DT_NEEDED and PT_INTERP count: what a program opens by name at run time is the caller's to know.
    Raises ElfError for a damaged file or a library that the tree lacks.
    """
    seen: set[str] = set()
    waiting = list(programs)
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += _needed_paths(root, path)
    return sorted(seen)


def _needed_paths(root: Path, path: str) -> list[str]:
    try:
        with (root / path).open("rb") as file:
            interpreter, libraries = needs(file, path)
    except OSError as error:
        raise ElfError(
            f"cannot read {path} below {root} ({error}): unpack its package into this tree"
        ) from error
    paths = [_find_library(root, library, path) for library in libraries]
    if interpreter is not None:
        paths.append(_find_library(root, interpreter.rpartition("/")[2], path))
    return paths


def needs(file: BinaryIO, name: str) -> tuple[str | None, list[str]]:
    """Return an ELF file's PT_INTERP, None if it has none, and its DT_NEEDED names. Raises ElfError."""
    interpreter: str | None = None
    libraries: list[str] = []
    with _opened(file, name) as elf:
        for segment in elf.iter_segments():
            if isinstance(segment, InterpSegment):
                interpreter = segment.get_interp_name()
            elif isinstance(segment, DynamicSegment):
                libraries += [cast("Any", tag).needed for tag in segment.iter_tags("DT_NEEDED")]
    return interpreter, libraries


def _find_library(root: Path, library: str, wanted_by: str) -> str:
    for directory in LIBRARY_DIRS:
        if (root / directory / library).is_file():
            return f"{directory}/{library}"
    raise ElfError(
        f"{wanted_by} needs {library}, which is not below {root}: unpack the package that has it as well"
    )


@contextmanager
def _opened(file: BinaryIO, name: str) -> Iterator[ELFFile]:
    """The one place where pyelftools' many ways to fail on a corrupt file become ElfError."""
    try:
        yield ELFFile(file)
    except _CORRUPT as error:
        reason = f"{type(error).__name__}: {error}".strip(": ")
        raise ElfError(f"{name} is no ELF file or is damaged ({reason}): fetch or build it again") from error
