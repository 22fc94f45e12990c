"""Kernel packages as files: which of them belong together, and all of them unpacked into a tree in the cache.

Up to Linux 6.12 a Debian kernel is one package, as is what `make bindeb-pkg` makes; from 7.x on it is three or four, and
Ubuntu's are two. Whoever names one of them gets the others from beside it, or is told which are missing. No package
manager is asked and nothing is fetched. `guest_images.sources` uses it.
"""

from __future__ import annotations

import glob
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guest_images.errors import KernelError
from guest_images.kernel import KERNEL_PACKAGE
from guest_images.tree import unpack_once
from qmp_glue.debian import Package, UnpackError, cache_root
from qmp_glue.packages import run_tool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

SUFFIX = ".deb"
# Debian from 7.x on: of these three each is nothing without the others, though only the image package depends on all.
PARTS = ("linux-base-", "linux-binary-", "linux-modules-")
SPLIT = re.compile(r"linux-(?:base|binary)-(\d.*)")
# Bytes hashed at once.
CHUNK = 1 << 20


@dataclass(frozen=True)
class PackageFile:
    """A package file: its name and version, and the names of the kernel packages that it cannot be without."""

    path: Path
    name: str
    version: str
    needs: tuple[str, ...]


def read_package(path: Path) -> PackageFile:
    """Read what a package file says of itself. Raises KernelError, and AptMissingError without dpkg-deb."""
    done = run_tool(["dpkg-deb", "--field", str(path), "Package", "Version", "Depends"])
    if done.returncode != 0:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise KernelError(f"{path} is no Debian package ({reason}): give a linux-image-*.deb that is whole")
    fields = dict(re.findall(r"^(\w+): (.*(?:\n .*)*)", done.stdout, re.MULTILINE))
    name = fields.get("Package", "")
    # Of alternatives the first: kernel packages have none among themselves.
    words = [part.split() for part in fields.get("Depends", "").split(",")]
    depends = [word[0] for word in words if word and KERNEL_PACKAGE.match(word[0])]
    split = SPLIT.fullmatch(name)
    parts = [part + split[1] for part in PARTS] if split else []
    return PackageFile(path, name, fields.get("Version", ""), tuple(dict.fromkeys([*depends, *parts])))


def complete(paths: Sequence[Path]) -> tuple[PackageFile, ...]:
    """Return these package files and, from the folders in which they lie, those that they need.

    Raises KernelError for one that is not there, is no package, or is of another version than what belongs to it.
    """
    found: dict[str, PackageFile] = {}
    for given in map(read_package, paths):
        _check_version(given, found.setdefault(given.name, given))
    waiting = list(found.values())
    while waiting:
        one = waiting.pop()
        for name in one.needs:
            if name not in found:
                found[name] = _beside(one, name)
                waiting.append(found[name])
            _check_version(one, found[name])
    return tuple(found.values())


def _check_version(one: PackageFile, other: PackageFile) -> None:
    """Raise KernelError for two files that cannot be of one kernel."""
    if one.version != other.version:
        raise KernelError(
            f"{one.path} has version {one.version} and {other.path} version {other.version}: "
            "give packages of one version"
        )


def _beside(one: PackageFile, name: str) -> PackageFile:
    """Find a package beside another, of its version if there is one; apt and dpkg-deb name files NAME_VERSION_ARCH.deb."""
    places = sorted(one.path.parent.glob(f"{glob.escape(name)}_*{SUFFIX}"))
    packages = [read_package(place) for place in places]
    same = [package for package in packages if package.version == one.version] or packages[:1]
    if not same:
        raise KernelError(
            f"{one.path} is not all of its kernel: put {name}_*{SUFFIX} beside it, or name that as well, "
            "joined by a comma"
        )
    return same[0]


def unpacked(paths: Sequence[Path], *, progress: Callable[[str], None] = lambda _line: None) -> Path:
    """Return the tree that package files, with those that they need, unpack to; once for the same contents.

    Raises KernelError, AptMissingError.
    """
    packages = complete(paths)
    root = cache_root() / "trees" / f"files-{_digest(package.path for package in packages)}"
    if not root.is_dir():
        progress(f"unpacking {', '.join(package.path.name for package in packages)}")
        root.parent.mkdir(parents=True, exist_ok=True)
        try:
            unpack_once([Package(one.name, one.version, one.path) for one in packages], root)
        except UnpackError as error:
            raise KernelError(f"{packages[0].path}: {error}") from error
    return root


def _digest(paths: Iterable[Path]) -> str:
    """Hash contents, whatever the order in which they were named. Raises KernelError."""
    digests = []
    for path in paths:
        try:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise KernelError(f"cannot read {path} ({error.strerror}): give a package file") from error
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]
