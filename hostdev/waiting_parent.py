"""What a keeper is once another version has taken over from it: the process that people know, and nothing else.

It keeps the process id, passes signals on and ends with the status of the keeper at work. However many take over, one of
these is enough: it adopts what its descendants leave (PR_SET_CHILD_SUBREAPER), so a later keeper that hands over just
ends, and its successor becomes our child. Used by keeper.py and handover.py.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Set as AbstractSet
from pathlib import Path

from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS

# linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of what our descendants leave. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def children() -> frozenset[int]:
    """Process ids of our children, orphans that became ours included. Raises OSError where the kernel does not tell."""
    pid = os.getpid()
    return frozenset(int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def wait_for_heirs(others: AbstractSet[int]) -> int:
    """Wait while there are children. Returns the exit status: of the one that did not end well, or else 0.

    others: children that were there before us, such as those of a shell that became this process.
    A keeper that hands over ends with 0 when its successor is our child already. Of one that dies we get the workers too,
    which end by themselves.
    """
    status = EXIT_PASS
    while children() - others:
        pid, ended = os.waitpid(-1, 0)
        code = os.waitstatus_to_exitcode(ended)
        if code and pid not in others:
            status = code if code > 0 else EXIT_CHECK_FAILED
    return status
