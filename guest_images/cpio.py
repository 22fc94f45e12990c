"""Writes cpio archives in the newc format, as the kernel reads them for its initramfs.

It is not a reader and not a tar: only what an initramfs needs (directories, files, symbolic links, device nodes), and
the same entries give the same bytes on every machine. `guest_images.initramfs` uses it.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of the Linux tree (checked against 6.12).
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from construct import Bytes, Const, ExprAdapter, Struct

if TYPE_CHECKING:
    from collections.abc import Iterable

ALIGNMENT = 4
TRAILER = "TRAILER!!!"
MAX_FIELD = 0xFFFFFFFF

Hexadecimal: ExprAdapter[Any, Any, Any, Any] = ExprAdapter(
    Bytes(8),
    decoder=lambda digits, _: int(digits, 16),
    encoder=lambda number, _: b"%08X" % number,
)

HEADER = Struct(
    "magic" / Const(b"070701"),
    "ino" / Hexadecimal,
    "mode" / Hexadecimal,
    "uid" / Hexadecimal,
    "gid" / Hexadecimal,
    "nlink" / Hexadecimal,
    "mtime" / Hexadecimal,
    "filesize" / Hexadecimal,
    "devmajor" / Hexadecimal,
    "devminor" / Hexadecimal,
    "rdevmajor" / Hexadecimal,
    "rdevminor" / Hexadecimal,
    "namesize" / Hexadecimal,
    "check" / Hexadecimal,
)


class CpioError(ValueError):
    """An entry that the newc format cannot hold."""


@dataclass(frozen=True)
class Entry:
    """One member: `name` without a leading slash, `mode` with its file type, `data` a file's bytes or a link's target."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> Entry:
    """Return a directory, mode 0755."""
    return Entry(name, stat.S_IFDIR | 0o755)


def file(name: str, data: bytes, *, executable: bool = False) -> Entry:
    """Return a regular file, mode 0644 or 0755."""
    return Entry(name, stat.S_IFREG | (0o755 if executable else 0o644), data)


def symlink(name: str, target: str) -> Entry:
    """Return a symbolic link."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int) -> Entry:
    """Return a character device node, mode 0600."""
    return Entry(name, stat.S_IFCHR | 0o600, device=(major, minor))


def write(entries: Iterable[Entry], output: BinaryIO) -> None:
    """Write an archive: inode numbers count from 1, times and owners are 0, parents must come before their children.

    Raises CpioError for an entry that the format cannot hold.
    """
    for number, entry in enumerate(entries, start=1):
        _check(entry)
        output.write(_member(number, entry))
    output.write(_member(0, Entry(TRAILER, 0)))


def _check(entry: Entry) -> None:
    relative = entry.name and not entry.name.startswith("/") and "\0" not in entry.name
    if not relative or entry.name == TRAILER:
        raise CpioError(f"{entry.name!r} is no name for an archive member: give a relative path")
    if len(entry.data) > MAX_FIELD:
        raise CpioError(f"{entry.name} has {len(entry.data)} bytes, newc holds {MAX_FIELD}: leave it out")


def _member(number: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    fields = dict.fromkeys(("uid", "gid", "mtime", "devmajor", "devminor", "check"), 0)
    fields |= {
        "ino": number,
        "mode": entry.mode,
        "nlink": 1,
        "filesize": len(entry.data),
        "namesize": len(name),
    }
    fields |= {"rdevmajor": entry.device[0], "rdevminor": entry.device[1]}
    return _padded(HEADER.build(fields) + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
