"""Who is told how a run goes on: a screen, progress.py, or nobody. Experiments call it; it decides nothing."""

from __future__ import annotations

from typing import Protocol

from balloonlab.timeline import Sample


class Watcher(Protocol):
    """Who is told how a run goes on."""

    def begin(self, phase: str) -> None:
        """A phase begins."""

    def end(self, text: str) -> None:
        """The phase has ended."""

    def sample(self, sample: Sample) -> None:
        """A sample was taken."""


class Nobody:
    """A watcher that looks away."""

    def begin(self, phase: str) -> None:
        """Nothing to show."""

    def end(self, text: str) -> None:
        """Nothing to show."""

    def sample(self, sample: Sample) -> None:
        """Nothing to show."""
