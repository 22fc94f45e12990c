"""How often workers are started, and what is to be thought of those that die before they serve. Used by guest.py."""

from __future__ import annotations

import collections

# Workers started within so many seconds, after which the next has to wait: one that dies at once is not to take a CPU.
MAX_STARTS = 5
STARTS_SECONDS = 1.0
# Workers that died before they served, after which the next is to release nothing.
MAX_STILLBORN = 5


class Births:
    """The workers of one guest. Times are of the monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._starts: collections.deque[float] = collections.deque(maxlen=MAX_STARTS)
        self._stillborn = 0
        # True once what predecessors left is out of date: every one to come is makeshift.
        self.is_lost = False
        # Whether the last one came to serve.
        self.has_served = False
        # How many could not be started at all.
        self.failures = 0

    def next_at(self, now: float) -> float:
        """When the next may be started, now at the earliest."""
        if len(self._starts) < MAX_STARTS:
            return now
        return max(now, self._starts[0] + STARTS_SECONDS)

    def note(self, now: float) -> None:
        """One is started."""
        self._starts.append(now)
        self.has_served = False

    def note_failure(self) -> None:
        """The host had no room for one."""
        self.failures += 1

    def note_death(self) -> None:
        """One has died. Until the next says that it serves it counts as one that never did."""
        self._stillborn += 1

    def note_life(self) -> None:
        """One serves."""
        self._stillborn = 0
        self.has_served = True

    @property
    def is_makeshift(self) -> bool:
        """True if the next is to serve without what cannot be taken over."""
        return self.is_lost or self._stillborn >= MAX_STILLBORN

    @property
    def why_inert(self) -> str:
        """Why the next is to release nothing, empty if it may."""
        if self.is_lost:
            return "what its predecessors left is out of date"
        if self._stillborn < MAX_STILLBORN:
            return ""
        return f"{self._stillborn} workers in a row died before they served"
