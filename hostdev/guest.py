"""One front end's connection, and a worker behind it at all times.

Relays whole messages (front_end.py): what a message means is the worker's business, in a process of its own. One message at
a time, kept with its descriptors until the answer has come back, whichever worker it comes from (post.py). So each message is
answered once, and the front end notices nothing when a worker dies; nor does it if all of this goes to another version of the
keeper meanwhile. Used by keeper.py.
"""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from hostdev import fds
from hostdev.control_link import ControlLink
from hostdev.estate import Estate
from hostdev.front_end import FrontEnd
from hostdev.frozen import FrozenGuest, Message
from hostdev.options import Options
from hostdev.post import Post
from hostdev.wire.channel import Answer, ToKeeper, token


@dataclass(frozen=True, slots=True)
class Setting:
    """What a guest needs of the keeper. ended: to be called once everything of it has gone."""

    name: str
    options: Options
    selector: selectors.BaseSelector
    control: ControlLink | None
    ended: Callable[[Guest], None]


@dataclass
class Guest:
    """One front end."""

    connection: socket.socket
    setting: Setting
    estate: Estate = field(default_factory=Estate)
    # False once the front end has gone, or was given up, and its worker is what is waited for.
    is_served: bool = True
    # False if the last worker had to be killed at the end.
    ended_well: bool = True

    def __post_init__(self) -> None:
        setting = self.setting
        self._front = FrontEnd(self.connection, setting.selector, self._pass_on, self.end)
        self._post = Post(
            setting.name,
            setting.options,
            setting.selector,
            setting.control,
            self.estate,
            self._answer,
            self._finish,
        )
        self._number = 0
        self._has_finished = False

    def begin(self) -> None:
        """Start the first worker and serve."""
        self._post.fill(blamed=False)
        self._front.watch()

    # The worker

    @property
    def restarts(self) -> int:
        """How many workers were replaced."""
        return self._post.restarts

    @property
    def worker(self) -> int | None:
        """Process id of the worker, None while there is none."""
        return None if self._post.link is None else self._post.link.pid

    @property
    def control(self) -> fds.Fd | None:
        """The control process's end of the pair to the worker."""
        return None if self._post.link is None else self._post.link.control

    def forget_control(self) -> None:
        """There is no control process any more, and the worker is to know."""
        link = self._post.link
        if link is not None and link.control is not None:
            link.control.close()
            link.control = None

    def make_inert(self, why: str) -> None:
        """Have this worker and its successors release nothing."""
        self._post.make_inert(why)

    def due(self) -> float | None:
        """When tick() is to be called at the latest, by the monotonic clock; None for never."""
        return self._post.due()

    def tick(self) -> None:
        """Do what the time has come for."""
        self._post.tick()

    def note_stop(self) -> None:
        """A child has stopped, gone on or ended."""
        self._post.note_stop()

    def forgive(self) -> None:
        """The keeper itself was stopped: nobody is late yet."""
        self._post.forgive()

    # The front end

    def _pass_on(self, received: fds.Received) -> None:
        """Give the worker the front end's next message."""
        self._number += 1
        for place, fd in enumerate(received.fds):
            fd.token = token(self._number, place)
        self.estate.arrived = received.fds
        self._post.give(Message(self._number, received.data, curtailed=received.curtailed))

    def _answer(self, answer: Answer) -> None:
        self._front.answer(answer.reply, closing=answer.kind == ToKeeper.CLOSE)

    def has_gone(self) -> bool:
        """True if the front end has closed, whatever of it is still unread."""
        return self._front.has_gone()

    # From one version to another

    @property
    def is_settled(self) -> bool:
        """False while it cannot be frozen: it is ending, or there is no record of this version that could be gone on with."""
        return self.is_served and self.estate.source is None and not self._post.is_lost

    def stop_worker(self) -> None:
        """Have the worker end at once: freeze() comes next."""
        if self._post.link is not None:
            self._post.link.kill()

    def freeze(self) -> FrozenGuest | None:
        """Stand still, without a worker, until thaw() or leave(). None if the front end has gone.

        Raises UpgradeError if the worker does not end.
        """
        self._post.vacate()
        if not self.is_served:
            return None
        self._front.unwatch()
        begun = self._front.begun
        return FrozenGuest(
            self.connection,
            self.estate,
            self._number,
            self._post.message,
            begun.data,
            begun.fds,
            self._front.outgoing,
            self._front.closing,
            self._post.why_inert,
            self._post.restarts,
            begun.curtailed,
        )

    def thaw(self) -> None:
        """Go on, whether or not it was frozen."""
        if self.is_served and self._post.link is None:
            self._post.fill(blamed=False)
        if self.is_served:
            self._front.watch()

    @classmethod
    def adopted(cls, frozen: FrozenGuest, setting: Setting) -> Guest:
        """Return a guest that another process has frozen. What is begun is made to wait, until thaw() or go()."""
        # A record of its own in any case: the other process goes on by the old one if this one comes to nothing.
        guest = cls(frozen.connection, setting, frozen.estate.copied())
        guest._number = frozen.number
        begun = fds.Received(frozen.begun, list(frozen.begun_with), frozen.begun_curtailed)
        guest._front.resume(begun, frozen.outgoing, closing=frozen.closing)
        guest._front.is_waiting = frozen.message is not None
        guest._post.message = frozen.message
        guest._post.why_inert = frozen.why_inert
        guest._post.restarts = frozen.restarts
        return guest

    def prepare(self) -> None:
        """Start a worker that takes over and waits. Nothing is read yet, and nothing answered."""
        self._post.fill(blamed=False, waits=True)

    def await_ready(self, moment: float) -> None:
        """Wait for that worker to have taken over. Raises UpgradeError if it has not by then (monotonic clock)."""
        self._post.await_ready(moment)

    def go(self) -> None:
        """Have the worker serve, and serve the front end."""
        self._post.go()
        self._front.watch()

    # The end

    def end(self) -> None:
        """Close the connection and have the worker end; setting.ended is called once it has."""
        if not self.is_served:
            return
        self.is_served = False
        self._front.close()
        self._post.close()

    def _finish(self, well: bool) -> None:
        if self._has_finished:
            return
        self._has_finished = True
        self.ended_well = well
        self.estate.close()
        self.setting.ended(self)
