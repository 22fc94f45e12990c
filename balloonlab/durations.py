"""Durations as people write them: "2s", "100ms", "10min". Pure; everything inside counts in seconds."""

from __future__ import annotations

import re

from balloonlab.errors import UsageError

_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """Return the seconds of "10min", "2 s" or "1.5". Raises UsageError."""
    matched = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|min|m|h|d|)\s*", text.lower())
    if matched is None:
        raise UsageError(f"{text!r} is no duration: write it like 100ms, 2s or 10min")
    return float(matched[1]) * _UNITS[matched[2]]
