"""Runs a classic BPF program as the kernel does, for the few instructions that seccomp.py makes. Not a test.

Source: Documentation/networking/filter.rst; a jump is relative to the next instruction. Anything else is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hostdev.seccomp import INSTRUCTION

X86_64, I386 = 0xC000003E, 0x40000003


def call(number: int, arguments: Sequence[int] = (), architecture: int = X86_64) -> bytes:
    """struct seccomp_data of a system call."""
    words = [*arguments, *([0] * (6 - len(arguments)))]
    return struct.pack("<iIQ6Q", number if number < 1 << 31 else number - (1 << 32), architecture, 0, *words)


def run(program: bytes, data: bytes) -> int:
    """Return what the program does."""
    instructions = list(INSTRUCTION.iter_unpack(program))
    loaded = at = 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        match code:
            case 0x20:
                assert value % 4 == 0
                (loaded,) = struct.unpack_from("<I", data, value)
            case 0x15:
                at += if_true if loaded == value else if_false
            case 0x25:
                at += if_true if loaded > value else if_false
            case 0x45:
                at += if_true if loaded & value else if_false
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(f"instruction {code:#x}")
