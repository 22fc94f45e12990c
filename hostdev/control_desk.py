"""The keeper's desk for the control process: tells it of all places, hears what it wishes, puts another in its place.

Used by keeper.py. The process itself and its channel are control_link.py's, what may be wished is wishes.py's.
"""

from __future__ import annotations

import contextlib
import functools
import selectors
import socket
from collections.abc import Callable, Mapping

from hostdev import sandbox
from hostdev.control_link import ControlLink
from hostdev.control_socket import ControlSocket
from hostdev.place import Place
from hostdev.wire.control import Envelope, Kind, refusal
from hostdev.wishes import Wishes


class ControlDesk:
    """A desk that nobody comes to if there is no control socket."""

    def __init__(
        self,
        control: ControlSocket | None,
        selector: selectors.BaseSelector,
        places: Mapping[str, Place],
        wishes: Wishes,
        upgrade: Callable[[Envelope], None],
        *,
        confined: str = sandbox.AUTO,
    ) -> None:
        """upgrade: what answers an UPGRADE, in its own time. confined: as --sandbox has it."""
        self.socket = control
        self._selector = selector
        self._places = places
        self._wishes = wishes
        self._upgrade = upgrade
        self.link: ControlLink | None = None
        if control is not None and control.listener is not None:
            self.link = ControlLink(control.listener, watch=self._watch, confined=confined)
        # The channel as the selector knows it, and what it was told to wait for there.
        self._watched: socket.socket | None = None
        self._events = 0

    @property
    def listener(self) -> socket.socket | None:
        """Where clients connect, None where nobody listens any more."""
        is_open = self.link is not None and not self.link.is_given_up
        return self.socket.listener if self.socket is not None and is_open else None

    def start(self) -> None:
        """Have a control process."""
        if self.link is not None:
            self.link.start(self._tell_all)
            self._settle(self.link)

    def _tell_all(self) -> None:
        for place in self._places.values():
            self.announce(place)

    def _settle(self, link: ControlLink) -> None:
        """There is a control process, or the workers are to know that there is none any more."""
        for place in self._places.values():
            if link.is_given_up and place.guest is not None:
                place.guest.forget_control()
        self._watch()

    def _watch(self) -> None:
        """Have the selector know the channel as it is now."""
        assert self.link is not None
        channel, events = self.link.channel, self.link.wanted
        if (channel, events) == (self._watched, self._events):
            return
        if self._watched is not None:
            self._selector.unregister(self._watched)
        self._watched, self._events = (channel, events) if events else (None, 0)
        if self._watched is not None:
            serve = functools.partial(self._serve, self.link, self._watched)
            self._selector.register(self._watched, events, serve)

    def announce(self, place: Place) -> None:
        """Tell of a place and its guest."""
        if self.link is not None:
            self.link.announce(place.name, None if place.guest is None else place.guest.control)

    def withdraw(self, place: Place) -> None:
        """Tell that it is a place no longer."""
        if self.link is not None:
            self.link.withdraw(place.name)

    def answer(self, envelope: Envelope) -> None:
        """Answer what was asked some time ago."""
        if self.link is not None:
            self.link.answer(envelope)

    def due(self) -> float | None:
        """When tick() is to be called at the latest, by the monotonic clock; None for never."""
        return None if self.link is None else self.link.due()

    def tick(self) -> None:
        """Have done what the time has come for."""
        if self.link is not None:
            self.link.tick()

    def _serve(self, link: ControlLink, channel: socket.socket) -> None:
        if link.channel is not channel:
            return  # closed by an event of the same select()
        if link.is_waiting:
            link.flush()
            return
        with contextlib.suppress(BlockingIOError):  # what waited has gone meanwhile
            self._act(link, link.receive())

    def _act(self, link: ControlLink, envelope: Envelope | None) -> None:
        if envelope is not None and envelope.kind == Kind.UPGRADE:
            self._upgrade(envelope)
            return
        if envelope is not None and (answer := self._wishes.grant(envelope)) is not None:
            link.answer(answer)
            return
        # It has ended, or says what it has no business to.
        link.replace(self._tell_all)
        self._settle(link)

    def refuse_all(self, why: str) -> None:
        """Refuse what has been asked and not been heard yet."""
        if self.link is None or self.link.channel is None:
            return
        with contextlib.suppress(BlockingIOError):
            while (envelope := self.link.receive()) is not None:
                self.link.answer(refusal(envelope.id, why))

    def close(self) -> None:
        """End the control process."""
        if self.link is not None:
            self.link.close()

    def leave(self) -> None:
        """Socket and folder are another version's: let go of them."""
        self.close()
        if self.socket is not None:
            self.socket.disown()
            self.socket.close()
