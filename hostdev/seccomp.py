"""A seccomp filter: rules about system calls -> the classic BPF program that the kernel runs at each of them.

Pure; what is allowed and why is syscall_lists.py's, sandbox.py has the kernel take it. Not a general compiler: one rule a
call, arguments are looked at by their low 32 bits, x86-64 only. Sources: Documentation/userspace-api/seccomp_filter.rst,
uapi/linux/{seccomp,audit,filter}.h.

A program is linear: 200 comparisons of a few nanoseconds. Since Linux 5.11 the kernel remembers which calls it always
allows, and runs it only for those whose arguments count (kernel/seccomp.c, seccomp_cache_prepare).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from hostdev.syscalls import LAST_KNOWN, Syscall

_RET_ERRNO = 0x0005_0000
_AUDIT_ARCH_X86_64 = 0xC000_003E

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6].
_NUMBER, _ARCHITECTURE, _ARGUMENTS, _ARGUMENT_BYTES = 0, 4, 16, 8

# struct sock_filter: u16 code; u8 jt, jf; u32 k. jt and jf: how many instructions to pass over.
INSTRUCTION = struct.Struct("<HBBI")
_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06


class Action(IntEnum):
    """What becomes of a call. Not a death: whatever was forgotten here is an error in the log, and the VM goes on."""

    ALLOW = 0x7FFF_0000
    DENY = _RET_ERRNO | errno.EPERM
    UNKNOWN = _RET_ERRNO | errno.ENOSYS


@dataclass(frozen=True, slots=True)
class Argument:
    """What one argument may be: one of these values if any are named, and without these bits.

    By its low 32 bits: the kernel takes no more of those that are asked about (int, or flags of which none is higher).
    """

    index: int
    values: tuple[int, ...] = ()
    without: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """action: for this call with such arguments. With others it is denied."""

    call: Syscall
    arguments: tuple[Argument, ...] = ()
    action: Action = Action.ALLOW


def program(rules: Sequence[Rule], default: Action) -> bytes:
    """Return the filter. default: for calls without a rule. Other architectures are denied, and newer calls unknown.

    The x32 calls are unknown too: their numbers have bit 30 set. Raises ValueError for two rules about one call.
    """
    if len({rule.call for rule in rules}) < len(rules):
        raise ValueError("two rules about one system call")
    start = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_EQUAL, _AUDIT_ARCH_X86_64, if_true=1),
        _instruction(_RETURN, Action.DENY),
        _instruction(_LOAD, _NUMBER),
        _instruction(_JUMP_GREATER, LAST_KNOWN, if_false=1),
        _instruction(_RETURN, Action.UNKNOWN),
    ]
    blocks = [instruction for rule in rules for instruction in _block(rule)]
    return b"".join([*start, *blocks, _instruction(_RETURN, default)])


def _block(rule: Rule) -> list[bytes]:
    """Return what is done if the number, which is loaded, is the rule's. It never goes on from there, so it may load anew."""
    body = [instruction for argument in rule.arguments for instruction in _check(argument)]
    body.append(_instruction(_RETURN, rule.action))
    return [_instruction(_JUMP_EQUAL, rule.call, if_false=len(body)), *body]


def _check(argument: Argument) -> Iterable[bytes]:
    """Yield what denies if the argument is another, and goes on behind itself if not."""
    yield _instruction(_LOAD, _ARGUMENTS + _ARGUMENT_BYTES * argument.index)
    if argument.without:
        yield _instruction(_JUMP_ANY_BIT, argument.without, if_false=1)
        yield _instruction(_RETURN, Action.DENY)
    for left, value in zip(reversed(range(len(argument.values))), argument.values, strict=True):
        yield _instruction(_JUMP_EQUAL, value, if_true=left + 1)
    if argument.values:
        yield _instruction(_RETURN, Action.DENY)


def _instruction(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    return INSTRUCTION.pack(code, if_true, if_false, value)
