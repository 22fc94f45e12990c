"""Landlock: from now on this process opens no file, but for new ones in one folder if need be.

The kernel's own limit for files, abstract sockets and TCP, by what they are and not by which system call. What is open
already stays so. Called by ctypes: glibc has no wrappers. Source: Documentation/userspace-api/landlock.rst and
uapi/linux/landlock.h, up to ABI 8. Used by sandbox.py.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from hostdev.fds import Fd
from hostdev.syscalls import Syscall

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_WRITE_FILE, _REMOVE_FILE, _MAKE_REG, _TRUNCATE = 1 << 1, 1 << 5, 1 << 8, 1 << 14
# How many rights to files each ABI knows, counted from bit 0: 13 in the first, then REFER, TRUNCATE, IOCTL_DEV.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
# TCP bind and connect, since ABI 4. Abstract unix sockets and signals of processes outside, since ABI 6.
_NETWORK_ABI, _NETWORK_RIGHTS = 4, 0b11
_SCOPE_ABI, _SCOPES = 6, 0b11

# struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped. Older kernels take the longer one too, as long
# as what they do not know is 0 (lib, copy_struct_from_user).
_RULESET = struct.Struct("=QQQ")
# struct landlock_path_beneath_attr, packed: allowed_access, parent_fd.
_PATH_BENEATH = struct.Struct("=Qi")

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long


def abi() -> int:
    """Return the version of Landlock that this kernel has, 0 for none."""
    try:
        return _call(Syscall.LANDLOCK_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def restrict(version: int, folder: Path | None) -> None:
    """Open nothing more; in this folder files may be made, written, renamed and removed. version: of abi(). Raises OSError."""
    rights = (1 << _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]) - 1
    network = _NETWORK_RIGHTS if version >= _NETWORK_ABI else 0
    scopes = _SCOPES if version >= _SCOPE_ABI else 0
    handled = _RULESET.pack(rights, network, scopes)
    with Fd(_call(Syscall.LANDLOCK_CREATE_RULESET, handled, len(handled), 0)) as ruleset:
        if folder is not None:
            _allow_writing(ruleset, folder, rights)
        _call(Syscall.LANDLOCK_RESTRICT_SELF, ruleset.fileno(), 0)


def _allow_writing(ruleset: Fd, folder: Path, handled: int) -> None:
    """What replacing a file takes: a rename inside one folder makes a file there and removes one."""
    rights = (_WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE) & handled
    with Fd(os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as parent:
        rule = _PATH_BENEATH.pack(rights, parent.fileno())
        _call(Syscall.LANDLOCK_ADD_RULE, ruleset.fileno(), _RULE_PATH_BENEATH, rule, 0)


def _call(call: Syscall, *arguments: int | bytes | None) -> int:
    """Make a system call. Raises OSError."""
    words = [ctypes.c_long(each) if isinstance(each, int) else ctypes.c_char_p(each) for each in arguments]
    result = int(_LIBC.syscall(ctypes.c_long(call), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
