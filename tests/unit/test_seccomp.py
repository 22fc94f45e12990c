"""What each kind of process may do, asked of its filter, and the numbers that it goes by."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from hostdev import seccomp
from hostdev.seccomp import Action, Rule
from hostdev.syscall_lists import control_rules, keeper_rules, worker_rules
from hostdev.syscalls import LAST_KNOWN, Syscall
from tests import bpf

PID = 4711
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")

PLAIN = seccomp.program(worker_rules(PID, trace=False, metrics=False), Action.DENY)
TRACED = seccomp.program(worker_rules(PID, trace=True, metrics=False), Action.DENY)
COUNTED = seccomp.program(worker_rules(PID, trace=False, metrics=True), Action.DENY)
CONTROL = seccomp.program(control_rules(PID), Action.DENY)
KEEPER = seccomp.program(keeper_rules(), Action.ALLOW)

WRITES = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC


@pytest.mark.parametrize(
    ("program", "call", "arguments", "action"),
    [
        (PLAIN, Syscall.MMAP, (0, 4096, mmap.PROT_READ | mmap.PROT_WRITE), Action.ALLOW),
        (PLAIN, Syscall.MMAP, (0, 4096, mmap.PROT_READ | mmap.PROT_EXEC), Action.DENY),
        (PLAIN, Syscall.MPROTECT, (0, 4096, mmap.PROT_EXEC), Action.DENY),
        (PLAIN, Syscall.MADVISE, (0, 4096, mmap.MADV_REMOVE), Action.ALLOW),
        (PLAIN, Syscall.MADVISE, (0, 4096, mmap.MADV_WILLNEED), Action.DENY),
        (CONTROL, Syscall.MADVISE, (0, 4096, mmap.MADV_REMOVE), Action.DENY),
        (PLAIN, Syscall.FCNTL, (3, fcntl.F_DUPFD_CLOEXEC), Action.ALLOW),
        (PLAIN, Syscall.FCNTL, (3, fcntl.F_SETFL), Action.DENY),
        (PLAIN, Syscall.TGKILL, (PID, PID, 6), Action.ALLOW),
        (PLAIN, Syscall.TGKILL, (PID + 1, PID + 1, 6), Action.DENY),
        # What the files of its options need, and only with them.
        (PLAIN, Syscall.FTRUNCATE, (3, 0), Action.DENY),
        (TRACED, Syscall.FTRUNCATE, (3, 0), Action.ALLOW),
        (PLAIN, Syscall.OPENAT, (0, 0, WRITES), Action.DENY),
        (TRACED, Syscall.OPENAT, (0, 0, WRITES), Action.DENY),
        (COUNTED, Syscall.OPENAT, (0, 0, WRITES), Action.ALLOW),
        (COUNTED, Syscall.OPENAT, (0, 0, os.O_RDONLY | os.O_CLOEXEC), Action.DENY),
        (COUNTED, Syscall.FTRUNCATE, (3, 0), Action.DENY),
        (PLAIN, Syscall.RENAME, (), Action.DENY),
        (PLAIN, Syscall.ACCEPT4, (3,), Action.DENY),
        (CONTROL, Syscall.ACCEPT4, (3,), Action.ALLOW),
        (KEEPER, Syscall.SOCKET, (socket.AF_UNIX,), Action.ALLOW),
        (KEEPER, Syscall.SOCKET, (socket.AF_INET,), Action.DENY),
        (KEEPER, Syscall.SOCKET, (socket.AF_NETLINK,), Action.DENY),
        (KEEPER, Syscall.CLONE, (0x0120_0011,), Action.ALLOW),
        (KEEPER, Syscall.CLONE, (0x1000_0011,), Action.DENY),
        (KEEPER, Syscall.CLONE3, (), Action.UNKNOWN),
        (KEEPER, Syscall.PTRACE, (), Action.DENY),
        (KEEPER, Syscall.OPENAT, (0, 0, os.O_RDONLY), Action.ALLOW),
    ],
)
def test_a_call(program: bytes, call: Syscall, arguments: tuple[int, ...], action: Action) -> None:
    assert bpf.run(program, bpf.call(call, arguments)) == action


@pytest.mark.parametrize("program", [PLAIN, TRACED, COUNTED, CONTROL])
def test_who_is_locked_in_can_do_nothing_that_the_keeper_never_does(program: bytes) -> None:
    never = [rule.call for rule in keeper_rules()]
    assert len(never) > 50
    for call in never:
        assert bpf.run(program, bpf.call(call)) == Action.DENY


def test_two_rules_about_one_call_are_refused() -> None:
    with pytest.raises(ValueError, match="two rules"):
        seccomp.program([Rule(Syscall.READ), Rule(Syscall.READ)], Action.DENY)


def test_the_numbers_are_the_kernels(unmet: Callable[[str], None]) -> None:
    if not HEADER.exists():
        unmet(f"linux-libc-dev's {HEADER}")
    text = HEADER.read_text()
    known = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", text)}
    # An older header does not have the newest.
    named = {call.name.lower(): int(call) for call in Syscall if call <= max(known.values())}
    assert len(named) > 100
    assert named == {name: known[name] for name in named}
    assert max(Syscall) <= LAST_KNOWN
