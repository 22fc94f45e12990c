"""Keeps what a guest, a front end or a client does from filling the log: each place that logs may do so only so often.

A filter on the handlers of a worker and of the control process, so that no line of theirs can be forgotten. What was left out is
counted, and said with the next line from the same place. Lines that were asked for by --log-level=debug are not limited.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

# Lines that one place may write at once: a guest that boots a few times, five rings, is not to notice.
BURST = 20
# Seconds after which it may write one more: 9000 lines a day, whatever goes on.
PERIOD = 10.0


@dataclass
class _Place:
    tokens: float
    since: float
    left_out: int = 0


class LogLimit(logging.Filter):
    """Lets at most BURST lines from one place in the source pass at once, and one every PERIOD seconds after."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._places: dict[tuple[str, int], _Place] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line is to be written; one that follows others that were not says how many."""
        if record.levelno <= logging.DEBUG:
            return True
        now = self._clock()
        place = self._places.setdefault((record.pathname, record.lineno), _Place(BURST, now))
        place.tokens = min(BURST, place.tokens + (now - place.since) / PERIOD)
        place.since = now
        if place.tokens < 1:
            place.left_out += 1
            return False
        place.tokens -= 1
        if place.left_out:
            record.msg = f"{record.getMessage()} ({place.left_out} more like it were left out)"
            record.args = None
            place.left_out = 0
        return True


def limit_log() -> None:
    """Limit what this process writes to the log from now on."""
    limit = LogLimit()
    for handler in logging.getLogger().handlers:
        handler.addFilter(limit)
