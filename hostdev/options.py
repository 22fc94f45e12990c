"""What a worker is started with: the command line's word about the device, and the keeper's about the occasion.

Used by launch.py, which makes the first, post.py, which makes the second, and worker.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hostdev import sandbox
from hostdev.discard import AUTO
from hostdev.wire.balloon import DEFAULT_FEATURES, Feature


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says about the device. guest: a label of its metrics, none if empty."""

    discard: str = AUTO
    hugetlb_release: bool = False
    features: Feature = DEFAULT_FEATURES
    metrics_file: Path | None = None
    trace_file: Path | None = None
    guest: str = ""
    sandbox: str = sandbox.AUTO


@dataclass(frozen=True, slots=True)
class Start:
    """How a worker begins. blamed: its predecessor died of itself. why_inert: it is to release nothing.

    waits: it is on trial, in a new version, and serves nothing before it is told to. makeshift: too many before it could not
    take over; it answers, if it comes to that, without what they left. lost: and that is out of date, whatever it is. quiet: there
    were many before it, and all is said. bus_errors: how many of them died of a touch of a mapping with nothing behind it (SIGBUS).
    """

    blamed: bool = False
    why_inert: str = ""
    waits: bool = False
    makeshift: bool = False
    lost: bool = False
    quiet: bool = False
    bus_errors: int = 0
