"""The keeper's side of the control process: forks it, gives it the workers' pairs, replaces it when it dies.

A control process that dies takes its clients' connections along and nothing else: the worker, the front end's connection
and the listening socket are the keeper's, and a successor is given the workers' pairs again. Used by keeper.py; the other
side is control.py, and what both say is declared in wire/control.py.
"""

from __future__ import annotations

import collections
import functools
import logging
import socket
import time
from collections.abc import Callable, Sequence

from hostdev import control, fds
from hostdev.child import Child
from hostdev.wire.control import ENVELOPE, MAX_ENVELOPE, Envelope, Kind
from hostdev.wire.layout import LayoutError

log = logging.getLogger(__name__)

# A process that dies again and again is beyond repair by starting it once more: after this many deaths within so many
# seconds there is no control socket any more. One death an hour, on the other hand, may go on for a year.
MAX_DEATHS = 3
DEATHS_PERIOD = 60.0


class ControlLink:
    """The control process, if there is one, and the channel to it."""

    def __init__(self, listener: socket.socket, clock: Callable[[], float] = time.monotonic) -> None:
        """listener: where clients connect; closed when the control process is given up."""
        self._listener = listener
        self._clock = clock
        self._deaths: collections.deque[float] = collections.deque(maxlen=MAX_DEATHS)
        self._generation = 0
        # True once there is no control socket any more.
        self.is_given_up = False
        self._child: Child | None = None
        self.channel: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, None while there is none."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Fork a control process. It is to be told of all places."""
        try:
            self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                process = functools.partial(control.start, theirs, self._listener, self._generation)
                self._child = Child("control process", process)
        except OSError as error:
            self._give_up(f"no process can be started: {error.strerror}")
            return
        self._generation += 1
        log.info("the control socket is served by process %d", self._child.pid)

    def _give_up(self, why: str) -> None:
        """Close the listener too: who connects is to be told so instead of waiting for a greeting."""
        self.is_given_up = True
        log.error("no control socket any more: %s", why)
        self._end(kill=True)
        self._listener.close()

    def announce(self, name: str, guest: fds.Fd | None) -> None:
        """Tell of a place. guest: the end of the pair to the worker that serves there, None if there is no front end."""
        self._send(Envelope(Kind.GUEST, 0, name.encode()), [] if guest is None else [guest])

    def withdraw(self, name: str) -> None:
        """Tell that there is no such place any more."""
        self._send(Envelope(Kind.GONE, 0, name.encode()))

    def answer(self, envelope: Envelope) -> None:
        """Answer what the keeper was asked."""
        self._send(envelope)

    def _send(self, envelope: Envelope, descriptors: Sequence[fds.Fd] = ()) -> None:
        """Send, never waiting. A process that does not read what it is sent is ended: a successor will."""
        if self.channel is None or self._child is None:
            return
        try:
            fds.send(self.channel, ENVELOPE.encode(envelope), descriptors)
        except BlockingIOError:
            log.error("the control process does not read: killing process %d", self._child.pid)  # noqa: TRY400
            self._child.kill()
        except (BrokenPipeError, ConnectionResetError):
            log.debug("the control process has ended")  # receive() says so too, and that is acted on

    def receive(self) -> Envelope | None:
        """Receive one envelope. None if the process has ended or what it says cannot be understood.

        Raises BlockingIOError if there is none.
        """
        assert self.channel is not None
        try:
            data, received = fds.receive(self.channel, MAX_ENVELOPE)
        except ConnectionResetError:
            return None
        fds.close_all(received)
        if not data:
            return None
        try:
            return ENVELOPE.decode(data)
        except LayoutError as error:
            log.error("the control process says what cannot be read: %s", error)  # noqa: TRY400
            return None

    def replace(self) -> None:
        """Bury a control process that ended unasked and start another, unless too many have."""
        self._end(kill=True)
        now = self._clock()
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] <= DEATHS_PERIOD:
            self._give_up(f"its process died once more, {MAX_DEATHS} times before within {DEATHS_PERIOD:g} s")
            return
        self._deaths.append(now)
        self.start()

    def close(self) -> None:
        """End the control process: it sees its channel close, gives its clients what they are owed, and ends."""
        self._end(kill=False)

    def _end(self, *, kill: bool) -> None:
        channel, child = self.channel, self._child
        self.channel = self._child = None
        if channel is not None:
            channel.close()
        if child is not None:
            if kill:
                child.kill()  # the keeper has a front end to serve: no waiting for a process that is of no use
            child.reap()
