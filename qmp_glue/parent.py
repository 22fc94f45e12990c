"""A child process that does not outlive the thread that started it, by whatever that ends, SIGKILL included.

Standard library only. Used wherever a process is started that would serve on for nobody.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["die_with_parent"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """Return a preexec_fn by which the kernel sends the child a signal when the calling thread ends.

    It runs between fork and exec: only two system calls, since other threads may hold locks.
    """
    parent, prctl = os.getpid(), _libc.prctl

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it ended before the request took hold
            os._exit(1)

    return prepare
