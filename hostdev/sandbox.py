"""What a process of the device gives up before it meets what it must not trust.

A worker has a guest's memory mapped and follows the guest's descriptors; the control process reads what clients write. Both
lock themselves in once they have what they need: no privileges gained, no file opened, no process, no code. The keeper,
which starts them, gives up what it never needs. Each layer is only asked for: where the kernel has none the device serves
all the same, for the VM matters more. Not a library's: pyseccomp's last release is of 2021 and needs the system's
libseccomp. The lists are syscall_lists.py's.

Not given up: to be looked at. PR_SET_DUMPABLE 0 would hide a worker's PSS in /proc from its own user.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import os
import resource
import struct
import traceback
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from hostdev import landlock, seccomp
from hostdev.syscall_lists import control_rules, keeper_rules, worker_rules

log = logging.getLogger(__name__)

_LIBC = ctypes.CDLL(None, use_errno=True)

AUTO, NONE = "auto", "none"
REQUESTS = (AUTO, NONE)

# linux/prctl.h, linux/seccomp.h.
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2

# Of a worker: 32 regions and as many duplicates that mappings have; 5 rings of 3 eventfds; 2 records and their duplicates; a
# trace and its duplicate; 3 sockets, 3 standard descriptors, a metrics file; 16 that arrive with a message, and 8 duplicates.
# 64 + 15 + 4 + 2 + 7 + 24 = 116: this is twice that.
MAX_WORKER_DESCRIPTORS = 256
# Bytes that a worker's own memory may grow by: it takes some 10 MiB. One that goes wrong is killed last when memory runs out
# (host_limits.py), and is not to have all others killed before.
MAX_WORKER_GROWTH = 256 << 20
# Not 0: that stops a core that is written to a file and not one that is piped to a program, and this stops both (Linux,
# fs/coredump.c: a limit of 1 is the kernel's own mark on such programs; for a file it is too small for a core). A
# socket that newer kernels can send cores to knows no limit: what keeps a guest's memory out of it is memory.py's MADV_DONTDUMP.
_CORE_LIMIT = 1
# Filters are inherited, so each version that takes over adds one, of some 150 instructions. The kernel has room for 32,768 of
# them (kernel/seccomp.c, MAX_INSNS_PER_PATH), and workers are to find some.
MAX_KEEPER_FILTERS = 16

# The kernel has no such thing: said once, by the keeper.
_ABSENT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class Role(Enum):
    """Who gives up."""

    KEEPER = "keeper"
    WORKER = "worker"
    CONTROL = "control process"


def begin(request: str, *, takes_over: bool = False) -> None:
    """Give up what no process of the device needs, and say what of it this kernel cannot take. request: one of REQUESTS.

    takes_over: the version before this one may have given it up already.
    """
    if request == NONE:
        log.warning("--sandbox none: a guest that takes a worker over can do what your user can")
        return
    for lack in missing():
        log.warning("the sandbox has gaps, this kernel has %s", lack)
    if takes_over and _inherited_filters() >= MAX_KEEPER_FILTERS:
        log.info(
            "the keeper keeps the limits that it has: no further filter is added to %d", MAX_KEEPER_FILTERS
        )
        return
    confine(Role.KEEPER)


def missing() -> list[str]:
    """Return what this kernel lacks, in words, with what comes of it."""
    found = []
    if not _has_filters():
        found.append("no seccomp filters: a worker that is taken over may make any system call")
    if landlock.abi() == 0:
        found.append(
            "no Landlock: with --metrics-file a worker that is taken over may write files anywhere that its user may"
        )
    return found


@functools.cache
def _has_filters() -> bool:
    """A filter at no address is a bad address only where there are filters. The keeper's answer is its children's."""
    try:
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None)
    except OSError as error:
        return error.errno == errno.EFAULT
    return False


def confine(role: Role, *, trace: bool = False, metrics_file: Path | None = None) -> str:
    """Give up for good what this role does not need. Returns what holds: "seccomp+landlock", one of the two, or "none".

    trace, metrics_file: of a worker that has such a file. Raises nothing: what fails is in the log.
    """
    _preload()
    _attempt("no new privileges", lambda: _prctl(_PR_SET_NO_NEW_PRIVS, 1))
    _attempt("limits", lambda: _limit(role))
    layers = []
    # The filter last: it does not allow what the others need.
    if role is not Role.KEEPER and _attempt("Landlock", lambda: _restrict(metrics_file)):
        layers.append("landlock")
    if _attempt("a seccomp filter", lambda: _filter(role, trace=trace, metrics=metrics_file is not None)):
        layers.insert(0, "seccomp")
    return "+".join(layers) or NONE


def _attempt(what: str, act: Callable[[], object]) -> bool:
    try:
        act()
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) or error.errno not in _ABSENT:
            log.warning("the device serves without %s: %s", what, error)
        return False
    return True


@functools.cache
def _preload() -> None:
    """Have Python import what it needs for a traceback: inside, nothing can be imported any more. The keeper's are its children's.

    Of an exception with a suggestion (3.12 and later), whose source lines are looked for (3.14: tokenize).
    """
    try:
        _ = Role.KEEPER.no_such_role  # type: ignore[attr-defined]
    except AttributeError as error:
        traceback.format_exception(error)


def _limit(role: Role) -> None:
    """Have no core dumped, and a worker no more descriptors and memory than it can use. Raises OSError, ValueError."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (_CORE_LIMIT, _CORE_LIMIT))
    except (OSError, ValueError):  # it is 0 already, which not everybody may raise
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if role is Role.WORKER:
        _lower(resource.RLIMIT_NOFILE, MAX_WORKER_DESCRIPTORS)
        _lower(resource.RLIMIT_DATA, _status("VmData") * 1024 + MAX_WORKER_GROWTH)


