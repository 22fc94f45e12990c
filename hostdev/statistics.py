"""What the guest says of its memory, when it said so, and when it is to be asked again.

The device asks by returning the one buffer that it holds (virtio 1.3, 5.5.6.3); balloon.py does that, when is_due() says
so. As with QEMU's device the next question is put an interval after the last *answer*, so that a guest that does not
answer is not asked twice, and what it said last stays readable whatever happens. No I/O. Used by balloon.py and commands.py.

The figures are the guest's own and may be anything: for people to look at, not for decisions.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hostdev.errors import CommandError
from hostdev.wire.balloon import STATISTIC_NAMES, STATISTIC_STRUCT

# QEMU's bound and its words (hw/virtio/virtio-balloon.c, balloon_stats_set_poll_interval; read off 11.1.3).
MAX_INTERVAL = 0xFFFF_FFFF
# What QEMU prints for a tag that the guest did not send: -1 as an unsigned number.
ABSENT = (1 << 64) - 1


class Statistics:
    """The last answer and the schedule of questions. Times of the schedule are monotonic, in seconds."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self.values: dict[int, int] = {}
        self.interval = 0
        self.due: float | None = None
        # Seconds since the epoch by the host's clock; 0: never.
        self.last_update = 0
        # How many answers there were: who asked for a fresh one waits for another number.
        self.updates = 0

    def take(self, data: bytes) -> None:
        """Take an answer: what it does not hold is no longer known. A rest that is no whole entry is left out."""
        whole = len(data) - len(data) % STATISTIC_STRUCT.size
        self.values = dict(STATISTIC_STRUCT.iter_unpack(data[:whole]))
        self.last_update = int(self._wall_clock())
        self.updates += 1
        self.due = self._clock() + self.interval if self.interval else None

    def encoded(self) -> bytes:
        """Return the last answer as the guest would send it."""
        return b"".join(STATISTIC_STRUCT.pack(*figure) for figure in self.values.items())

    def restore(
        self, data: bytes, *, interval: int, due: float | None, last_update: int, updates: int
    ) -> None:
        """Go on with what another process was told: data as encoded() has it, due by the same clock."""
        self.take(data)
        self.interval, self.due = interval, due
        self.last_update, self.updates = last_update, updates

    def set_interval(self, seconds: int) -> None:
        """Ask every so many seconds from now on, 0: never. Raises CommandError."""
        if seconds < 0:
            raise CommandError("timer value must be greater than zero")
        if seconds > MAX_INTERVAL:
            raise CommandError("timer value is too big")
        if seconds == self.interval:
            return
        now = self._clock()
        if not seconds:
            self.due = None
        else:
            self.due = now + seconds if self.interval else now
        self.interval = seconds

    def ask_now(self) -> None:
        """Ask at the next opportunity, whatever the interval."""
        self.due = self._clock()

    def is_due(self) -> bool:
        """True if the guest is to be asked now."""
        return self.due is not None and self._clock() >= self.due

    def note_asked(self, *, asked: bool) -> None:
        """The question was put, and the guest's answer sets the next one; or there was no buffer to put it with."""
        self.due = None if asked or not self.interval else self._clock() + self.interval

    def named(self) -> dict[str, int]:
        """Return all that have a name, those that the guest did not send as ABSENT."""
        return {name: self.values.get(tag, ABSENT) for tag, name in enumerate(STATISTIC_NAMES)}

    def unnamed(self) -> dict[int, int]:
        """Return those that have none, by tag."""
        return {tag: value for tag, value in self.values.items() if tag >= len(STATISTIC_NAMES)}
