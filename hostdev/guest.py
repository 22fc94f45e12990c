"""One front end's connection, and a worker behind it at all times.

Relays whole messages and looks at nothing but the size in a message's header: what a message means is the worker's
business, in a process of its own. One message at a time, kept with its descriptors until the answer has come back and been
forwarded: the next is read then, so a front end that does not read its answers is not read from either. A worker that dies,
or does not answer in time, is replaced: the answer that it may have left is forwarded, or else its successor is given the
same message. So each message is answered once, and the front end notices nothing. Used by keeper.py.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import select
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hostdev import fds, worker
from hostdev.control_link import ControlLink
from hostdev.estate import Estate
from hostdev.incoming import Incoming
from hostdev.message_end import MAX_MESSAGE_DEATHS
from hostdev.metrics import worth_logging
from hostdev.wire.channel import Answer, Frame, ToKeeper, ToWorker, token
from hostdev.wire.layout import LayoutError
from hostdev.worker_link import WorkerLink

log = logging.getLogger(__name__)

# Seconds that a worker has to answer a message, and that it may be stopped. It takes some milliseconds; QEMU waits under its
# big lock meanwhile, and its guest with it.
ANSWER_SECONDS = 2.0
# Seconds that a worker has to end after its channel was closed: it finishes a slice and unmaps.
END_SECONDS = 2.0
# Workers started within so many seconds, after which the next has to wait: one that dies at once is not to take a CPU.
MAX_STARTS = 5
STARTS_SECONDS = 1.0
# Workers that died before they served, after which the next is to release nothing.
MAX_STILLBORN = 5


@dataclass(frozen=True, slots=True)
class Setting:
    """What a guest needs of the keeper. ended: to be called once everything of it has gone."""

    name: str
    options: worker.Options
    selector: selectors.BaseSelector
    control: ControlLink | None
    ended: Callable[[Guest], None]


@dataclass
class _Message:
    """A message that was not answered yet."""

    number: int
    data: bytes
    deaths: int = 0


@dataclass
class Guest:
    """One front end."""

    connection: socket.socket
    setting: Setting
    estate: Estate = field(default_factory=Estate)
    restarts: int = 0
    # False once the front end has gone, or was given up, and its worker is what is waited for.
    is_served: bool = True
    # False if the last worker had to be killed at the end.
    ended_well: bool = True

    def __post_init__(self) -> None:
        self._selector = self.setting.selector
        self._incoming = Incoming()
        self._outgoing = b""
        self._message: _Message | None = None
        self._number = 0
        self._closing = self._has_finished = False
        self._why_inert = ""
        self._stillborn = 0
        self._starts: collections.deque[float] = collections.deque(maxlen=MAX_STARTS)
        self._link: WorkerLink | None = None
        # By the monotonic clock: when a worker is to be started, and when the one there is has had its time.
        self._start_at: float | None = None
        self._overdue: float | None = None

    def begin(self) -> None:
        """Start the first worker and serve."""
        self._start_worker(blamed=False)
        self._watch_connection()

    # The worker

    @property
    def worker(self) -> int | None:
        """Process id of the worker, None while there is none."""
        return None if self._link is None else self._link.pid

    @property
    def control(self) -> fds.Fd | None:
        """The control process's end of the pair to the worker."""
        return None if self._link is None else self._link.control

    def forget_control(self) -> None:
        """There is no control process any more, and the worker is to know."""
        if self._link is not None and self._link.control is not None:
            self._link.control.close()
            self._link.control = None

    def _start_worker(self, *, blamed: bool) -> None:
        """Start a worker, unless too many were started just now; give it the message that waits."""
        now = time.monotonic()
        if len(self._starts) == MAX_STARTS and now < self._starts[0] + STARTS_SECONDS:
            self._start_at = self._starts[0] + STARTS_SECONDS
            return
        self._start_at = None
        self._starts.append(now)
        control = self.setting.control
        controlled = control is not None and control.channel is not None
        start = worker.Start(blamed=blamed, why_inert=self._reason_to_be_inert())
        try:
            link = WorkerLink(self.setting.options, self.estate, start, controlled=controlled)
        except OSError as error:
            log.error("no worker can be started: %s: trying again", error.strerror)  # noqa: TRY400
            self._start_at = now + STARTS_SECONDS / MAX_STARTS
            return
        self._adopt(link)
        if control is not None and link.control is not None:
            control.announce(self.setting.name, link.control)

    def _adopt(self, link: WorkerLink) -> None:
        self._link = link
        self._selector.register(link.channel, selectors.EVENT_READ, functools.partial(self._listen, link))
        self._selector.register(link.pidfd, selectors.EVENT_READ, functools.partial(self._bury, link))
        log.info("%s: worker is process %d", self.setting.name, link.pid)
        self._give()

    def _reason_to_be_inert(self) -> str:
        if self._stillborn >= MAX_STILLBORN:
            return f"{self._stillborn} workers in a row died before they served"
        return self._why_inert

    def _give(self) -> None:
        """Give the worker the message that was not answered."""
        message = self._message
        if message is not None and self._link is not None:
            deaths = min(message.deaths, MAX_MESSAGE_DEATHS)
            self._link.give(
                Frame(ToWorker.MESSAGE, deaths, message.number, message.data), self.estate.arrived
            )
            self._overdue = time.monotonic() + ANSWER_SECONDS

    def make_inert(self, why: str) -> None:
        """Have this worker and its successors release nothing."""
        self._why_inert = why
        if self._link is not None:
            self._link.give(Frame(ToWorker.INERT, 0, 0, why.encode()))

    def _listen(self, link: WorkerLink) -> None:
        """Take what the worker says."""
        if link is not self._link or not self.is_served:
            return  # ended by an event of the same select()
        try:
            self._take(link.take())
        except BlockingIOError:
            pass
        except (EOFError, ConnectionResetError, LayoutError):
            # It has died, or else it is of no use: either way its end is what comes next.
            self._unwatch(link.channel)
            link.kill()

    def _take(self, answer: Answer) -> None:
        if answer.kind == ToKeeper.READY:
            self._stillborn = 0
            self.estate.drop_source()
            return
        self.estate.settle(answer.held if answer.kind == ToKeeper.HOLDING else None)
        self._message = None
        self._overdue = None
        self._closing = answer.kind == ToKeeper.CLOSE
        self._outgoing = answer.reply
        self._flush()

    def _bury(self, link: WorkerLink) -> None:
        """The worker has ended: take what it has left, and put another in its place."""
        self._forget(link)
        while self.is_served:
            try:
                self._take(link.take())
            except (EOFError, ConnectionResetError, BlockingIOError, LayoutError):
                break
        # A guest that has its workers die is not to fill the log.
        well = link.bury(expected=self.is_served and not worth_logging(self.restarts + 1))
        if not self.is_served:
            self.ended_well = well
            self._finish()
            return
        self._note_death()
        self._start_worker(blamed=True)

    def _forget(self, link: WorkerLink) -> None:
        """Watch a worker no more."""
        self._link = None
        self._overdue = None
        self._unwatch(link.channel)
        self._unwatch(link.pidfd)

    def _unwatch(self, file: socket.socket | fds.Fd) -> None:
        with contextlib.suppress(KeyError, ValueError):  # not watched, or closed
            self._selector.unregister(file)

    def _note_death(self) -> None:
        self.restarts += 1
        self._stillborn += 1
        if self._message is not None:
            self._message.deaths += 1
        if worth_logging(self.restarts):
            log.error(
                "%s: the worker has died, and another takes over: %d so far", self.setting.name, self.restarts
            )

    # Time

    def due(self) -> float | None:
        """When tick() is to be called at the latest, by the monotonic clock; None for never."""
        moments = [self._start_at, self._overdue]
        if self._link is not None and self._link.stopped_since is not None:
            moments.append(self._link.stopped_since + ANSWER_SECONDS)
        return min((moment for moment in moments if moment is not None), default=None)

    def tick(self) -> None:
        """Do what the time has come for: start a worker, or kill one that hangs."""
        due = self.due()
        if due is None or time.monotonic() < due:
            return
        if self._link is None:
            self._start_worker(blamed=True)
            return
        log.error("%s: the worker hangs: killing process %d", self.setting.name, self._link.pid)
        self._link.kill()
        self._overdue = None
        self._link.forgive()

    def note_stop(self) -> None:
        """A child has stopped, gone on or ended."""
        if self._link is not None:
            self._link.note_stop()

    def forgive(self) -> None:
        """The keeper itself was stopped: nobody is late yet."""
        if self._overdue is not None:
            self._overdue = time.monotonic() + ANSWER_SECONDS
        if self._link is not None:
            self._link.forgive()

    # The connection

    def _watch_connection(self) -> None:
        """Wait for what is next: for writing while a reply is due, for nothing while the worker has a message."""
        wanted = selectors.EVENT_WRITE if self._outgoing else 0 if self._message else selectors.EVENT_READ
        registered = self._selector.get_map().get(self.connection.fileno())
        if registered is None:
            if wanted:
                self._selector.register(self.connection, wanted, self._serve)
        elif not wanted:
            self._selector.unregister(self.connection)
        elif wanted != registered.events:
            self._selector.modify(self.connection, wanted, self._serve)

    def _serve(self) -> None:
        if not self.is_served:
            return  # ended by an event of the same select()
        if self._outgoing:
            self._flush()
        else:
            self._receive()

    def _receive(self) -> None:
        """Read on; pass the message to the worker when it is whole."""
        try:
            if not self._incoming.read(self.connection):
                self.end()
            elif self._incoming.is_whole:
                self._pass_on()
        except BlockingIOError:
            return
        except (OSError, OverflowError) as error:
            log.error("closing the connection: %s", error)  # noqa: TRY400  (the peer's fault: no traceback)
            self.end()

    def _pass_on(self) -> None:
        self._number += 1
        data, arrived = self._incoming.take()
        for place, fd in enumerate(arrived):
            fd.token = token(self._number, place)
        self.estate.arrived = arrived
        self._message = _Message(self._number, data)
        self._give()
        self._watch_connection()

    def _flush(self) -> None:
        """Write what is due; end the connection if that was the last."""
        try:
            while self._outgoing:
                self._outgoing = self._outgoing[fds.send(self.connection, self._outgoing) :]
        except BlockingIOError:
            pass
        except OSError:
            self.end()
            return
        if self._closing and not self._outgoing:
            self.end()
        elif self.is_served:
            self._watch_connection()

    def has_gone(self) -> bool:
        """True if the front end has closed, whatever of it is still unread."""
        if not self.is_served:
            return True
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    # The end

    def end(self) -> None:
        """Close the connection and have the worker end; setting.ended is called once it has."""
        if not self.is_served:
            return
        self.is_served = False
        self._unwatch(self.connection)
        self._incoming.close()
        self.connection.close()
        if self._link is None:
            self._finish()
            return
        self._unwatch(self._link.channel)
        self._link.release()
        self._overdue = time.monotonic() + END_SECONDS

    def _finish(self) -> None:
        if self._has_finished:
            return
        self._has_finished = True
        self._start_at = None
        self.estate.close()
        self.setting.ended(self)
