"""Builds tiny ELF files for tests: 64-bit, little-endian, with just the parts that are asked for."""

from __future__ import annotations

import struct

HEADER = "<16sHHIQQQIHHHHHH"
PROGRAM = "<IIQQQQQQ"
SECTION = "<IIQQQQIIQQ"
PT_DYNAMIC, PT_INTERP, PT_NOTE, PT_LOAD = 2, 3, 4, 1
DT_NULL, DT_NEEDED, DT_STRTAB, DT_STRSZ = 0, 1, 5, 10


def _elf(segments: list[tuple[int, bytes]], sections: list[tuple[str, bytes]]) -> bytes:
    """Lay out segments and sections one after the other; file offsets are also addresses."""
    start = struct.calcsize(HEADER) + len(segments) * struct.calcsize(PROGRAM)
    body, programs = b"", b""
    for kind, data in segments:
        at = start + len(body)
        programs += struct.pack(PROGRAM, kind, 4, at, at, at, len(data), len(data), 4)
        body += data
    names = b"\0" + b"".join(name.encode() + b"\0" for name, _ in sections) + b".shstrtab\0"
    table = struct.pack(SECTION, *[0] * 10) if sections else b""
    for name, data in [*sections, (".shstrtab", names)] if sections else []:
        kind = 3 if name == ".shstrtab" else 1
        at = names.index(name.encode() + b"\0")
        table += struct.pack(SECTION, at, kind, 0, 0, start + len(body), len(data), 0, 0, 1, 0)
        body += data
    count = len(sections) + 2 if sections else 0
    header = struct.pack(
        HEADER, b"\x7fELF\2\1\1".ljust(16, b"\0"), 2, 62, 1, 0, struct.calcsize(HEADER),
        start + len(body) if count else 0, 0, 64, 56, len(segments), 64, count, max(0, count - 1),
    )  # fmt: skip
    return header + programs + body + table


def note(name: str, kind: int, descriptor: bytes) -> bytes:
    owner = name.encode() + b"\0"
    padded = [part + bytes(-len(part) % 4) for part in (owner, descriptor)]
    return struct.pack("<III", len(owner), len(descriptor), kind) + b"".join(padded)


def vmlinux(*notes: bytes) -> bytes:
    return _elf([(PT_NOTE, b"".join(notes))], [])


def module(*strings: str) -> bytes:
    return _elf([], [(".modinfo", b"".join(string.encode() + b"\0" for string in strings))])


def program(interpreter: str | None, libraries: list[str]) -> bytes:
    """A dynamic program whose one PT_LOAD maps the whole file at address 0."""
    names = b"\0" + b"".join(library.encode() + b"\0" for library in libraries)
    segments: list[tuple[int, bytes]] = [(PT_INTERP, interpreter.encode() + b"\0")] if interpreter else []
    count = len(segments) + 2
    at = struct.calcsize(HEADER) + count * struct.calcsize(PROGRAM) + sum(len(data) for _, data in segments)
    offsets = [names.index(b"\0" + library.encode() + b"\0") + 1 for library in libraries]
    tags = [
        *((DT_NEEDED, offset) for offset in offsets),
        (DT_STRTAB, at),
        (DT_STRSZ, len(names)),
        (DT_NULL, 0),
    ]
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in tags)
    elf = bytearray(_elf([*segments, (PT_LOAD, names), (PT_DYNAMIC, dynamic)], []))
    load = struct.calcsize(HEADER) + len(segments) * struct.calcsize(PROGRAM)
    struct.pack_into(PROGRAM, elf, load, PT_LOAD, 4, 0, 0, 0, len(elf), len(elf), 1)
    return bytes(elf)
