"""Puts files of one's own into a guest: a second archive behind its initramfs, in the cache by content.

Linux unpacks archives that follow each other into the same root, a later file over an earlier one
(Documentation/driver-api/early-userspace/buffer-format.rst, checked against 6.12). Modes are kept, owners are root.
`guest_images.build` uses it.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from guest_images import cpio
from guest_images.errors import GuestFileError
from guest_images.files import atomic_file
from guest_images.initramfs import MERGED, MODULES_DIR, write_padded
from guest_images.userland import AGENT_PATH
from qmp_glue.debian import cache_root

# A directory in the place of one of these links would take busybox, Python and their libraries away.
LINKS = {name: "usr/bin" if name == "sbin" else f"usr/{name}" for name in MERGED}
# What makes the guest one of ours.
RESERVED = ("init", AGENT_PATH, f"{MODULES_DIR}/order")
# Where init mounts something over what an archive brings.
MOUNTED = ("dev", "proc", "sys", "mnt")
# What Linux would take away to make room for a file (init/initramfs.c, clean_path).
KEPT = ("usr", *MOUNTED, *LINKS.values())


def with_files(initrd: Path, files: Mapping[str, str]) -> Path:
    """Return the image with files added: path in the guest -> path of a file or a folder here, which is taken whole.

    Raises GuestFileError for one that cannot be read, or may not be there.
    """
    entries = list(members(files))
    place = cache_root() / "images" / f"{initrd.stem}-{_digest(entries)}.cpio"
    if not place.is_file():
        with initrd.open("rb") as base, atomic_file(place) as output:
            shutil.copyfileobj(base, output)
            write_padded(entries, output)
    return place


def digests(files: Mapping[str, str]) -> dict[str, str]:
    """Return for each path in the guest the digest of the file or the folder that comes there, names and modes included.

    Raises GuestFileError as with_files() does.
    """
    return {inside: _digest(members({inside: outside})) for inside, outside in files.items()}


def _digest(entries: Iterable[cpio.Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry.name!r} {entry.mode:o} {len(entry.data)}\0".encode())
        digest.update(entry.data)
    return digest.hexdigest()[:32]


def members(files: Mapping[str, str]) -> Iterator[cpio.Entry]:
    """Read the files and yield them as members, without the directories above them. Raises GuestFileError."""
    for inside, outside in sorted(files.items()):
        if not inside.startswith("/") or ".." in inside.split("/"):
            raise GuestFileError(f"{inside!r} is no place in a guest: give an absolute path without '..'")
        yield from _taken(inside, Path(outside).expanduser())


def _taken(inside: str, outside: Path) -> Iterator[cpio.Entry]:
    """Take a file, which may be named through a link, or all of a folder."""
    try:
        if outside.is_dir():
            yield from _walked(inside, outside)
        else:
            yield _entry(inside, outside, outside.stat())
    except OSError as error:
        _unreadable(error)


def _walked(inside: str, outside: Path) -> Iterator[cpio.Entry]:
    """Yield a folder and all in it, links as they are, each folder before what lies in it."""
    for folder, names, others in os.walk(outside, onerror=_unreadable):
        names.sort()
        there = posixpath.normpath(posixpath.join(inside, Path(folder).relative_to(outside).as_posix()))
        if _name(there):
            yield _entry(there, Path(folder), Path(folder).stat())
        links = [name for name in names if (Path(folder) / name).is_symlink()]
        for name in sorted([*others, *links]):
            place, path = posixpath.join(there, name), Path(folder) / name
            if place.strip("/") not in LINKS:  # a merged /usr, which the guest has
                yield _entry(place, path, path.lstat())


def _unreadable(error: OSError) -> None:
    raise GuestFileError(
        f"cannot read {error.filename} ({error.strerror}): name files for the guest that are there and readable"
    ) from error


def _entry(inside: str, outside: Path, status: os.stat_result) -> cpio.Entry:
    name, mode = _name(inside), status.st_mode
    _check(inside, name)
    if stat.S_ISDIR(mode):
        return cpio.Entry(name, mode)
    if name in KEPT or status.st_size > cpio.MAX_FIELD:
        raise GuestFileError(
            f"{outside} cannot be {inside}, a folder of the guest or a file of 4 GiB and more: leave it out"
        )
    if stat.S_ISLNK(mode):
        return cpio.Entry(name, mode, os.fsencode(outside.readlink()))
    if stat.S_ISREG(mode):
        return cpio.Entry(name, mode, outside.read_bytes())
    raise GuestFileError(f"{outside} is neither a file nor a folder: leave it out of what the guest gets")


def _name(inside: str) -> str:
    """Return an archive member's name: relative, and beyond the links of a merged /usr."""
    name = posixpath.normpath(inside).strip("/")
    name = "" if name == "." else name
    first, slash, rest = name.partition("/")
    return f"{LINKS[first]}{slash}{rest}" if first in LINKS else name


def _check(inside: str, name: str) -> None:
    if name in RESERVED or not name:
        raise GuestFileError(f"{inside} is the guest's own: give the file another place")
    first, slash, _ = name.partition("/")
    if first in MOUNTED and slash:
        raise GuestFileError(
            f"{inside} would not be seen, the guest mounts something there: give it another place"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise GuestFileError(f"{inside!a} is not UTF-8: rename the file") from error
