"""How many steps the state machines have run, for the summary at the end of the tests. Not a test."""

from __future__ import annotations

from collections import Counter

_steps: Counter[str] = Counter()


def count_step(machine: str) -> None:
    """Count a step of this machine."""
    _steps[machine] += 1


def steps() -> dict[str, int]:
    """Return the steps of each machine so far."""
    return dict(_steps)
