"""Sizes as people write and read them. Files get exact bytes; only the screen and the command line get these.

Pure. A size is a number of bytes; units are powers of 1024 whether they are written M, MB or MiB, as in QEMU and virsh.
"""

from __future__ import annotations

import re
from decimal import Decimal

from balloonlab.errors import UsageError

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_NAMES = ("bytes", "KiB", "MiB", "GiB", "TiB")
# The length of a file is a signed 64-bit number (off_t), and guest RAM is a file.
_LIMIT = 1 << 63


def parse_size(text: str) -> int:
    """Return the bytes of "600M", "1.5 GiB" or "4096". Raises UsageError."""
    matched = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b(?:ytes?)?)?\s*", text.lower())
    if matched is None:
        raise UsageError(f"{text!r} is no size: write it like 600M or 1.5G")
    size = Decimal(matched[1]) * 1024 ** _UNITS[matched[2]]
    if size >= _LIMIT:
        raise UsageError(f"{text!r} is more than a file can hold: write it like 600M or 1.5G")
    return int(size)


def human(size: float) -> str:
    """Return a size with three digits at least: "581 MiB", "1.1 GiB"."""
    power = 0
    while abs(size) >= 1024 and power < len(_NAMES) - 1:
        size /= 1024
        power += 1
    digits = 1 if abs(size) < 10 and power else 0
    return f"{size:.{digits}f} {_NAMES[power]}"
