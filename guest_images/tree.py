"""Debian packages unpacked into a tree of their own, whose programs run on this machine and are copied into guests.

Nothing of the machine's own libraries takes part: a program runs through the tree's own dynamic loader. It is not a
chroot: the program sees the machine's files. `guest_images.userland`, `.kernel` and `.decompress` use it.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from guest_images.elf import LIBRARY_DIRS
from guest_images.files import write_atomically
from qmp_glue import debian

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

# Packages as (name, version).
Versions: TypeAlias = "tuple[tuple[str, str], ...]"

LOADER = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"


@dataclass(frozen=True)
class Tree:
    """An unpacked tree: its root, and the packages in it as (name, version)."""

    root: Path
    packages: Versions

    def command(self, program: str) -> list[str]:
        """Return the command that runs a program of the tree, given by its path below the root."""
        libraries = ":".join(str(self.root / directory) for directory in LIBRARY_DIRS)
        return [str(self.root / LOADER), "--library-path", libraries, str(self.root / program)]


def package_tree(
    suite: str,
    names: Iterable[str],
    *,
    keep: Callable[[str], bool] = lambda _name: True,
    progress: Callable[[str], None] = lambda _line: None,
) -> Tree:
    """Return the tree of packages and their dependencies as far as `keep` accepts their names.

    It is unpacked once for each set of versions, under cache_root()/trees. What apt makes of the names takes it a second,
    and is asked for again after a day. Raises DebianError.
    """
    wanted = tuple(names)
    record = debian.cache_root() / "trees" / f"{suite}-{_digest(wanted)}.json"
    tree = _tree(suite, _remembered(record), keep)
    if tree.packages and tree.root.is_dir():
        return tree
    archive = debian.Archive(suite, progress=progress)
    closure = tuple(archive.closure(*wanted))
    tree = _tree(suite, closure, keep)
    if not tree.root.is_dir():
        tree.root.parent.mkdir(parents=True, exist_ok=True)
        unpack_once(archive.download(tree.packages), tree.root)
    write_atomically(record, msgspec.json.encode(closure))
    return tree


def _tree(suite: str, closure: Versions, keep: Callable[[str], bool]) -> Tree:
    packages = tuple(sorted(pair for pair in closure if keep(pair[0])))
    return Tree(debian.cache_root() / "trees" / f"{suite}-{_digest(packages)}", packages)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _remembered(record: Path) -> Versions:
    """Return what apt said less than a day ago, nothing otherwise."""
    try:
        if time.time() - record.stat().st_mtime < debian.FRESH_SECONDS:
            return msgspec.json.decode(record.read_bytes(), type=tuple[tuple[str, str], ...])
    except (OSError, msgspec.DecodeError):
        pass
    return ()


def unpack_once(packages: Iterable[debian.Package], root: Path) -> None:
    """Unpack packages to a root that is not there yet, whoever is first. Raises UnpackError and AptMissingError."""
    try:
        debian.unpack(packages, root)
    except debian.UnpackError:
        # Another process was faster: unpack renames a whole tree into place, so what is there is complete.
        if not root.is_dir():
            raise