def _lower(limit: int, most: int) -> None:
    """Have a limit be no more than this. Raises OSError, ValueError."""
    soft, hard = (
        most if each == resource.RLIM_INFINITY else min(each, most) for each in resource.getrlimit(limit)
    )
    resource.setrlimit(limit, (soft, hard))


def _restrict(metrics_file: Path | None) -> None:
    """Open no file but those that metrics are written to. Raises OSError."""
    version = landlock.abi()
    if version == 0:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    folder = None if metrics_file is None else metrics_file.parent
    # One that has gone needs no exception.
    landlock.restrict(version, folder if folder is not None and folder.is_dir() else None)


def _filter(role: Role, *, trace: bool, metrics: bool) -> None:
    """Raises OSError."""
    if not _has_filters():
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if role is Role.WORKER:
        rules = worker_rules(os.getpid(), trace=trace, metrics=metrics)
    elif role is Role.CONTROL:
        rules = control_rules(os.getpid())
    else:
        _install(seccomp.program(keeper_rules(), seccomp.Action.ALLOW))
        return
    _install(seccomp.program(rules, seccomp.Action.DENY))


def _inherited_filters() -> int:
    """Return how many filters there are already; 0 where the kernel does not tell (before 5.9)."""
    return _status("Seccomp_filters")


def _status(name: str) -> int:
    """Return a number of /proc/self/status, 0 where the kernel does not tell it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0


def _install(program: bytes) -> None:
    """Have the kernel take a filter. Raises OSError."""
    # struct sock_fprog: unsigned short len; struct sock_filter *filter.
    buffer = ctypes.create_string_buffer(program, len(program))
    length = len(program) // seccomp.INSTRUCTION.size
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, struct.pack("HxxxxxxP", length, ctypes.addressof(buffer)))


def _prctl(operation: int, argument: int, data: bytes | None = None) -> None:
    """Call prctl(2) with up to two arguments; those that are not used must be 0. Raises OSError."""
    words = [ctypes.c_ulong(argument), ctypes.c_char_p(data), ctypes.c_ulong(0), ctypes.c_ulong(0)]
    if _LIBC.prctl(operation, *words) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
