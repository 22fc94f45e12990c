"""What the host says of a process: CPU time and memory, from /proc. Reads only; a process that has ended counts 0."""

from __future__ import annotations

import os
import re
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# proc(5): after the name in parentheses, utime and stime are fields 14 and 15 of stat, so 11 and 12 of what follows.
_UTIME, _STIME = 11, 12


def children(pid: int) -> list[int]:
    """Process ids of the direct children."""
    return [int(word) for word in _read(f"/proc/{pid}/task/{pid}/children").split()]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, in seconds; the clock tick is usually 10 ms."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[_UTIME]) + int(fields[_STIME])) / _TICKS if fields else 0.0


def anonymous_bytes(pid: int) -> int:
    """RssAnon: what a process holds of its own, guest RAM in a shared file left out."""
    return _kilobytes(_read(f"/proc/{pid}/status"), "RssAnon")


def proportional_bytes(pid: int) -> int:
    """PSS: what a process holds, shared pages divided among their sharers."""
    return _kilobytes(_read(f"/proc/{pid}/smaps_rollup"), "Pss")


def _kilobytes(text: str, name: str) -> int:
    matched = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(matched[1]) * 1024 if matched else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
