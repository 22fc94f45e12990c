"""A clock that stands still until it is told, and one that goes and leaps. Not a test; used by those of what goes by time."""

from __future__ import annotations

import mmap
import time

import pytest

from hostdev import keeper, post, worker_link


class Clock:
    """``now`` is what it says, in seconds."""

    def __init__(self, now: float = 50.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class KeepersClock:
    """The clock of keepers that are forked from now on, in memory that they share with the test, which can set it forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ahead = memoryview(mmap.mmap(-1, 8)).cast("Q")
        for module in (keeper, post, worker_link):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead[0]

    def skip(self, seconds: int) -> None:
        self._ahead[0] += seconds
