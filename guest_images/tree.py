"""Debian packages unpacked into a tree of their own, whose programs run on this machine and are copied into guests.

Nothing of the machine's own libraries takes part: a program runs through the tree's own dynamic loader. It is not a
chroot: the program sees the machine's files. `guest_images.userland`, `.kernel` and `.decompress` use it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guest_images.elf import LIBRARY_DIRS
from qmp_glue import debian

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

LOADER = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"


@dataclass(frozen=True)
class Tree:
    """An unpacked tree: its root, and the packages in it as (name, version)."""

    root: Path
    packages: tuple[tuple[str, str], ...]

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

    It is unpacked once for each set of versions, under cache_root()/trees. Raises DebianError.
    """
    archive = debian.Archive(suite, progress=progress)
    packages = tuple(sorted(pair for pair in archive.closure(*names) if keep(pair[0])))
    digest = hashlib.sha256(repr(packages).encode()).hexdigest()[:16]
    root = debian.cache_root() / "trees" / f"{suite}-{digest}"
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        _unpack_once(archive.download(packages), root)
    return Tree(root, packages)


def _unpack_once(packages: Iterable[debian.Package], root: Path) -> None:
    try:
        debian.unpack(packages, root)
    except debian.UnpackError:
        # Another process was faster: unpack renames a whole tree into place, so what is there is complete.
        if not root.is_dir():
            raise
