"""The worker's end of the keeper's channel: messages in, answers out, each message taking effect once.

The keeper gives a message again when a worker died before its answer was there. If it had taken effect by then, the record
says so, and has the reply. Used by worker.py; the keeper's side is guest.py.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
from dataclasses import replace

from hostdev import fds
from hostdev.balloon import Balloon
from hostdev.errors import StreamError
from hostdev.journal import RecordJournal
from hostdev.session import Session
from hostdev.snapshot import Done
from hostdev.wire.channel import ANSWER, FRAME, MAX_DATAGRAM, Answer, Frame, ToKeeper, ToWorker, token
from hostdev.wire.vhost_user import HEADER, HEADER_SIZE, Request

log = logging.getLogger(__name__)

# What only asks. GET_VRING_BASE is none of these: it stops a ring.
READING = frozenset(
    (
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_QUEUE_NUM,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_CONFIG,
    )
)
# Workers that die with one message until it is refused unread.
MAX_MESSAGE_DEATHS = 3


class MessageEnd:
    """The channel, and the last message that took effect (``done``)."""

    def __init__(
        self, channel: socket.socket, session: Session, balloon: Balloon, journal: RecordJournal
    ) -> None:
        self._channel = channel
        self._session = session
        self._balloon = balloon
        self._journal = journal
        self.done = Done()
        # True for one that could take nothing over: what the front end sent is not its to drop.
        self.is_makeshift = False
        # Whether the last message changed something.
        self._has_changed = False
        # What the keeper was told to hold. None: a predecessor may have told it what is in use now, or not.
        self._told_held: tuple[int, ...] | None = None

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._channel.fileno()

    def has_message(self) -> bool:
        """True if there is one to handle first: it may be the first of those that stop the rings."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        return bool(poll.poll(0))

    def say_ready(self) -> None:
        """This worker serves."""
        kind = ToKeeper.MAKESHIFT if self.is_makeshift else ToKeeper.READY
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the front end has gone already
            self._channel.send(ANSWER.encode(Answer(kind, b"")))

    def wait_for_go(self) -> bool:
        """Wait for the keeper's word before anything is served. False when it has closed."""
        data = self._channel.recv(MAX_DATAGRAM)
        return bool(data) and FRAME.decode(data).kind == ToWorker.GO

    def serve(self) -> bool:
        """Answer one message with one datagram. False when the keeper has closed."""
        try:
            data, received, curtailed = fds.receive(self._channel, MAX_DATAGRAM)
        except ConnectionResetError:
            return False  # the keeper closed with an answer of ours unread
        if not data:
            return False
        frame = FRAME.decode(data)
        if frame.kind == ToWorker.INERT:
            self._balloon.make_inert(frame.data.decode())
            return True
        if curtailed:
            frame = replace(frame, kind=ToWorker.CURTAILED)
        for place, fd in enumerate(received):
            fd.token = token(frame.number, place)
        self.handle(frame, received)
        try:
            self._channel.send(ANSWER.encode(self.answer()))
        except (BrokenPipeError, ConnectionResetError):
            return False  # the keeper closed meanwhile: nobody waits for the answer
        return True

    def handle(self, frame: Frame, received: list[fds.Fd]) -> None:
        """Have a message take effect, once: a predecessor may have been killed after it had, and before it said so."""
        if frame.number == self.done.number:
            fds.close_all(received)
            return
        request = HEADER.decode(frame.data[:HEADER_SIZE]).request
        self._has_changed = request not in READING
        reply, closing = self._effect(frame, received)
        self.done = Done(frame.number, reply, closing)
        self._journal.handled(frame.number)

    def _effect(self, frame: Frame, received: list[fds.Fd]) -> tuple[bytes, bool]:
        """Return the reply, and whether the connection is to be closed."""
        header, payload = HEADER.decode(frame.data[:HEADER_SIZE]), frame.data[HEADER_SIZE:]
        if frame.deaths >= MAX_MESSAGE_DEATHS:
            fds.close_all(received)
            self._balloon.make_inert(f"{frame.deaths} workers died with one message: it is refused")
            return self._session.give_up(header, payload), False
        curtailed = frame.kind == ToWorker.CURTAILED
        try:
            return self._session.handle(header, payload, received, curtailed=curtailed), False
        except StreamError as error:
            log.error("closing the connection: %s", error)  # noqa: TRY400  (the peer's fault: no traceback)
            return b"", True
        except Exception:
            log.exception("unexpected error in a message")
            self._balloon.make_inert("an unexpected error in a message")
            return self._session.give_up(header, payload), False

    def answer(self) -> Answer:
        """Answer the message that was handled last."""
        if self.done.closing:
            return Answer(ToKeeper.CLOSE, b"")
        if self.is_makeshift:
            return Answer(ToKeeper.LOST if self._has_changed else ToKeeper.ANSWER, self.done.reply)
        held = self._session.held()
        if held == self._told_held:
            return Answer(ToKeeper.ANSWER, self.done.reply)
        self._told_held = held
        return Answer(ToKeeper.HOLDING, self.done.reply, held)
