"""Numbers of Linux system calls on x86-64, of those that the sandbox allows or denies by name.

Source: Linux, arch/x86/entry/syscalls/syscall_64.tbl. A number never changes once it has been given. Used by
syscall_lists.py, seccomp.py and landlock.py; tests/unit/test_seccomp.py compares them with the kernel's header.
"""

from __future__ import annotations

from enum import IntEnum

# file_setattr, of Linux 6.17. What is newer is unknown here, and refused as an older kernel would: libraries have another
# way for that.
LAST_KNOWN = 469


class Syscall(IntEnum):
    """By the kernel's names."""

    READ = 0
    WRITE = 1
    CLOSE = 3
    FSTAT = 5
    POLL = 7
    LSEEK = 8
    MMAP = 9
    MPROTECT = 10
    MUNMAP = 11
    BRK = 12
    RT_SIGACTION = 13
    RT_SIGPROCMASK = 14
    RT_SIGRETURN = 15
    IOCTL = 16
    PREAD64 = 17
    PWRITE64 = 18
    WRITEV = 20
    MREMAP = 25
    MADVISE = 28
    SETITIMER = 38
    GETPID = 39
    SOCKET = 41
    SENDTO = 44
    RECVFROM = 45
    SENDMSG = 46
    RECVMSG = 47
    SHUTDOWN = 48
    GETSOCKNAME = 51
    SOCKETPAIR = 53
    GETSOCKOPT = 55
    CLONE = 56
    EXIT = 60
    FCNTL = 72
    FTRUNCATE = 77
    RENAME = 82
    UNLINK = 87
    READLINK = 89
    GETTIMEOFDAY = 96
    PTRACE = 101
    SYSLOG = 103
    GETEUID = 107
    SIGALTSTACK = 131
    PERSONALITY = 135
    FSTATFS = 138
    VHANGUP = 153
    MODIFY_LDT = 154
    PIVOT_ROOT = 155
    ADJTIMEX = 159
    CHROOT = 161
    ACCT = 163
    SETTIMEOFDAY = 164
    MOUNT = 165
    UMOUNT2 = 166
    SWAPON = 167
    SWAPOFF = 168
    REBOOT = 169
    SETHOSTNAME = 170
    SETDOMAINNAME = 171
    IOPL = 172
    IOPERM = 173
    INIT_MODULE = 175
    DELETE_MODULE = 176
    QUOTACTL = 179
    GETTID = 186
    TIME = 201
    FUTEX = 202
    RESTART_SYSCALL = 219
    CLOCK_SETTIME = 227
    CLOCK_GETTIME = 228
    CLOCK_GETRES = 229
    EXIT_GROUP = 231
    EPOLL_WAIT = 232
    EPOLL_CTL = 233
    TGKILL = 234
    KEXEC_LOAD = 246
    ADD_KEY = 248
    REQUEST_KEY = 249
    KEYCTL = 250
    OPENAT = 257
    NEWFSTATAT = 262
    PPOLL = 271
    UNSHARE = 272
    EPOLL_PWAIT = 281
    FALLOCATE = 285
    ACCEPT4 = 288
    EPOLL_CREATE1 = 291
    PERF_EVENT_OPEN = 298
    FANOTIFY_INIT = 300
    OPEN_BY_HANDLE_AT = 304
    CLOCK_ADJTIME = 305
    SETNS = 308
    PROCESS_VM_READV = 310
    PROCESS_VM_WRITEV = 311
    KCMP = 312
    FINIT_MODULE = 313
    GETRANDOM = 318
    KEXEC_FILE_LOAD = 320
    BPF = 321
    USERFAULTFD = 323
    IO_URING_SETUP = 425
    IO_URING_ENTER = 426
    IO_URING_REGISTER = 427
    OPEN_TREE = 428
    MOVE_MOUNT = 429
    FSOPEN = 430
    FSCONFIG = 431
    FSMOUNT = 432
    FSPICK = 433
    CLONE3 = 435
    PIDFD_GETFD = 438
    PROCESS_MADVISE = 440
    MOUNT_SETATTR = 442
    QUOTACTL_FD = 443
    LANDLOCK_CREATE_RULESET = 444
    LANDLOCK_ADD_RULE = 445
    LANDLOCK_RESTRICT_SELF = 446
    OPEN_TREE_ATTR = 467
