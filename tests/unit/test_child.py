"""Forked processes: what the collector passes over in parent and child."""

from __future__ import annotations

import errno
import gc
import os
import signal

import pytest

from hostdev.child import Child
from hostdev.driver import DEADLINE
from tests.device_program import children


def test_a_fork_freezes_the_childs_heap_alone() -> None:
    """What the parent froze at each fork it would never collect."""
    before = gc.get_freeze_count()
    child = Child("child", lambda: 0 if gc.get_freeze_count() > before else 1)
    assert child.has_ended(DEADLINE)
    assert child.reap()
    assert gc.get_freeze_count() == before


def test_a_child_that_cannot_be_watched_is_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is left for it: it is ended and reaped at once, or there would be one more at each try."""

    def fails(_pid: int) -> int:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(os, "pidfd_open", fails)
    before = children(os.getpid())
    with pytest.raises(OSError, match="too many"):
        Child("child", _wait)
    assert children(os.getpid()) == before


def _wait() -> int:
    signal.pause()
    return 0
