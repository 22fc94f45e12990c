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
