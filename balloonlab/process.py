"""What the host says of a process: CPU time and memory, from /proc. Reads only; a process that has ended counts 0."""

from __future__ import annotations

import os
import re
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# proc(5): after the name in parentheses, utime, stime, cutime and cstime are fields 14 to 17 of stat, so 11 to 14 of what
# follows; the last two are of the children that have ended and were waited for.
_OWN, _ALL = slice(11, 13), slice(11, 15)
# minflt and majflt are fields 10 and 12.
_FAULTS = (7, 9)


def children(pid: int) -> list[int]:
    """Process ids of the direct children."""
    return [int(word) for word in _read(f"/proc/{pid}/task/{pid}/children").split()]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, in seconds; the clock tick is usually 10 ms."""
    return _seconds(pid, _OWN)


def family_seconds(pid: int) -> float:
    """User and system time of a process and its children, those included that have ended."""
    return _seconds(pid, _ALL) + sum(cpu_seconds(child) for child in children(pid))


def _seconds(pid: int, fields: slice) -> float:
    words = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return sum(int(word) for word in words[fields]) / _TICKS


def faults(pid: int) -> int:
    """Page faults that a process has taken, minor and major."""
    words = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return sum(int(words[field]) for field in _FAULTS) if words else 0


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
