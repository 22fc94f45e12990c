"""The parent: listens, owns the front ends' connections, forks the workers and the control process.

Whose message means what is for others to know: guest.py relays a front end's to its worker, and puts another in the place
of one that dies; of the control process the keeper takes a few wishes, and parses no JSON. What it holds of a guest
outlives the workers, so it is small and does little.

No threads, no asyncio, no guest memory: asyncio does not survive the fork that every worker comes from. The other of the
two loops that may never die, for QEMU's generic vhost-user device does not survive a closed socket.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator

from hostdev.control_link import ControlLink
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS, CommandError
from hostdev.guest import Guest, Setting
from hostdev.place import INHERITED, Place
from hostdev.wishes import Wishes
from hostdev.worker import Options

log = logging.getLogger(__name__)

TERMINATING = (signal.SIGTERM, signal.SIGINT)
_HANDLED = (*TERMINATING, signal.SIGCHLD, signal.SIGCONT, signal.SIGHUP)

# Seconds that a keeper which is to end waits for its front ends to go, unless told otherwise.
TERM_SECONDS = 60.0


class Keeper:
    """Serves front ends until told to end."""

    def __init__(
        self,
        options: Callable[[str], Options],
        *,
        once: bool = False,
        control: socket.socket | None = None,
        term_seconds: float = TERM_SECONDS,
    ) -> None:
        """options: of the guest with this name. once: end when a front end has gone and none is left.

        control: where the control process listens. term_seconds: how long to wait, when told to end, for the front ends
        that are served; 0 not to.
        """
        self._options = options
        self._once = once
        self._term_seconds = term_seconds
        self._control = None if control is None else ControlLink(control)
        self.places: dict[str, Place] = {}
        self._stopping = False
        self._term_at: float | None = None
        self._crashed = False
        self._selector = selectors.DefaultSelector()
        self._wishes = Wishes(self)

    # Places

    def add(self, place: Place) -> None:
        """Serve who connects there. Raises CommandError if there is a place of this name."""
        if place.name in self.places:
            raise CommandError(f"there is a guest {place.name!r} already: choose another name for the socket")
        self.places[place.name] = place
        self._announce(place)

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
        if self._control is not None:
            self._control.withdraw(place.name)

    def _close(self, place: Place) -> None:
        if place.acceptor is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(place.acceptor.listener)
        place.close()

    def _announce(self, place: Place) -> None:
        if self._control is not None:
            self._control.announce(place.name, None if place.guest is None else place.guest.control)

    @property
    def _guests(self) -> list[Guest]:
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
        with self._signals() as wakeup, self._selector:
            self._selector.register(wakeup, selectors.EVENT_READ, lambda: self._take_signals(wakeup))
            if self._control is not None:
                self._control.start()
                self._watch_control(self._control)
            for place in self.places.values():
                self._announce(place)
            if connection is not None:
                self.add(Place(INHERITED))
                self._begin(self.places[INHERITED], connection)
            while not self._stopping and self._has_anything_to_do():
                self._turn()
            self._end_all()
        return EXIT_CHECK_FAILED if self._crashed else EXIT_PASS

    def _has_anything_to_do(self) -> bool:
        return any(place.guest is not None or place.acceptor is not None for place in self.places.values())

    def _turn(self) -> None:
        # A look more when time is up: what came at that moment, such as that we were stopped ourselves, is heard first.
        for key, _events in self._selector.select(self._timeout()) or self._selector.select(0):
            try:
                key.data()
            except Exception:
                log.exception("unexpected error in the keeper")
        for guest in self._guests:
            try:
                guest.tick()
            except Exception:
                log.exception("unexpected error in the keeper")
        if self._term_at is not None and not self._stopping:
            if not self._guests:
                self._stopping = True
            elif time.monotonic() >= self._term_at:
                self.end_now(f"waited {self._term_seconds:g} s")

    def _timeout(self) -> float | None:
        """Seconds until something is to be done without being called; None for as long as it takes."""
        now = time.monotonic()
        pauses = [self._watch_listener(place) for place in self.places.values()]
        moments = [guest.due() for guest in self._guests] + [self._term_at]
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
        for place in list(self.places.values()):
            self._close(place)
            if place.guest is not None:
                place.guest.end()
        while self._guests:
            self._turn()
        if self._control is not None:
            self._control.close()

    # Signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[socket.socket]:
        """Have the signals' numbers come out of a socket, so that select() wakes up for them."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        previous = {number: signal.signal(number, lambda *_: None) for number in _HANDLED}
        old = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINATING)
        try:
            yield ours
        finally:
            # Held back again: what is left to do, such as removing the socket, is not to be cut short.
            signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATING)
            signal.set_wakeup_fd(old)
            for number, handler in previous.items():
                signal.signal(number, handler)
            ours.close()
            theirs.close()

    def _take_signals(self, wakeup: socket.socket) -> None:
        for number in set(wakeup.recv(4096, socket.MSG_DONTWAIT)):
            if number in TERMINATING:
                self._terminate(signal.Signals(number).name)
            for guest in self._guests:
                if number == signal.SIGCHLD:
                    guest.note_stop()
                if number == signal.SIGCONT:
                    guest.forgive()

    def _terminate(self, why: str) -> None:
        """End, though not under a VM that lives: QEMU would not survive. A second signal does not wait for that."""
        if not self.is_serving or not self._term_seconds or self._term_at is not None:
            self.end_now(why)
            return
        self._term_at = time.monotonic() + self._term_seconds
        log.warning(
            "%s: a front end is connected, and QEMU does not survive that its device goes: waiting up to %g s for it to "
            "go first, releasing nothing any more; signal again to end now",
            why,
            self._term_seconds,
        )
        for place in self.places.values():
            self._close(place)
            if place.guest is not None:
                place.guest.make_inert(f"the device is ending: {why}")

    def end_now(self, why: str) -> None:
        """End, whoever is connected."""
        self._stopping = True
        if self.is_serving:
            log.warning(
                "%s: ending while a front end is connected: QEMU aborts at its guest's next look", why
            )
        else:
            log.info("%s: ending", why)

    # Guests

    def _accept(self, place: Place) -> None:
        assert place.acceptor is not None
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
        setting = Setting(
            place.name,
            self._options(place.name),
            self._selector,
            self._control,
            lambda guest: self._note_end(place, guest),
        )
        try:
            place.guest = Guest(connection, setting)
        except OSError as error:
            log.error("a front end is turned away: no record can be made for it: %s", error.strerror)  # noqa: TRY400
            connection.close()
            return
        log.info("front end connected")
        place.guest.begin()

    def _note_end(self, place: Place, guest: Guest) -> None:
        log.info("front end has gone")
        place.guest = None
        self._crashed = not guest.ended_well or self._crashed
        if place.is_leaving:
            self._forget(place)
        else:
            self._announce(place)
        if self._once and not self.is_serving:
            self._stopping = True

    # The control process

    def _watch_control(self, control: ControlLink) -> None:
        channel = control.channel
        if channel is not None:
            self._selector.register(
                channel, selectors.EVENT_READ, lambda: self._serve_control(control, channel)
            )

    def _serve_control(self, control: ControlLink, channel: socket.socket) -> None:
        envelope = control.receive()
        if envelope is not None and (answer := self._wishes.grant(envelope)) is not None:
            control.answer(answer)
            return
        # It has ended, or says what it has no business to.
        self._selector.unregister(channel)
        control.replace()
        for place in self.places.values():
            self._announce(place)
            if control.channel is None and place.guest is not None:
                place.guest.forget_control()
        self._watch_control(control)
