"""The keeper's side of the control process: forks it, gives it the workers' pairs, replaces it when it dies.

A control process that dies takes its clients' connections along and nothing else: the worker, the front end's connection
and the listening socket are the keeper's, and a successor is given the workers' pairs again. Used by keeper.py; the other
side is control.py, and what both say is declared in wire/control.py.

A pair has room for 278 announcements unread, and nothing here waits for more: what there is no room for is kept and goes in
its turn. Of a place only its present state is, whatever it was meanwhile, so what waits is bounded by the places there are.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import logging
import select
import selectors
import socket
import time
from collections.abc import Callable

from hostdev import control, fds, sandbox
from hostdev.child import END_DEADLINE, Child
from hostdev.wire.control import ENVELOPE, MAX_ENVELOPE, Envelope, Kind, refusal
from hostdev.wire.layout import LayoutError

log = logging.getLogger(__name__)

# A process that dies again and again is beyond repair by starting it once more: after this many deaths within so many
# seconds there is no control socket any more. One death an hour, on the other hand, may go on for a year.
MAX_DEATHS = 3
DEATHS_PERIOD = 60.0
# Seconds without room for anything after which the process is killed: it never waits for anybody, so it hangs.
SILENCE_SECONDS = 5.0
# Seconds until descriptors are tried again that the host had no room for: there is nothing to wait for that would say so.
RETRY_SECONDS = 0.1
# Seconds that the keeper waits for a killed process, which takes some 10 ms; and until it looks again for one that the
# kernel does not let go of (it hangs in a file system, say).
KILLED_SECONDS = 0.5
BURIAL_SECONDS = 1.0

# ETOOMANYREFS: as many descriptors are under way as this user may have open (unix(7)).
_NO_ROOM_NOW = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)


class ControlLink:
    """The control process, if there is one, and the channel to it."""

    def __init__(
        self,
        listener: socket.socket,
        clock: Callable[[], float] = time.monotonic,
        watch: Callable[[], None] = lambda: None,
        confined: str = sandbox.AUTO,
    ) -> None:
        """listener: where clients connect; closed when the control process is given up.

        watch: called when channel or wanted may have changed, before a channel is closed. confined: as --sandbox has it.
        """
        self._confined = confined
        self._listener = listener
        self._clock = clock
        self._watch = watch
        self._deaths: collections.deque[float] = collections.deque(maxlen=MAX_DEATHS)
        self._generation = 0
        # True once there is no control socket any more.
        self.is_given_up = False
        self._child: Child | None = None
        self.channel: socket.socket | None = None
        # What there was no room for, in order: places by name, answers by id.
        self._waiting: dict[str | int, tuple[Envelope, fds.Fd | None]] = {}
        self._stuck_since: float | None = None
        self._retry_at: float | None = None
        # True once it was killed: it is told nothing more, and its end is what comes next.
        self._is_killed = False
        self._unburied: list[Child] = []
        self._burial_at = 0.0

    @property
    def pid(self) -> int | None:
        """Its process id, None while there is none."""
        return None if self._child is None else self._child.pid

    def start(self, tell_all: Callable[[], None] = lambda: None) -> None:
        """Fork a control process. tell_all: announces all places, before it begins: its first client may ask at once."""
        try:
            self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._is_killed = False
                tell_all()
                process = functools.partial(
                    control.start, theirs, self._listener, self._generation, self._confined
                )
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
        self._end_at_once()
        self._listener.close()

    # What it is told

    def announce(self, name: str, guest: fds.Fd | None) -> None:
        """Tell of a place. guest: the end of the pair to the worker that serves there, None if there is no front end.

        One that is closed before its turn comes is announced as None: that worker has died.
        """
        self._tell(name, Envelope(Kind.GUEST, 0, name.encode()), guest)

    def withdraw(self, name: str) -> None:
        """Tell that there is no such place any more."""
        self._tell(name, Envelope(Kind.GONE, 0, name.encode()))

    def answer(self, envelope: Envelope) -> None:
        """Answer what the keeper was asked, after all that was announced before."""
        if len(ENVELOPE.encode(envelope)) > MAX_ENVELOPE:
            envelope = _too_long(envelope)
        self._tell(envelope.id, envelope)

    def _tell(self, key: str | int, envelope: Envelope, guest: fds.Fd | None = None) -> None:
        if self.channel is None or self._is_killed:
            return
        is_first = not self._waiting
        self._waiting[key] = envelope, guest
        if is_first:
            self.flush()

    @property
    def is_waiting(self) -> bool:
        """True while there is something that it was not told yet."""
        return bool(self._waiting)

    @property
    def wanted(self) -> int:
        """What to wait for on the channel, as selectors has it.

        Nothing is heard while anything waits: a process that asks and reads no answers is not to fill our memory.
        """
        if self.channel is None or self._retry_at is not None:
            return 0
        return selectors.EVENT_WRITE if self._waiting else selectors.EVENT_READ

    def flush(self) -> None:
        """Send what waits as far as there is room, never waiting."""
        self._retry_at = None
        try:
            while self._waiting:
                self._send_first()
        except OSError as error:
            self._note(error)
        self._watch()

    def _send_first(self) -> None:
        """Send what has waited longest. Raises OSError."""
        assert self.channel is not None
        key, (envelope, guest) = next(iter(self._waiting.items()))
        descriptors = [] if guest is None or guest.closed else [guest]
        fds.send(self.channel, ENVELOPE.encode(envelope), descriptors)
        del self._waiting[key]
        self._stuck_since = None

    def _note(self, error: OSError) -> None:
        """There is no room now, or nobody any more."""
        if error.errno != errno.EAGAIN and error.errno not in _NO_ROOM_NOW:
            log.debug("the control process is told nothing more: %s", error.strerror)
            self._stop_telling()
            if not isinstance(error, (BrokenPipeError, ConnectionResetError)):
                self._kill(f"cannot be told anything: {error.strerror}")
            return  # receive() says that it has ended, and that is acted on
        now = self._clock()
        if self._stuck_since is None:
            self._stuck_since = now
        if error.errno != errno.EAGAIN:
            self._retry_at = now + RETRY_SECONDS

    def _stop_telling(self) -> None:
        self._waiting.clear()
        self._stuck_since = self._retry_at = None

    def _kill(self, why: str) -> None:
        """End a process that is of no use: a successor will be told all."""
        if self._child is None:
            return  # it has not begun yet
        log.error("the control process %s: killing process %d", why, self._child.pid)
        self._is_killed = True
        self._child.kill()
        self._stop_telling()

    # Time

    def due(self) -> float | None:
        """When tick() is to be called at the latest, by the monotonic clock; None for never."""
        moments = [self._retry_at]
        if self._stuck_since is not None:
            moments.append(self._stuck_since + SILENCE_SECONDS)
        if self._unburied:
            moments.append(self._burial_at)
        return min((moment for moment in moments if moment is not None), default=None)

    def tick(self) -> None:
        """Do what the time has come for: try again, kill one that does not read, bury one that took its time."""
        due, now = self.due(), self._clock()
        if due is None or now < due:
            return
        if self._waiting:
            self.flush()
        if self._stuck_since is not None and now >= self._stuck_since + SILENCE_SECONDS:
            self._kill("does not read")
            self._watch()
        self._bury(0.0)

    # What it says

    def receive(self) -> Envelope | None:
        """Receive one envelope. None if the process has ended or what it says cannot be understood.

        Raises BlockingIOError if there is none.
        """
        assert self.channel is not None
        try:
            received = fds.receive(self.channel, MAX_ENVELOPE)
        except ConnectionResetError:
            return None
        fds.close_all(received.fds)
        if not received.data:
            return None
        try:
            return ENVELOPE.decode(received.data)
        except LayoutError as error:
            log.error("the control process says what cannot be read: %s", error)  # noqa: TRY400
            return None

    # Its end

    def replace(self, tell_all: Callable[[], None] = lambda: None) -> None:
        """Bury a control process that ended unasked and start another, unless too many have. tell_all: as start() has it."""
        self._end_at_once()
        now = self._clock()
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] <= DEATHS_PERIOD:
            self._give_up(f"its process died once more, {MAX_DEATHS} times before within {DEATHS_PERIOD:g} s")
            return
        self._deaths.append(now)
        self.start(tell_all)

    def close(self) -> None:
        """End the control process: it sees its channel close, gives its clients what they are owed, and ends."""
        self._pay()
        child = self._release()
        if child is not None:
            if not child.has_ended(END_DEADLINE):
                log.error("the control process does not end: killing process %d", child.pid)
                child.kill()
            self._unburied.append(child)
        self._bury(END_DEADLINE)
        for child in self._unburied:
            log.error("process %d was killed and does not end: it is left to itself", child.pid)
        self._unburied.clear()

    def _pay(self) -> None:
        """Send the answers that wait, and nothing else: waits for room, in all for as long as the process reads."""
        self._waiting = {key: what for key, what in self._waiting.items() if isinstance(key, int)}
        poll = select.poll()
        if self.channel is not None:
            poll.register(self.channel, select.POLLOUT)
        left = len(self._waiting) + 1
        while 0 < len(self._waiting) < left and poll.poll(END_DEADLINE * 1000):
            left = len(self._waiting)
            self.flush()

    def _end_at_once(self) -> None:
        """Kill it: the keeper has a front end to serve, no time to wait for a process that is of no use."""
        child = self._release()
        if child is not None:
            child.kill()
            self._unburied.append(child)
            self._bury(KILLED_SECONDS)

    def _release(self) -> Child | None:
        """Close the channel. Returns the process, which is no longer ours to talk to."""
        channel, child = self.channel, self._child
        self.channel = self._child = None
        self._stop_telling()
        self._watch()
        if channel is not None:
            channel.close()
        return child

    def _bury(self, seconds: float) -> None:
        """Bury those that have ended, and wait for each for so long. The others' turn comes again."""
        self._unburied, unburied = [], self._unburied
        for child in unburied:
            if not child.has_ended(seconds):
                self._unburied.append(child)
                continue
            with contextlib.suppress(
                ChildProcessError
            ):  # an upgrade that failed has buried what it did not know
                child.bury()
        self._burial_at = self._clock() + BURIAL_SECONDS


def _too_long(answer: Envelope) -> Envelope:
    """What is said in place of an answer that would be cut off."""
    return refusal(
        answer.id,
        f"the answer is longer than {MAX_ENVELOPE} bytes: there are too many guests to be told of at once; "
        "ask for one at a time, with query-status and its name",
    )
