"""Text of a guest's, or of whoever wrote a file, as it may be shown: no colours, cursor movements or changed direction.

Pure. What reaches a terminal, a page or a message from a guest goes through here.
"""

from __future__ import annotations


def printable(text: str, most: int | None = None) -> str:
    """Return one line of text in at most so many printable characters: others are escaped, and a cut is shown."""
    cut = text if most is None else text[: most + 1]
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in cut
    )
    if most is None or (len(shown) <= most and len(cut) == len(text)):
        return shown
    return shown[: most - 1] + "…"


def paragraph(text: str, most: int, *, lines: int = 10) -> str:
    """Return a text of lines in at most so many printable characters and lines: its first and last ones, each cut."""
    whole = text.splitlines()
    if len(whole) > lines:
        whole = [*whole[: lines // 2], "…", *whole[len(whole) - (lines - 1 - lines // 2) :]]
    shown = [printable(line, most) for line in whole]
    if len("\n".join(shown)) > most:
        shown = [printable(line, most // len(whole) - 1) for line in whole]
    return "\n".join(shown)
