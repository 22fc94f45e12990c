"""The parent: listens, owns the front ends' connections, forks the workers and the control process.

Whose message means what is for others to know: guest.py relays a front end's to its worker, and puts another in the place
of one that dies; of the control process the keeper takes a few wishes, and parses no JSON. What it holds of a guest
outlives the workers, so it is small and does little.

No threads, no asyncio, no guest memory: asyncio does not survive the fork that every worker comes from. The other of the
two loops that may never die, for QEMU's generic vhost-user device does not survive a closed socket.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import selectors
import signal
import socket
import time
from collections.abc import Callable

from hostdev import sandbox
from hostdev.control_desk import ControlDesk
from hostdev.control_socket import ControlSocket
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS, CommandError
from hostdev.guest import Guest, Setting
from hostdev.handover import Handover
from hostdev.options import Options
from hostdev.place import INHERITED, Place
from hostdev.signals import TERMINATING, Signals
from hostdev.takeover import Left
from hostdev.waiting_parent import wait_for_heirs
from hostdev.wishes import Wishes

log = logging.getLogger(__name__)

# Seconds that a keeper which is to end waits for its front ends to go, unless told otherwise.
TERM_SECONDS = 60.0


class Keeper:
    """Serves front ends until told to end."""

    def __init__(
        self,
        options: Callable[[str], Options],
        *,
        once: bool = False,
        control: ControlSocket | None = None,
        term_seconds: float = TERM_SECONDS,
        confined: str = sandbox.AUTO,
    ) -> None:
        """options: of the guest with this name. once: end when a front end has gone and none is left.

        control: where the control process listens. term_seconds: how long to wait, when told to end, for the front ends
        that are served; 0 not to. confined: the control process, as --sandbox has it.
        """
        self._options = options
        self._once = once
        self._term_seconds = term_seconds
        self.places: dict[str, Place] = {}
        self.is_stopping = False
        self.term_at: float | None = None
        self.crashed = False
        self._selector = selectors.DefaultSelector()
        self.signals = Signals()
        self._handover = Handover(self, self._selector)
        self.control = ControlDesk(
            control, self._selector, self.places, Wishes(self), self._handover.ask, confined=confined
        )

    # Places

    def add(self, place: Place) -> None:
        """Serve who connects there. Raises CommandError if there is a place of this name, or all is ending."""
        if self.is_stopping or self.term_at is not None:
            raise CommandError("the device is ending")
        if place.name in self.places:
            raise CommandError(f"there is a guest {place.name!r} already: choose another name for the socket")
        self.places[place.name] = place
        self.control.announce(place)

    def remove(self, name: str) -> None:
        """Serve nobody there any more. Raises CommandError if there is no such place or a front end is connected."""
        place = self.places.get(name)
        if place is None:
            raise CommandError(f"there is no guest {name!r}")
        if place.guest is not None and place.guest.is_served and not place.guest.has_gone():
            raise CommandError(f"guest {name!r} is connected: its VM would not survive")
        self._close(place)
        place.is_leaving = True
        if place.guest is None:
            self._forget(place)
        else:
            place.guest.end()

    def _forget(self, place: Place) -> None:
        del self.places[place.name]
        self.control.withdraw(place)

    def _close(self, place: Place) -> None:
        if place.acceptor is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(place.acceptor.listener)
        place.close()

    @property
    def guests(self) -> list[Guest]:
        """Those that are served, or are being seen off."""
        return [place.guest for place in self.places.values() if place.guest is not None]

    @property
    def is_serving(self) -> bool:
        """True while a front end is connected. Sees off those that have gone and were not seen to."""
        for place in self.places.values():
            if place.guest is not None and place.guest.is_served and place.guest.has_gone():
                place.guest.end()
        return any(place.is_connected for place in self.places.values())

    # The loop

    def run(self, connection: socket.socket | None = None) -> int:
        """Serve connection if given, and those that arrive. Returns the exit status."""
        with self.signals as signals:
            with self._selector:
                for source in signals.sources:
                    take = functools.partial(self._take_signals, signals, source)
                    self._selector.register(source, selectors.EVENT_READ, take)
                self._start(connection)
                while not self.is_stopping and self._has_anything_to_do():
                    self._turn()
                self._end_all()
            if self._handover.is_done and not signals.is_told:
                signals.pass_on()
                return wait_for_heirs(self._handover.others)
        return EXIT_CHECK_FAILED if self.crashed else EXIT_PASS

    def _start(self, connection: socket.socket | None) -> None:
        for guest in self.guests:
            guest.go()
        self.control.start()
        if connection is not None:
            self.add(Place(INHERITED))
            self._begin(self.places[INHERITED], connection)

    def _has_anything_to_do(self) -> bool:
        return any(place.guest is not None or place.acceptor is not None for place in self.places.values())

    def _turn(self) -> None:
        # A look more when time is up: what came at that moment, such as that we were stopped ourselves, is heard first.
        for key, _events in self._selector.select(self._timeout()) or self._selector.select(0):
            try:
                key.data()
            except Exception:
                log.exception("unexpected error in the keeper")
        for tick in (*(guest.tick for guest in self.guests), self._handover.tick, self.control.tick):
            try:
                tick()
            except Exception:
                log.exception("unexpected error in the keeper")
        if self.term_at is not None and not self.is_stopping:
            if not self.guests:
                self.is_stopping = True
            elif time.monotonic() >= self.term_at:
                self.end_now(f"waited {self._term_seconds:g} s")

    def _timeout(self) -> float | None:
        """Seconds until something is to be done without being called; None for as long as it takes."""
        now = time.monotonic()
        pauses = [self._watch_listener(place) for place in self.places.values()]
        moments = [guest.due() for guest in self.guests] + [self._handover.due(), self.control.due()]
        if not self.is_stopping:
            moments.append(self.term_at)
        waits = [max(0.0, moment - now) for moment in moments if moment is not None]
        return min([*waits, *(pause for pause in pauses if pause is not None)], default=None)

    def _watch_listener(self, place: Place) -> float | None:
        """Have a listener watched unless it is to be left alone. Returns for how many seconds it is."""
        if place.acceptor is None:
            return None
        listener = place.acceptor.listener
        pause = place.acceptor.pause()
        is_ending = place.guest is not None and not place.guest.is_served
        registered = listener.fileno() in self._selector.get_map()
        if pause is None and not is_ending and not registered:
            self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(place))
        elif (pause is not None or is_ending) and registered:
            self._selector.unregister(listener)
        return pause

    def _end_all(self) -> None:
        """See everybody off, within the time that guests give their workers."""
        self._handover.abandon("the device is ending")
        for place in list(self.places.values()):
            self._close(place)
            if place.guest is not None:
                place.guest.end()
        while self.guests:
            self._turn()
        self.control.close()

    # Signals

    def _take_signals(self, signals: Signals, source: socket.socket) -> None:
        for number in signals.take(source):
            if number in TERMINATING:
                self._terminate(signal.Signals(number).name)
            if number == signal.SIGHUP:
                self._handover.ask()
            for guest in self.guests:
                if number == signal.SIGCHLD:
                    guest.note_stop()
                if number == signal.SIGCONT:
                    guest.forgive()
        if source not in signals.sources:
            self._selector.unregister(source)

    def _terminate(self, why: str) -> None:
        """End, though not under a VM that lives: QEMU would not survive. A second signal does not wait for that."""
        if not self.is_serving or not self._term_seconds or self.term_at is not None:
            self.end_now(why)
            return
        self.term_at = time.monotonic() + self._term_seconds
        # First: who sees the line below, or that a socket has gone, may rely on it.
        for guest in self.guests:
            guest.make_inert(f"the device is ending: {why}")
        log.warning(
            "%s: a front end is connected, and QEMU does not survive that its device goes: waiting up to %g s for it to "
            "go first, releasing nothing any more; signal again to end now",
            why,
            self._term_seconds,
        )
        for place in self.places.values():
            self._close(place)

    def end_now(self, why: str) -> None:
        """End, whoever is connected."""
        self.is_stopping = True
        if self.is_serving:
            log.warning(
                "%s: ending while a front end is connected: QEMU aborts at its guest's next look", why
            )
        else:
            log.info("%s: ending", why)

    # Guests

    def _accept(self, place: Place) -> None:
        if place.acceptor is None:
            return  # closed by an event of the same select()
        if place.guest is not None and place.guest.has_gone():
            # A VM that is started again at once must not find its predecessor in the way: it waits for that one's end.
            place.guest.end()
            return
        connection = place.acceptor.accept()
        if connection is None:
            return
        if place.guest is not None:
            log.warning("a second front end is turned away: one is being served")
            connection.close()
            return
        self._begin(place, connection)

    def _begin(self, place: Place, connection: socket.socket) -> None:
        try:
            place.guest = Guest(connection, self._setting(place))
        except OSError as error:
            log.error("a front end is turned away: no record can be made for it: %s", error.strerror)  # noqa: TRY400
            connection.close()
            return
        log.info("front end connected")
        place.guest.begin()

    def _setting(self, place: Place) -> Setting:
        return Setting(
            place.name,
            self._options(place.name),
            self._selector,
            self.control.link,
            lambda guest: self._note_end(place, guest),
        )

    def _note_end(self, place: Place, guest: Guest) -> None:
        log.info("front end has gone")
        place.guest = None
        self.crashed = not guest.ended_well or self.crashed
        if place.is_leaving:
            self._forget(place)
        else:
            self.control.announce(place)
        if self._once and not self.is_serving:
            self.is_stopping = True

    # From one version to another

    def adopt(self, left: Left) -> list[Guest]:
        """Take what another version leaves, before run(). Returns the guests: their workers are yet to be prepared."""
        self.signals = Signals(left.signals)
        for place in left.places:
            self.add(place)
            if place.name in left.guests:
                place.guest = Guest.adopted(left.guests[place.name], self._setting(place))
        # Last: nobody is added to what is ending.
        self.term_at, self.crashed = left.term_at, left.crashed
        return self.guests

    def leave(self) -> None:
        """Everything is another version's: let go of it, and end."""
        for place in self.places.values():
            place.guest = None
            place.disown()
            self._close(place)
        self.control.leave()
        self.is_stopping = True
