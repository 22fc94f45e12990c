"""The parent: listens, owns the front end's connection, forks the worker and the control process.

Whose message means what is for others to know: guest.py relays the front end's to the worker, and of the control process
the keeper takes nothing but the wish to end. It parses no JSON.

No threads, no asyncio, no guest memory: asyncio does not survive the fork that every worker comes from. The other of
the two loops that may never die, for QEMU's generic vhost-user device does not survive a closed socket.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import signal
import socket
from collections.abc import Iterator
from types import FrameType

from hostdev import worker
from hostdev.acceptor import Acceptor
from hostdev.control_link import ControlLink
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS
from hostdev.guest import Guest
from hostdev.wire.control import QUIT_ACCEPTED, QUIT_FORCED, QUIT_REFUSED, Envelope, Kind

log = logging.getLogger(__name__)

TERMINATING = (signal.SIGTERM, signal.SIGINT)


class Keeper:
    """Serves one front end after another until told to end."""

    def __init__(
        self,
        options: worker.Options,
        *,
        listener: socket.socket | None,
        once: bool,
        control: socket.socket | None = None,
    ) -> None:
        """listener: where to wait for the next front end; None if there is only the one given to run().

        control: where the control process listens.
        """
        self._options = options
        self._acceptor = None if listener is None else Acceptor(listener, "front end")
        self._control = None if control is None else ControlLink(control)
        self._once = once
        self._guest: Guest | None = None
        self._stopping = False
        self._crashed = False
        self._selector = selectors.DefaultSelector()

    def run(self, connection: socket.socket | None = None) -> int:
        """Serve connection if given, then those that arrive. Returns the exit status."""
        with self._signals() as wakeup, self._selector:
            self._selector.register(wakeup, selectors.EVENT_READ, lambda: self._drain(wakeup))
            if self._control is not None:
                self._control.start(None)
                self._watch_control(self._control)
            if connection is not None:
                self._begin(connection)
            while not self._stopping and (self._guest is not None or self._acceptor is not None):
                self._turn()
            self._end_guest()
            if self._control is not None:
                self._control.close()
        return EXIT_CHECK_FAILED if self._crashed else EXIT_PASS

    def _turn(self) -> None:
        for key, _events in self._selector.select(self._watch_listener()):
            try:
                key.data()
            except Exception:
                log.exception("unexpected error in the keeper")

    def _watch_listener(self) -> float | None:
        """Have the listener watched unless it is to be left alone. Returns for how many seconds it is."""
        if self._acceptor is None:
            return None
        pause = self._acceptor.pause()
        registered = self._acceptor.listener.fileno() in self._selector.get_map()
        if pause is None and not registered:
            self._selector.register(self._acceptor.listener, selectors.EVENT_READ, self._accept)
        elif pause is not None and registered:
            self._selector.unregister(self._acceptor.listener)
        return pause

    @contextlib.contextmanager
    def _signals(self) -> Iterator[socket.socket]:
        """Turn SIGTERM and SIGINT into a readable socket, so that select() wakes up for them."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        previous = {number: signal.signal(number, self._stop) for number in TERMINATING}
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

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._end_soon(signal.Signals(number).name)

    def _end_soon(self, why: str) -> None:
        self._stopping = True
        if self._guest is None:
            log.info("%s: ending", why)
        else:
            log.warning(
                "%s: ending while a front end is connected: QEMU aborts at its guest's next look", why
            )

    @staticmethod
    def _drain(wakeup: socket.socket) -> None:
        wakeup.recv(64, socket.MSG_DONTWAIT)

    # Guests

    def _accept(self) -> None:
        assert self._acceptor is not None
        connection = self._acceptor.accept()
        if connection is None:
            return
        if self._guest is not None and self._guest.has_gone():
            self._end_guest()  # a VM that is started again at once must not find its predecessor in the way
        if self._guest is not None or self._stopping:
            log.warning("a second front end is turned away: one is being served")
            connection.close()
            return
        self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        controlled = self._control is not None and self._control.channel is not None
        guest = self._guest = Guest(connection, self._options, controlled=controlled)
        log.info("front end connected, worker is process %d", guest.pid)
        self._selector.register(connection, guest.interest, lambda: self._serve(guest))
        self._selector.register(guest.channel, selectors.EVENT_READ, lambda: self._relay(guest))
        if self._control is not None and guest.control is not None:
            self._control.announce(guest.control)

    def _serve(self, guest: Guest) -> None:
        if guest is not self._guest:
            return  # ended by an event of the same select()
        if guest.interest == selectors.EVENT_WRITE:
            self._settle(guest, going_on=guest.flush())
        else:
            self._settle(guest, going_on=guest.receive())

    def _relay(self, guest: Guest) -> None:
        if guest is self._guest:
            self._settle(guest, going_on=guest.forward())

    def _settle(self, guest: Guest, *, going_on: bool) -> None:
        """Make the selector follow the guest's state, or end it."""
        if not going_on:
            self._end_guest()
            return
        registered = guest.connection.fileno() in self._selector.get_map()
        if not guest.interest:
            if registered:
                self._selector.unregister(guest.connection)
        elif registered:
            self._selector.modify(guest.connection, guest.interest, lambda: self._serve(guest))
        else:
            self._selector.register(guest.connection, guest.interest, lambda: self._serve(guest))

    def _end_guest(self) -> None:
        guest, self._guest = self._guest, None
        if guest is None:
            return
        for file in (guest.connection, guest.channel):
            with contextlib.suppress(KeyError):
                self._selector.unregister(file)
        self._crashed = not guest.close() or self._crashed
        if self._control is not None:
            self._control.announce(None)
        log.info("front end has gone")
        self._stopping = self._stopping or self._once

    # The control process

    def _watch_control(self, control: ControlLink) -> None:
        channel = control.channel
        if channel is not None:
            self._selector.register(
                channel, selectors.EVENT_READ, lambda: self._serve_control(control, channel)
            )

    def _serve_control(self, control: ControlLink, channel: socket.socket) -> None:
        envelope = control.receive()
        if envelope is not None and envelope.kind == Kind.QUIT:
            self._quit(control, envelope)
            return
        # It has ended, or says what it has no business to.
        self._selector.unregister(channel)
        control.replace(self._guest.control if self._guest is not None else None)
        if control.channel is None and self._guest is not None and self._guest.control is not None:
            self._guest.control.close()  # its worker learns that nobody is there for good
            self._guest.control = None
        self._watch_control(control)

    def _quit(self, control: ControlLink, asked: Envelope) -> None:
        """End as asked, unless that would kill a VM and nobody said that it may."""
        if self._guest is not None and self._guest.has_gone():
            self._end_guest()
        if self._guest is not None and asked.text != QUIT_FORCED:
            control.answer(Envelope(Kind.ERROR, asked.id, QUIT_REFUSED))
            return
        control.answer(Envelope(Kind.RETURN, asked.id, QUIT_ACCEPTED))
        self._end_soon("quit over the control socket")
