"""How much of what was given back is touched again soon: the price of giving it back.

Between two looks at guest RAM some ranges were released. What of them a look finds to be holes is gone, and what of that a
later look finds held was touched in between. Each byte counts once for each release of it. What is still held at the first
look after its release does not count: it was touched at once, or it was never freed, as where the kernel refused. So the
figure is a lower bound. Pure; meter.py takes the looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from balloonlab.measure.ranges import intersect, subtract, total
from hostdev.pages import Span, merge

# Long enough for a guest that frees and takes at once, as allocators do, and short of one that begins something else.
REFAULT_SECONDS = 10.0


@dataclass(frozen=True)
class _Batch:
    """What was released up to a look, was a hole then, and was not seen again since."""

    seconds: float
    spans: list[Span]


class Refaults:
    """Of one guest. bytes: released and touched again within REFAULT_SECONDS, so far."""

    def __init__(self) -> None:
        self.bytes = 0
        self._batches: list[_Batch] = []

    def look(self, seconds: float, released: Sequence[Span], held: Sequence[Span]) -> None:
        """Take a look: when, what was released since the last one, and what the host holds now, as places.

        held must have been read after the last of released was.
        """
        fresh = merge(released)
        waiting = [
            _Batch(batch.seconds, subtract(batch.spans, fresh))
            for batch in self._batches
            if seconds - batch.seconds <= REFAULT_SECONDS
        ]
        gone = _Batch(seconds, subtract(fresh, held))
        self._batches = [
            batch for batch in (*(self._seen(batch, held) for batch in waiting), gone) if batch.spans
        ]

    def _seen(self, batch: _Batch, held: Sequence[Span]) -> _Batch:
        again = intersect(batch.spans, held)
        self.bytes += total(again)
        return _Batch(batch.seconds, subtract(batch.spans, again))
