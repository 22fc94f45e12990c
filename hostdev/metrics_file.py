"""The file that a device's counters are kept in, brought up to date now and then while they change. Used by worker.py."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from hostdev.metrics import Metrics

log = logging.getLogger(__name__)

# How stale the file may be, in seconds, while something changes. While nothing does there is no wake-up.
PERIOD = 0.5


class MetricsFile:
    """One device's file, or none. ``due``: when it is to be written, by the monotonic clock; None for never."""

    def __init__(self, metrics: Metrics, path: Path | None) -> None:
        self._metrics = metrics
        self._path = path
        self.due: float | None = None

    def touch(self) -> None:
        """Something may have changed."""
        if self._path is not None and self.due is None:
            self.due = time.monotonic() + PERIOD

    def tick(self) -> None:
        """Write it if it is time to."""
        if self.due is not None and time.monotonic() >= self.due:
            self.write()

    def write(self) -> None:
        """Write it. The first failure is the last try."""
        self.due = None
        if self._path is None:
            return
        try:
            self._metrics.write(self._path)
        except OSError as error:
            log.error("no more metrics: %s: %s", self._path, error.strerror)  # noqa: TRY400
            self._path = None
