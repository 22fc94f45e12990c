"""A text of parts brought under a limit: the longest parts lose lines until all of it fits, and each says how many.

Pure. Used for the step summary, which a pipeline drops as a whole where it is too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The note on what was cut, with any number of lines.
_NOTE_BYTES = 80


@dataclass(frozen=True)
class Part:
    """opening and closing stay whatever happens; of the lines in between the last ones go."""

    opening: str
    lines: tuple[str, ...] = ()
    closing: str = ""

    @property
    def size(self) -> int:
        """Bytes of all of it, joined."""
        return size(self.opening, *self.lines, self.closing)


def size(*texts: str) -> int:
    """Bytes of texts that each end with a line feed; one that is empty is left out."""
    return sum(len(text.encode()) + 1 for text in texts if text)


def fit(parts: Sequence[Part], limit: int) -> str:
    """Return the parts one after the other in at most so many bytes, if openings and closings alone are below that."""
    each = _share([part.size for part in parts], limit)
    return "".join(_joined(_cut(part, each)) for part in parts)


def _share(sizes: Sequence[int], limit: int) -> int:
    """Return the largest size that every part may have, so that all together stay below the limit.

    From the shortest part on: what it does not need of an equal share is for the longer ones.
    """
    left, share = limit, limit
    for done, length in enumerate(sorted(sizes)):
        share = left // (len(sizes) - done)
        if length > share:
            return share
        left -= length
    return limit


def _cut(part: Part, most: int) -> Part:
    if part.size <= most:
        return part
    room = most - size(part.opening, part.closing) - _NOTE_BYTES
    kept = 0
    for line in part.lines:
        room -= size(line)
        if room < 0:
            break
        kept += 1
    note = f"\nCut here, {len(part.lines) - kept} lines are left out: report.html has them."
    return Part(part.opening, (*part.lines[:kept], note), part.closing)


def _joined(part: Part) -> str:
    return "".join(f"{text}\n" for text in (part.opening, *part.lines, part.closing) if text)
