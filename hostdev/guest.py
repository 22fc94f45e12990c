"""One front end's connection, and a worker behind it at all times.

Relays whole messages (front_end.py): what a message means is the worker's business, in a process of its own. One message at
a time, kept with its descriptors until the answer has come back. A worker that dies, or does not answer in time, is replaced:
the answer that it may have left is forwarded, or else its successor is given the same message. So each message is answered
once, and the front end notices nothing; nor does it if all of this goes to another version of the keeper meanwhile. Used by
keeper.py.
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

from hostdev import fds, worker
from hostdev.births import Births
from hostdev.control_link import ControlLink
from hostdev.errors import UpgradeError
from hostdev.estate import Estate
from hostdev.front_end import FrontEnd
from hostdev.frozen import FrozenGuest, Message
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
# Answers that a dead worker may have left: READY and one more.
MAX_LEFT = 2
# Seconds that a makeshift worker serves until another tries to take over what it could not.
MAKESHIFT_SECONDS = 5.0
# Seconds until a worker is tried again that the host had no room for.
RETRY_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Setting:
    """What a guest needs of the keeper. ended: to be called once everything of it has gone."""

    name: str
    options: worker.Options
    selector: selectors.BaseSelector
    control: ControlLink | None
    ended: Callable[[Guest], None]


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
        self._front = FrontEnd(self.connection, self._selector, self._pass_on, self.end)
        self._message: Message | None = None
        self._number = 0
        self._has_finished = False
        self._why_inert = ""
        self._births = Births()
        self._link: WorkerLink | None = None
        # By the monotonic clock: when a worker is to be started, and when the one there is has had its time.
        self._start_at: float | None = None
        self._blamed = True
        # When a makeshift worker is to make room for one that may find what was missing.
        self._retry_at: float | None = None
        self._overdue: float | None = None

    def begin(self) -> None:
        """Start the first worker and serve."""
        self._start_worker(blamed=False)
        self._front.watch()

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

    def _start_worker(self, *, blamed: bool, waits: bool = False) -> None:
        """Start a worker, unless too many were started just now; give it the message that waits, unless it waits itself."""
        self._blamed = blamed
        now = time.monotonic()
        if (moment := self._births.next_at(now)) > now:
            self._start_at = moment
            return
        self._start_at = None
        self._births.note(now)
        control = self.setting.control
        controlled = control is not None and not control.is_given_up
        start = worker.Start(
            blamed=blamed,
            why_inert=self._births.why_inert or self._why_inert,
            waits=waits,
            makeshift=self._births.is_makeshift,
            quiet=not self._is_news,
        )
        try:
            link = WorkerLink(self.setting.options, self.estate, start, controlled=controlled)
        except OSError as error:
            self._births.note_failure()
            if worth_logging(self._births.failures):
                log.error("no worker can be started: %s: trying again", error.strerror)  # noqa: TRY400
            self._start_at = now + RETRY_SECONDS
            return
        self._retry_at = now + MAKESHIFT_SECONDS if start.makeshift else None
        self._adopt(link)
        if not waits:
            self._give()
        if control is not None and link.control is not None:
            control.announce(self.setting.name, link.control)

    def _adopt(self, link: WorkerLink) -> None:
        self._link = link
        self._selector.register(link.channel, selectors.EVENT_READ, functools.partial(self._listen, link))
        self._selector.register(link.pidfd, selectors.EVENT_READ, functools.partial(self._bury, link))
        if self._is_news:
            log.info("%s: worker is process %d", self.setting.name, link.pid)

    @property
    def _is_news(self) -> bool:
        """True if the log is to hear of this worker: a guest that has its workers die is not to fill it."""
        return self.restarts == 0 or worth_logging(self.restarts)

    def _give(self) -> None:
        """Give the worker the message that was not answered."""
        message = self._message
        if message is not None and self._link is not None:
            deaths = min(message.deaths, MAX_MESSAGE_DEATHS)
            self._link.give(
                Frame(ToWorker.MESSAGE, deaths, message.number, message.data), self.estate.arrived
            )
            # Longer with each death: on a host that thrashes it may have been the time that was too short.
            self._overdue = time.monotonic() + ANSWER_SECONDS * (1 << deaths)

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
            self._births.note_life()
            self.estate.drop_source()
            return
        self.estate.settle(answer.held if answer.kind == ToKeeper.HOLDING else None)
        self._message = None
        self._overdue = None
        self._front.answer(answer.reply, closing=answer.kind == ToKeeper.CLOSE)

    def _bury(self, link: WorkerLink) -> None:
        """The worker has ended: take what it has left, and put another in its place."""
        self._take_rest(link)
        well = link.bury(expected=self.is_served and not worth_logging(self.restarts + 1))
        if not self.is_served:
            self.ended_well = well
            self._finish()
            return
        self._note_death()
        self._start_worker(blamed=True)

    def _take_rest(self, link: WorkerLink) -> None:
        """Take what a worker that has ended said last, and watch it no more."""
        self._forget(link)
        for _ in range(MAX_LEFT):
            if not self.is_served:
                return
            try:
                self._take(link.take())
            except (EOFError, ConnectionResetError, BlockingIOError, LayoutError):
                return

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
        self._births.note_death()
        if self._message is not None and self._births.has_served:
            self._message.deaths += 1
        if worth_logging(self.restarts):
            log.error(
                "%s: the worker has died, and another takes over: %d so far", self.setting.name, self.restarts
            )

    # Time

    def due(self) -> float | None:
        """When tick() is to be called at the latest, by the monotonic clock; None for never."""
        moments = [self._start_at, self._overdue]
        if self._message is None and self._link is not None:
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
            self._start_worker(blamed=self._blamed)
            return
        is_late = self._retry_at is None or self._overdue is not None
        if is_late and (self._is_news or not self.is_served):
            log.error("%s: the worker hangs: killing process %d", self.setting.name, self._link.pid)
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

    # The front end

    def _pass_on(self, data: bytes, arrived: list[fds.Fd]) -> None:
        """Give the worker the front end's next message."""
        self._number += 1
        for place, fd in enumerate(arrived):
            fd.token = token(self._number, place)
        self.estate.arrived = arrived
        self._message = Message(self._number, data)
        self._give()

    def has_gone(self) -> bool:
        """True if the front end has closed, whatever of it is still unread."""
        return self._front.has_gone()

    # From one version to another

    @property
    def is_settled(self) -> bool:
        """False while it cannot be frozen: it is ending, or its worker has not written a record of this version yet."""
        return self.is_served and self.estate.source is None

    def stop_worker(self) -> None:
        """Have the worker end at once: freeze() comes next."""
        if self._link is not None:
            self._link.kill()

    def freeze(self) -> FrozenGuest | None:
        """Stand still, without a worker, until thaw() or leave(). None if the front end has gone.

        Raises UpgradeError if the worker does not end.
        """
        link = self._link
        if link is not None:
            if not link.has_ended(END_SECONDS):
                raise UpgradeError(f"{self.setting.name}: the worker does not end")
            self._take_rest(link)
            link.bury(expected=True)
        self._start_at = None
        if not self.is_served:
            return None
        self._front.unwatch()
        begun, begun_with = self._front.begun
        return FrozenGuest(
            self.connection,
            self.estate,
            self._number,
            self._message,
            begun,
            begun_with,
            self._front.outgoing,
            self._front.closing,
            self._why_inert,
            self.restarts,
        )

    def thaw(self) -> None:
        """Go on, whether or not it was frozen."""
        if self.is_served and self._link is None:
            self._start_worker(blamed=False)
        if self.is_served:
            self._front.watch()

    @classmethod
    def adopted(cls, frozen: FrozenGuest, setting: Setting) -> Guest:
        """Return a guest that another process has frozen. What is begun is made to wait, until thaw() or go()."""
        # A record of its own in any case: the other process goes on by the old one if this one comes to nothing.
        guest = cls(frozen.connection, setting, frozen.estate.copied(), frozen.restarts)
        guest._number = frozen.number
        guest._message = frozen.message
        guest._front.resume(frozen.begun, frozen.begun_with, frozen.outgoing, closing=frozen.closing)
        guest._front.is_waiting = frozen.message is not None
        guest._why_inert = frozen.why_inert
        return guest

    def prepare(self) -> None:
        """Start a worker that takes over and waits. Nothing is read yet, and nothing answered."""
        self._start_worker(blamed=False, waits=True)

    def await_ready(self, moment: float) -> None:
        """Wait for that worker to have taken over. Raises UpgradeError if it has not by then (monotonic clock)."""
        link = self._link
        try:
            if link is None or not link.has_said(max(0.0, moment - time.monotonic())):
                raise UpgradeError(f"{self.setting.name}: its worker does not get ready")
            self._take(link.take())
        except (EOFError, ConnectionResetError, LayoutError):
            raise UpgradeError(f"{self.setting.name}: its worker died before it was ready") from None

    def go(self) -> None:
        """Have the worker serve, and serve the front end."""
        if self._link is not None:
            self._link.give(Frame(ToWorker.GO, 0, 0, b""))
        self._give()
        self._front.watch()

    # The end

    def end(self) -> None:
        """Close the connection and have the worker end; setting.ended is called once it has."""
        if not self.is_served:
            return
        self.is_served = False
        self._front.close()
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
