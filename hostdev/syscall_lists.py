"""Which system calls each kind of process may make, by what for.

Workers and the control process have an allow-list: what is not named is denied. The keeper forks, starts the next version
and binds sockets, so it has a list of what it never does. Found by strace under all tests, and by what CPython 3.11 to 3.14
and glibc 2.36 to 2.42 may call in place of what was seen. Used by sandbox.py.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from collections.abc import Mapping

from hostdev.seccomp import Action, Argument, Rule
from hostdev.syscalls import Syscall as Call

# Of numbers that CPython does not name. uapi/asm-generic/ioctls.h, linux/sockios.h (SIOCOUTQ is TIOCOUTQ).
_TCGETS, _SIOCOUTQ, _FIONBIO, _FIONCLEX, _FIOCLEX = 0x5401, 0x5411, 0x5421, 0x5450, 0x5451
# uapi/linux/fcntl.h.
_AT_EMPTY_PATH = 0x1000
# uapi/asm-generic/mman-common.h.
_MADV_FREE = 8
# uapi/linux/sched.h: CLONE_NEW of mount, cgroup, UTS, IPC, user, PID and network.
_CLONE_NEW = 0x7E02_0000

Allowed = dict[Call, tuple[Argument, ...]]


def _any(*calls: Call) -> Allowed:
    return dict.fromkeys(calls, ())


_NO_CODE = (Argument(2, without=mmap.PROT_EXEC),)
_FCNTL = (fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_DUPFD_CLOEXEC)

# What a Python process needs that waits for descriptors and answers on them.
_COMMON: Mapping[Call, tuple[Argument, ...]] = {
    # The loop. restart_syscall is how the kernel goes on with a poll() after SIGSTOP and SIGCONT.
    **_any(Call.POLL, Call.PPOLL, Call.RESTART_SYSCALL),
    # Descriptors that it has. writev is glibc's, which says why it aborts.
    **_any(Call.READ, Call.WRITE, Call.WRITEV, Call.CLOSE, Call.LSEEK),
    # os.fstat(): glibc before 2.39 has newfstatat with an empty path for it. No os.stat().
    Call.FSTAT: (),
    Call.NEWFSTATAT: (Argument(3, (_AT_EMPTY_PATH,)),),
    # os.dup(), mmap.mmap(), os.set_inheritable().
    Call.FCNTL: (Argument(1, _FCNTL),),
    Call.IOCTL: (Argument(1, (_FIOCLEX, _FIONCLEX)),),
    # Sockets that it has. getsockname and getsockopt: what kind a descriptor is.
    **_any(Call.SENDTO, Call.SENDMSG, Call.RECVFROM, Call.RECVMSG, Call.SHUTDOWN),
    **_any(Call.GETSOCKNAME, Call.GETSOCKOPT),
    # malloc, Python's arenas and mappings of descriptors that it has; never of code.
    **_any(Call.BRK, Call.MUNMAP, Call.MREMAP),
    Call.MMAP: _NO_CODE,
    Call.MPROTECT: _NO_CODE,
    # Clocks: of the process, and all of them where the vDSO has none.
    **_any(Call.CLOCK_GETTIME, Call.CLOCK_GETRES, Call.GETTIMEOFDAY, Call.TIME),
    # Its own signals: handlers, and the way back from them.
    **_any(Call.RT_SIGACTION, Call.RT_SIGPROCMASK, Call.RT_SIGRETURN, Call.SIGALTSTACK),
    # Python's locks and glibc's; keys of hash functions and of malloc.
    **_any(Call.FUTEX, Call.GETRANDOM, Call.GETPID, Call.GETTID),
    **_any(Call.EXIT, Call.EXIT_GROUP),
}

# The memory of a guest, the timer that ends a worker that hangs, the count of what QEMU has not read yet.
_WORKER: Mapping[Call, tuple[Argument, ...]] = {
    **_any(Call.PREAD64, Call.PWRITE64, Call.FSTATFS, Call.SETITIMER),
    # Whether the front end has read what it was told: backend_channel.py waits for an edge.
    **_any(Call.EPOLL_CREATE1, Call.EPOLL_CTL, Call.EPOLL_WAIT, Call.EPOLL_PWAIT),
    # What /proc/self/fd says that a descriptor is: an eventfd or not.
    Call.READLINK: (),
    Call.FCNTL: (Argument(1, (*_FCNTL, fcntl.F_GET_SEALS)),),
    Call.IOCTL: (Argument(1, (_FIOCLEX, _FIONCLEX, _SIOCOUTQ)),),
    # What discard.py and memory.py ask for, and malloc: MADV_FREE and MADV_HUGEPAGE by its tunables.
    Call.MADVISE: (
        Argument(
            2, (mmap.MADV_REMOVE, mmap.MADV_DONTNEED, mmap.MADV_DONTDUMP, _MADV_FREE, mmap.MADV_HUGEPAGE)
        ),
    ),
}
# A trace grows, and is cut at the end. Not without one: a worker that cuts a guest's RAM file kills QEMU.
_TRACE: Mapping[Call, tuple[Argument, ...]] = {Call.FTRUNCATE: (), Call.FALLOCATE: (Argument(1, (0,)),)}
# metrics.py writes a new file and puts it in the old one's place. Landlock says where.
_METRICS: Mapping[Call, tuple[Argument, ...]] = {
    Call.OPENAT: (Argument(2, (os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC,)),),
    **_any(Call.RENAME, Call.UNLINK),
    # Python looks if what it opens is a terminal.
    Call.IOCTL: (Argument(1, (_FIOCLEX, _FIONCLEX, _SIOCOUTQ, _TCGETS)),),
}
# Clients: who connects, and who that is.
_CONTROL: Mapping[Call, tuple[Argument, ...]] = {
    **_any(Call.ACCEPT4, Call.GETEUID),
    Call.IOCTL: (Argument(1, (_FIOCLEX, _FIONCLEX, _FIONBIO)),),
}


def worker_rules(pid: int, *, trace: bool, metrics: bool) -> list[Rule]:
    """Return what a worker may do. pid: its own. trace, metrics: it has such a file."""
    allowed = {**_COMMON, **_WORKER, **(_TRACE if trace else {}), **(_METRICS if metrics else {})}
    return _rules(allowed, pid)


def control_rules(pid: int) -> list[Rule]:
    """Return what the control process may do. pid: its own."""
    return _rules({**_COMMON, **_CONTROL}, pid)


def _rules(allowed: Mapping[Call, tuple[Argument, ...]], pid: int) -> list[Rule]:
    """Add what is the same call for everybody, and means something else: abort() signals its own process."""
    return [Rule(call, arguments) for call, arguments in allowed.items()] + [
        Rule(Call.TGKILL, (Argument(0, (pid,)),))
    ]


# By what the keeper, its children and the versions after it never do.
_NEVER: tuple[Call, ...] = (
    # Look into another process, or take its descriptors.
    *(Call.PTRACE, Call.PROCESS_VM_READV, Call.PROCESS_VM_WRITEV, Call.PROCESS_MADVISE),
    *(Call.PIDFD_GETFD, Call.KCMP),
    # See another file system, or be in another namespace.
    *(Call.MOUNT, Call.UMOUNT2, Call.PIVOT_ROOT, Call.CHROOT, Call.OPEN_TREE, Call.OPEN_TREE_ATTR),
    *(Call.MOVE_MOUNT, Call.FSOPEN, Call.FSCONFIG, Call.FSMOUNT, Call.FSPICK, Call.MOUNT_SETATTR),
    *(Call.UNSHARE, Call.SETNS, Call.OPEN_BY_HANDLE_AT, Call.FANOTIFY_INIT),
    # Give the kernel programs, code or a second way to call it.
    *(Call.BPF, Call.PERF_EVENT_OPEN, Call.USERFAULTFD),
    *(Call.IO_URING_SETUP, Call.IO_URING_ENTER, Call.IO_URING_REGISTER),
    *(Call.INIT_MODULE, Call.FINIT_MODULE, Call.DELETE_MODULE, Call.KEXEC_LOAD, Call.KEXEC_FILE_LOAD),
    *(Call.IOPL, Call.IOPERM, Call.MODIFY_LDT, Call.PERSONALITY),
    # Change the machine for everybody.
    *(Call.REBOOT, Call.SWAPON, Call.SWAPOFF, Call.ACCT, Call.QUOTACTL, Call.QUOTACTL_FD, Call.SYSLOG),
    *(Call.SETTIMEOFDAY, Call.CLOCK_SETTIME, Call.ADJTIMEX, Call.CLOCK_ADJTIME),
    *(Call.SETHOSTNAME, Call.SETDOMAINNAME, Call.VHANGUP),
    *(Call.KEYCTL, Call.ADD_KEY, Call.REQUEST_KEY),
)


def keeper_rules() -> list[Rule]:
    """Return what the keeper may not do; everything else it may."""
    unix_only = (Argument(0, (socket.AF_UNIX,)),)
    return [
        Rule(Call.SOCKET, unix_only),
        Rule(Call.SOCKETPAIR, unix_only),
        # A fork, but into no other namespace. Of clone3 no filter sees the flags: a kernel before 5.3 has none either.
        Rule(Call.CLONE, (Argument(0, without=_CLONE_NEW),)),
        Rule(Call.CLONE3, action=Action.UNKNOWN),
        *(Rule(call, action=Action.DENY) for call in _NEVER),
    ]
