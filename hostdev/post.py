"""The post of one guest's worker: filled at all times, and relieved of one that dies or hangs.

A worker that dies, or does not answer in time, is replaced: the answer that it may have left is taken, or else its successor
is given the same message. What front ends and messages are is guest.py's, which has this for its one worker.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hostdev import fds
from hostdev.births import Births
from hostdev.control_link import ControlLink
from hostdev.errors import UpgradeError
from hostdev.estate import Estate
from hostdev.frozen import Message
from hostdev.message_end import MAX_MESSAGE_DEATHS
from hostdev.metrics import worth_logging
from hostdev.options import Options, Start
from hostdev.wire.channel import Answer, Frame, ToKeeper, ToWorker
from hostdev.wire.layout import LayoutError
from hostdev.worker_link import WorkerLink

log = logging.getLogger(__name__)

# Seconds that a worker has to answer a message, and that it may be stopped. It takes some milliseconds; QEMU waits under its
# big lock meanwhile, and its guest with it.
ANSWER_SECONDS = 2.0
# Seconds that a worker has to end after its channel was closed: it finishes a slice and unmaps.
END_SECONDS = 2.0
# Answers that a dead worker may have left: READY and one more.
MAX_LEFT = 2
# Seconds that a makeshift worker serves until another tries to take over what it could not.
MAKESHIFT_SECONDS = 5.0
# Seconds until a worker is tried again that the host had no room for.
RETRY_SECONDS = 0.2


@dataclass
class Post:
    """One guest's. answered: called with the answer to the message at hand; ended: once the last worker has, well or not."""

    name: str
    options: Options
    selector: selectors.BaseSelector
    control: ControlLink | None
    estate: Estate
    answered: Callable[[Answer], None]
    ended: Callable[[bool], None]
    # Workers that were replaced.
    restarts: int = 0
    # What was given and not answered yet.
    message: Message | None = None
    # Why this worker and its successors are to release nothing, empty if they may.
    why_inert: str = ""
    _births: Births = field(default_factory=Births)
    _link: WorkerLink | None = None
    _is_closed: bool = False
    _blamed: bool = True
    # Workers that died of a touch of a mapping with nothing behind it.
    _bus_errors: int = 0
    # By the monotonic clock: when a worker is to be started; when the one there is has had its time; when a makeshift one is
    # to make room for one that may find what was missing.
    _start_at: float | None = None
    _overdue: float | None = None
    _retry_at: float | None = None

    @property
    def link(self) -> WorkerLink | None:
        """The worker that is there."""
        return self._link

    @property
    def is_lost(self) -> bool:
        """True once what is in the record is out of date."""
        return self._births.is_lost

    # Filling it

    def fill(self, *, blamed: bool, waits: bool = False) -> None:
        """Start a worker, unless too many were started just now; give it the message at hand, unless it is to wait."""
        self._blamed = blamed
        now = time.monotonic()
        if (moment := self._births.next_at(now)) > now:
            self._start_at = moment
            return
        self._start_at = None
        self._births.note(now)
        start = self._beginning(blamed=blamed, waits=waits)
        try:
            controlled = self.control is not None and not self.control.is_given_up
            link = WorkerLink(self.options, self.estate, start, controlled=controlled)
        except OSError as error:
            self._births.note_failure()
            if worth_logging(self._births.failures):
                log.error("no worker can be started: %s: trying again", error.strerror)  # noqa: TRY400
            self._start_at = now + RETRY_SECONDS
            return
        self._adopt(link)
        if not waits:
            self._give()

    def _beginning(self, *, blamed: bool, waits: bool) -> Start:
        return Start(
            blamed=blamed,
            why_inert=self._births.why_inert or self.why_inert,
            waits=waits,
            makeshift=self._births.is_makeshift,
            lost=self._births.is_lost,
            quiet=not self._is_news,
            bus_errors=self._bus_errors,
        )

    def _adopt(self, link: WorkerLink) -> None:
        self._link = link
        self.selector.register(link.channel, selectors.EVENT_READ, functools.partial(self._listen, link))
        self.selector.register(link.pidfd, selectors.EVENT_READ, functools.partial(self._bury, link))
        if self._is_news:
            log.info("%s: worker is process %d", self.name, link.pid)
        if self.control is not None and link.control is not None:
            self.control.announce(self.name, link.control)

    @property
    def _is_news(self) -> bool:
        """True if the log is to hear of this worker: a guest that has its workers die is not to fill it."""
        return self.restarts == 0 or worth_logging(self.restarts)

    # What is said

    def give(self, message: Message) -> None:
        """Have a message answered, by this worker or one of its successors."""
        self.message = message
        self._give()

    def _give(self) -> None:
        message = self.message
        if message is not None and self._link is not None:
            deaths = min(message.deaths, MAX_MESSAGE_DEATHS)
            kind = ToWorker.CURTAILED if message.curtailed else ToWorker.MESSAGE
            frame = Frame(kind, deaths, message.number, message.data)
            self._link.give(frame, self.estate.arrived)
            # Longer with each death: on a host that thrashes it may have been the time that was too short.
            self._overdue = time.monotonic() + ANSWER_SECONDS * (1 << deaths)

    def make_inert(self, why: str) -> None:
        """Have this worker and its successors release nothing."""
        self.why_inert = why
        if self._link is not None:
            self._link.give(Frame(ToWorker.INERT, 0, 0, why.encode()))

    def _listen(self, link: WorkerLink) -> None:
        """Take what the worker says."""
        if link is not self._link or self._is_closed:
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
        if answer.kind in (ToKeeper.READY, ToKeeper.MAKESHIFT):
            self._births.note_life()
            if answer.kind == ToKeeper.READY:
                self.estate.drop_source()
            elif not self._births.is_lost:
                self._retry_at = time.monotonic() + MAKESHIFT_SECONDS
            return
        if answer.kind == ToKeeper.LOST:
            self._births.is_lost = True
            self._retry_at = None
        self.estate.settle(answer.held if answer.kind == ToKeeper.HOLDING else None)
        self.message = None
        self._overdue = None
        self.answered(answer)

    # Deaths

    def _bury(self, link: WorkerLink) -> None:
        """The worker has ended: take what it has left, and put another in its place."""
        self._take_rest(link)
        well = link.bury(expected=not self._is_closed and not worth_logging(self.restarts + 1))
        self._bus_errors += link.had_bus_error
        if self._is_closed:
            self.ended(well)
            return
        self._note_death()
        self.fill(blamed=True)

    def _take_rest(self, link: WorkerLink) -> None:
        """Take what a worker that has ended said last, and watch it no more."""
        self._link = None
        self._overdue = self._retry_at = None
        self._unwatch(link.channel)
        self._unwatch(link.pidfd)
        for _ in range(MAX_LEFT):
            if self._is_closed:
                return
            try:
                self._take(link.take())
            except (EOFError, ConnectionResetError, BlockingIOError, LayoutError):
                return

    def _unwatch(self, file: socket.socket | fds.Fd) -> None:
        with contextlib.suppress(KeyError, ValueError):  # not watched, or closed
            self.selector.unregister(file)

    def _note_death(self) -> None:
        self.restarts += 1
        self._births.note_death()
        if self.message is not None and self._births.has_served:
            self.message.deaths += 1
        if worth_logging(self.restarts):
            log.error("%s: the worker has died, and another takes over: %d so far", self.name, self.restarts)

    # Time

    def due(self) -> float | None:
        """When tick() is to be called at the latest, by the monotonic clock; None for never."""
        moments = [self._start_at, self._overdue]
        if self.message is None and self._link is not None:
            moments.append(self._retry_at)
        if self._link is not None and self._link.stopped_since is not None:
            moments.append(self._link.stopped_since + ANSWER_SECONDS)
        return min((moment for moment in moments if moment is not None), default=None)

    def tick(self) -> None:
        """Do what the time has come for: start a worker, or kill one that hangs."""
        due = self.due()
        if due is None or time.monotonic() < due:
            return
        if self._link is None:
            self.fill(blamed=self._blamed)
            return
        is_late = self._retry_at is None or self._overdue is not None
        if is_late and (self._is_news or self._is_closed):
            log.error("%s: the worker hangs: killing process %d", self.name, self._link.pid)
        self._link.kill()
        self._overdue = self._retry_at = None
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

    # Standing still, and the end

    def vacate(self) -> None:
        """Take the worker away, which was killed. Raises UpgradeError if it does not end."""
        link = self._link
        if link is not None:
            if not link.has_ended(END_SECONDS):
                raise UpgradeError(f"{self.name}: the worker does not end")
            self._take_rest(link)
            well = link.bury(expected=True)
            if self._is_closed:
                self.ended(well)
        self._start_at = None

    def await_ready(self, moment: float) -> None:
        """Wait for a worker to have taken over. Raises UpgradeError if it has not by then (monotonic clock)."""
        link = self._link
        try:
            if link is None or not link.has_said(max(0.0, moment - time.monotonic())):
                raise UpgradeError(f"{self.name}: its worker does not get ready")
            self._take(link.take())
        except (EOFError, ConnectionResetError, LayoutError):
            raise UpgradeError(f"{self.name}: its worker died before it was ready") from None

    def go(self) -> None:
        """Have a worker that waits serve."""
        if self._link is not None:
            self._link.give(Frame(ToWorker.GO, 0, 0, b""))
        self._give()

    def close(self) -> None:
        """Have the worker end, and no other take its place. ``ended`` is called once it has, at once if there is none."""
        self._is_closed = True
        self._start_at = None
        if self._link is None:
            self.ended(True)
            return
        self._unwatch(self._link.channel)
        self._link.release()
        self._overdue = time.monotonic() + END_SECONDS
