"""What guest, QEMU and device wrote, as sections of a failed test's report. Standard library only.

The texts are a guest's and not to be trusted with a terminal: control characters come out as what they are.
"""

from __future__ import annotations

import re
from pathlib import Path

# Enough for a boot's log and a panic in full; a report of many failed tests stays readable by machines.
MOST_BYTES = 64 << 10

_FILES = (
    ("console.log", "balloon: the guest's console"),
    ("qemu.log", "balloon: QEMU"),
    ("device.log", "balloon: the device"),
)
# C0 and C1 controls but newline and tab: they move cursors and set titles.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class HasLogs:
    """Something that was started and writes into a folder. ``folder`` has its logs."""

    folder: Path


def sections(folder: Path) -> list[tuple[str, str]]:
    """Return (title, text) for each log in a folder that is not empty, the last MOST_BYTES of each."""
    found = [(title, tail(folder / name)) for name, title in _FILES]
    return [(title, text) for title, text in found if text]


def tail(path: Path) -> str:
    """Return the end of a log, printable; empty if there is no such file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - MOST_BYTES))
            text = file.read(MOST_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return ""
    before = f"({size - MOST_BYTES} bytes before this are left out)\n" if size > MOST_BYTES else ""
    return before + printable(text)


def printable(text: str) -> str:
    """Return a text whose lines end by newlines alone and whose control characters are written out."""
    return _CONTROL.sub(lambda matched: f"\\x{ord(matched[0]):02x}", text.replace("\r\n", "\n"))
