"""What each kind of process is denied, call by call, as written down here and not as the lists under test have it.

By number, for much of it has no name in hostdev: what is not named there must be denied for that. A call that is taken off
the keeper's list, or put on another's, is noticed here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest

from hostdev import seccomp
from hostdev.seccomp import Action
from hostdev.syscall_lists import control_rules, keeper_rules, worker_rules
from tests import bpf
from tests.unit.test_seccomp import HEADER

PID = 4711
WORKERS = {
    f"worker{', traced' * trace}{', counted' * metrics}": worker_rules(PID, trace=trace, metrics=metrics)
    for trace in (False, True)
    for metrics in (False, True)
}
LOCKED_IN = {
    name: seccomp.program(rules, Action.DENY)
    for name, rules in (WORKERS | {"control process": control_rules(PID)}).items()
}
KEEPER = seccomp.program(keeper_rules(), Action.ALLOW)


def _calls(text: str) -> dict[str, int]:
    """Names and numbers, as asm/unistd_64.h has them."""
    pairs = (each.split() for each in text.split(","))
    return {name: int(number) for name, number in pairs}


# Look into another process, take its descriptors, be another kind of process.
OTHERS = _calls(
    """
    ptrace 101, process_vm_readv 310, process_vm_writev 311, process_madvise 440, pidfd_getfd 438, kcmp 312,
    personality 135, modify_ldt 154
    """
)
# Programs for the kernel, memory that another handles, a second way to call it.
KERNEL = _calls(
    """
    bpf 321, perf_event_open 298, userfaultfd 323, io_uring_setup 425, io_uring_enter 426,
    io_uring_register 427, init_module 175, finit_module 313, delete_module 176, kexec_load 246,
    kexec_file_load 320, iopl 172, ioperm 173, keyctl 250, add_key 248, request_key 249
    """
)
# Another view of files, another namespace.
NAMESPACES = _calls(
    """
    mount 165, umount2 166, pivot_root 155, chroot 161, unshare 272, setns 308, open_tree 428, move_mount 429,
    fsopen 430, fsconfig 431, fsmount 432, fspick 433, mount_setattr 442, open_by_handle_at 304,
    fanotify_init 300
    """
)
# The machine, for everybody.
MACHINE = _calls(
    """
    reboot 169, swapon 167, swapoff 168, acct 163, quotactl 179, quotactl_fd 443, syslog 103,
    settimeofday 164, clock_settime 227, adjtimex 159, clock_adjtime 305, sethostname 170, setdomainname 171,
    vhangup 153
    """
)
NOBODYS = OTHERS | KERNEL | NAMESPACES | MACHINE

# What the keeper does, and nobody else.
PROCESSES = _calls(
    """
    execve 59, execveat 322, fork 57, vfork 58, clone 56, clone3 435, kill 62, tkill 200, rt_sigqueueinfo 129,
    rt_tgsigqueueinfo 297, pidfd_open 434, pidfd_send_signal 424, process_mrelease 448, prctl 157,
    arch_prctl 158, setpgid 109, setsid 112, wait4 61, waitid 247, seccomp 317
    """
)
FILES = _calls(
    """
    open 2, openat2 437, creat 85, stat 4, lstat 6, access 21, faccessat 269, faccessat2 439, statx 332,
    truncate 76, renameat 264, renameat2 316, link 86, linkat 265, symlink 88, symlinkat 266, unlinkat 263,
    mkdir 83, mkdirat 258, rmdir 84, mknod 133, mknodat 259, chmod 90, fchmod 91, fchmodat 268, chown 92,
    fchown 93, lchown 94, fchownat 260, chdir 80, fchdir 81, getdents 78, getdents64 217, setxattr 188,
    fsetxattr 190, removexattr 197, utimensat 280, inotify_init1 294, name_to_handle_at 303, memfd_create 319,
    memfd_secret 447, sendfile 40, splice 275, tee 276, vmsplice 278, copy_file_range 326
    """
)
SOCKETS = _calls(
    """
    socket 41, socketpair 53, connect 42, bind 49, listen 50, accept 43, setsockopt 54, sendmmsg 307,
    recvmmsg 299
    """
)
RIGHTS = _calls(
    """
    setrlimit 160, prlimit64 302, setuid 105, setgid 106, setreuid 113, setregid 114, setresuid 117,
    setresgid 119, setgroups 116, setfsuid 122, setfsgid 123, capset 126, sched_setaffinity 203,
    sched_setscheduler 144, sched_setattr 314, setpriority 141, ioprio_set 251
    """
)
MEMORY = _calls(
    """
    remap_file_pages 216, mbind 237, migrate_pages 256, move_pages 279, set_mempolicy 238, pkey_mprotect 329,
    mlock 149, mlockall 151, shmget 29, shmat 30, msgget 68, semget 64, mq_open 240, io_setup 206,
    io_submit 209
    """
)
KEEPERS = PROCESSES | FILES | SOCKETS | RIGHTS | MEMORY

FD, KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 3, 0x01, 0x02, 0x08, 0x10
ACCEPT4, FALLOCATE, FTRUNCATE, NEWFSTATAT, OPENAT, RENAME, UNLINK = 288, 285, 77, 262, 257, 82, 87


@pytest.mark.parametrize("who", LOCKED_IN)
def test_who_is_locked_in_is_denied(who: str) -> None:
    for name, number in (NOBODYS | KEEPERS).items():
        assert bpf.run(LOCKED_IN[who], bpf.call(number, (FD,))) == Action.DENY, name


def test_the_keeper_is_denied() -> None:
    for name, number in NOBODYS.items():
        assert bpf.run(KEEPER, bpf.call(number, (FD,))) == Action.DENY, name


@pytest.mark.parametrize("who", LOCKED_IN)
def test_no_path_is_looked_at(who: str) -> None:
    """fstat() of glibc before 2.39 names no path, and says so in the flags."""
    for flags, action in ((0, Action.DENY), (0x100, Action.DENY), (0x1000, Action.ALLOW)):
        assert bpf.run(LOCKED_IN[who], bpf.call(NEWFSTATAT, (FD, 0, 0, flags))) == action


@pytest.mark.parametrize("who", LOCKED_IN)
def test_a_trace_grows_and_no_file_is_punched(who: str) -> None:
    """Mode 0 grows a file. Any other takes bytes out of one, and a worker has a guest's RAM file open."""
    program, grows = LOCKED_IN[who], Action.ALLOW if "traced" in who else Action.DENY
    assert bpf.run(program, bpf.call(FALLOCATE, (FD, 0))) == grows
    assert bpf.run(program, bpf.call(FTRUNCATE, (FD, 0))) == grows
    for mode in (KEEP_SIZE, PUNCH_HOLE, KEEP_SIZE | PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE):
        assert bpf.run(program, bpf.call(FALLOCATE, (FD, mode))) == Action.DENY


@pytest.mark.parametrize("who", LOCKED_IN)
def test_files_are_opened_for_metrics_and_connections_by_the_control_process(who: str) -> None:
    replaces = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    for number, arguments, of_whom in (
        (OPENAT, (0, 0, replaces), "counted"),
        (RENAME, (), "counted"),
        (UNLINK, (), "counted"),
        (ACCEPT4, (FD,), "control"),
    ):
        wanted = Action.ALLOW if of_whom in who else Action.DENY
        assert bpf.run(LOCKED_IN[who], bpf.call(number, arguments)) == wanted, number
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_CREAT, replaces | os.O_NOFOLLOW):
        assert bpf.run(LOCKED_IN[who], bpf.call(OPENAT, (0, 0, flags))) == Action.DENY


def test_the_numbers_are_the_kernels(unmet: Callable[[str], None]) -> None:
    if not HEADER.exists():
        unmet(f"linux-libc-dev's {HEADER}")
    known = dict(re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text()))
    ours = NOBODYS | KEEPERS
    # An older header does not have the newest.
    assert {name: number for name, number in ours.items() if number != int(known.get(name, number))} == {}
    assert len(ours) - len(known.keys() & ours.keys()) < 10
