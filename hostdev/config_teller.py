"""When the front end is told that config space has changed, and when that has reached it.

Not while it stops its rings or has stopped them: a back end must not send any message then, and QEMU dies of this one,
which is why it goes in two parts (backend_channel.py). Used by worker.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hostdev.backend_channel import BackendChannel
from hostdev.balloon import Balloon
from hostdev.session import Session

# Seconds that answers wait for the front end to be told. QEMU takes 50 us; one that takes longer than this hangs, and its
# user will want to know what the device has to say.
TAKING_SECONDS = 1.0


class ConfigTeller:
    """Watches one device's config space on behalf of its front end."""

    def __init__(
        self, balloon: Balloon, session: Session, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._balloon = balloon
        self._session = session
        self._clock = clock
        # Since when there is something to tell that could be told; None while there is not.
        self._since: float | None = None

    @property
    def _channel(self) -> BackendChannel | None:
        """The channel, if the front end has given one and takes messages on it."""
        channel = self._session.backend_channel
        return None if channel is None or channel.is_broken else channel

    def tell(self, has_message: Callable[[], bool]) -> None:
        """Take the next step. has_message: tells if the front end has sent something that was not handled yet."""
        if self._since is None and not self._balloon.space.changed:
            return
        channel = self._channel
        if channel is None:
            # Its guest reads config space when it likes, and cannot be told anything.
            self._balloon.space.changed = False
        elif channel.is_half_sent:
            self._go_on(channel)
        elif self._balloon.space.changed and self._session.may_tell and not has_message():
            channel.begin()
        self._note_time()

    def _go_on(self, channel: BackendChannel) -> None:
        if not self._session.may_tell:
            channel.finish(has_stopped=True)
        elif channel.was_taken():
            self._balloon.space.changed = False
            channel.finish(has_stopped=False)

    def _note_time(self) -> None:
        channel = self._channel
        is_half_sent = channel is not None and channel.is_half_sent
        if not is_half_sent and not (self._balloon.space.changed and self._session.may_tell):
            self._since = None
        elif self._since is None:
            self._since = self._clock()

    @property
    def is_settled(self) -> bool:
        """True unless there is something to tell, for as long as that is worth waiting for.

        Who asked for a change is answered only then: what is done next may depend on it. A device that is stopped has
        nothing to tell until it runs again.
        """
        return self._since is None or self._clock() >= self._since + TAKING_SECONDS

    def waits_for(self) -> int | None:
        """Return the descriptor that is readable when there is a next step, None if there is none to wait for."""
        channel = self._channel
        if self._since is None or channel is None:
            return None
        is_held_up = self._balloon.space.changed and self._session.may_tell and channel.has_unread
        return channel.fileno() if channel.is_half_sent or is_held_up else None

    def due(self) -> float | None:
        """When to look again at the latest, by the clock; None for never."""
        return None if self._since is None or self.is_settled else self._since + TAKING_SECONDS
