"""Who wants to know what the guest could give up: rounds of hinting, opened, shared and answered.

A round costs the guest all of its free memory for as long as it lasts, so all who ask while one is open share it, it ends
when the last of them has gone, and there is a pause before the next. What happens in a round is hinting.py's. Used by
commands.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from hostdev.balloon import Balloon
from hostdev.errors import CommandError
from hostdev.session import Session

# Seconds between two rounds. Linux gives the pages of a round back when its work queue has read DONE, a matter of
# milliseconds, and not if it reads the id of the next round first (report_free_page_func, 6.12); and nothing shows what it
# has read, for QEMU reads all of config space for each field.
PAUSE_SECONDS = 0.5


class Estimates:
    """The commands estimate-free that are under way, by their ids."""

    def __init__(
        self,
        balloon: Balloon,
        session: Session,
        clock: Callable[[], float],
        answer: Callable[[int, object], None],
    ) -> None:
        """answer: how an id gets its value."""
        self._balloon = balloon
        self._session = session
        self._clock = clock
        self._answer = answer
        self.asking: set[int] = set()
        self._next_round = 0.0
        # The asking want a round that has not begun yet.
        self._waits = False

    def ask(self, number: int) -> None:
        """Take a question. Raises CommandError if the guest cannot be asked."""
        channel = self._session.backend_channel
        if channel is None or channel.is_broken:
            raise CommandError("the front end gave the device no channel, so that its guest cannot be told")
        if not self._balloon.hinting.is_open:
            self._waits = True
        self.asking.add(number)
        self.tick()

    def forget(self, number: int) -> None:
        """Who asked has gone: the guest gets its memory back if nobody else did."""
        if number in self.asking:
            self.asking.discard(number)
            if not self.asking:
                self._waits = False
                self._balloon.end_hinting()
                self._note_end()

    def tick(self) -> None:
        """Open the round that is wanted, when it may be; answer all when it has ended."""
        if self._waits and self._clock() >= self._next_round:
            self._waits = False
            self._balloon.begin_hinting()
        if self.asking and not self._waits and not self._balloon.hinting.is_open:
            self._note_end()
            self._answer_all()

    def due(self) -> float | None:
        """When tick() is to be called at the latest, by the clock; None for never."""
        return self._next_round if self._waits else None

    def _note_end(self) -> None:
        self._next_round = self._clock() + PAUSE_SECONDS

    def _answer_all(self) -> None:
        result = self._balloon.hinting.result
        assert result is not None
        memory = self._balloon.known_memory()
        for number in self.asking:
            self._answer(number, asdict(result) | {"bytes": min(result.bytes, memory)})
        self.asking.clear()
