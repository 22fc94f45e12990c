"""The guests as the control process knows them: places by name, each with the pair to its worker and those who wait.

A worker may die, or be replaced, under a front end that notices nothing. The pair has then ended and the guest has not:
the keeper says in a moment whether there is a successor. Until it does, who has asked waits and who asks anew waits with
them; a successor is asked all of it. To ask twice is harmless, for a command sets an absolute value or looks at one.

    no front end       GUEST without a descriptor: answered at once, "no device"
    served             GUEST with one: asked over that pair
    between workers    the pair has ended: questions wait for the next GUEST or GONE

Used by control.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import select
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hostdev import fds
from hostdev.client import Client
from hostdev.control_peer import Peer, Question
from hostdev.errors import CommandError
from hostdev.json_stream import parse_whole
from hostdev.metrics import worth_logging
from hostdev.schema import GUEST_EVENTS
from hostdev.wire.control import Envelope, Kind
from hostdev.wire.layout import LayoutError

log = logging.getLogger(__name__)

# Datagrams that are taken from a pair that is given up. One whose worker is dead holds fewer: of a default buffer of
# 212,992 bytes each takes 768 or more. One that lives and never stops talking must not hold everybody up.
MAX_LEFT = 1024

Tell = Callable[[str, Mapping[str, Any]], None]


class Guest:
    """One place where a front end may connect."""

    def __init__(self, name: str, numbers: Iterator[int], tell: Tell) -> None:
        """numbers: ids of questions. tell: sends an event to all clients."""
        self.name = name
        self._numbers = numbers
        self._tell = tell
        self._connected = False
        # None: no front end is connected, or its worker has died and the keeper has not said yet what comes next.
        self.peer: Peer | None = None
        # By id, in the order in which they were asked, and the ids of those that a successor has not been asked yet.
        self._waiting: dict[int, Question] = {}
        self._unsent: deque[int] = deque()
        self._unreadable = 0

    # What the keeper says

    def connect(self, end: fds.Fd) -> None:
        """Have questions answered by who is at the other end of this pair from now on, and those that wait first."""
        self._leave()
        self.peer = Peer(socket.socket(fileno=end.detach()))
        self._connected = True
        self._unsent = deque(self._waiting)
        self._send_waiting()

    def disconnect(self) -> None:
        """There is no front end, and nobody to answer who still waits."""
        self._leave()
        self._connected = False
        waiting, self._waiting = self._waiting, {}
        for question in waiting.values():
            question.answer_without_device()

    def _leave(self) -> None:
        """Close the pair, when what its worker has said already was taken."""
        if self.peer is None:
            return
        with contextlib.suppress(EOFError, BlockingIOError):
            for _datagram in range(MAX_LEFT):
                self._receive(self.peer)
        self.peer.close()
        self.peer = None
        self._unsent.clear()

    # Clients

    def ask(self, question: Question) -> None:
        """Send a question, or keep it until there is somebody to send it to.

        Raises CommandError if it is too long, or the worker does not listen.
        """
        if not self._connected:
            question.answer_without_device()
            return
        number = next(self._numbers)
        if self._unsent or not self._send(number, question):
            raise CommandError("the device is busy")
        self._waiting[number] = question

    def cancel(self, client: Client) -> None:
        """Call off what the client asked, if anything."""
        for number, question in list(self._waiting.items()):
            if question.client is client:
                del self._waiting[number]
                self._send_cancel(number)

    def _send(self, number: int, question: Question) -> bool:
        """Send a question to the worker. False if that does not listen; a worker that has ended is asked nothing."""
        if self.peer is None:
            return True
        try:
            self.peer.send(Envelope(question.kind, number, question.text))
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            self._leave()
        return True

    def _send_waiting(self) -> None:
        """Ask a successor what its predecessor has not answered, as far as it listens."""
        while self._unsent:
            question = self._waiting.get(self._unsent[0])
            if question is not None and not self._send(self._unsent[0], question):
                return
            if self._unsent:  # or it was the end of this worker as well
                self._unsent.popleft()

    def _send_cancel(self, number: int) -> None:
        """If it cannot be sent, the answer will find nobody, which is as good."""
        if self.peer is not None and number not in self._unsent:
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                self.peer.send(Envelope(Kind.CANCEL, number))

    # The worker

    @property
    def mask(self) -> int:
        """What to wait for on the pair, as poll() has it."""
        return select.POLLIN | (select.POLLOUT if self._unsent else 0)

    def serve(self, peer: Peer, mask: int) -> None:
        """Act on poll()'s word about a pair, if it is still ours."""
        if mask & select.POLLOUT and peer is self.peer:
            self._send_waiting()
        if mask & ~select.POLLOUT and peer is self.peer:
            try:
                self._receive(peer)
            except BlockingIOError:
                pass  # taken meanwhile
            except EOFError:
                self._leave()

    def _receive(self, peer: Peer) -> None:
        """Receive one envelope and pass it on. Raises EOFError if the worker has ended, BlockingIOError if there is none."""
        try:
            envelope, received = peer.receive()
            fds.close_all(received)
            self._take(envelope)
        except (LayoutError, CommandError, LookupError, TypeError) as error:
            self._unreadable += 1
            if worth_logging(self._unreadable):
                log.error("what the worker of guest %r says cannot be read: %s", self.name, error)  # noqa: TRY400

    def _take(self, envelope: Envelope) -> None:
        """Pass an event or an answer on. Raises CommandError, LookupError or TypeError for an event that is none."""
        if envelope.kind == Kind.EVENT:
            value = parse_whole(envelope.text)
            if value["event"] in GUEST_EVENTS:
                self._tell(value["event"], {**value["data"], "guest": self.name})
            return
        question = self._waiting.pop(envelope.id, None)
        if question is not None:
            question.answer(envelope)


class Guests:
    """All places that the keeper has told of."""

    def __init__(self, numbers: Iterator[int], tell: Tell) -> None:
        self._numbers = numbers
        self._tell = tell
        self._guests: dict[str, Guest] = {}

    def take(self, envelope: Envelope, received: list[fds.Fd]) -> None:
        """Follow a GUEST or a GONE of the keeper."""
        name = envelope.text.decode(errors="replace")
        if envelope.kind == Kind.GONE:
            gone = self._guests.pop(name, None)
            if gone is not None:
                gone.disconnect()
            return
        guest = self._guests.setdefault(name, Guest(name, self._numbers, self._tell))
        if received:
            guest.connect(received[0])
        else:
            guest.disconnect()

    def ask(self, name: str | None, question: Question) -> None:
        """Ask the guest of this name, or the only one. Raises CommandError if there is no such one, or as Guest.ask()."""
        if name is None and not self._guests:
            question.answer_without_device()
            return
        self._find(name).ask(question)

    def _find(self, name: str | None) -> Guest:
        if name is None and len(self._guests) == 1:
            (guest,) = self._guests.values()
            return guest
        if name is None:
            example = json.dumps(next(iter(self._guests)), ensure_ascii=False)
            raise CommandError(f'several guests are served: name one, e.g. "guest": {example}')
        if name not in self._guests:
            raise CommandError(f"Guest '{name}' not found: query-guests has them", "DeviceNotFound")
        return self._guests[name]

    def cancel(self, client: Client) -> None:
        """Call off what the client asked, if anything."""
        for guest in self._guests.values():
            guest.cancel(client)

    def wanted(self) -> dict[int, int]:
        """What to wait for, as poll() has it, by descriptor."""
        guests = self._guests.values()
        return {guest.peer.number: guest.mask for guest in guests if guest.peer is not None}

    def ready(self, events: Mapping[int, int]) -> list[tuple[Guest, Peer, int]]:
        """Whose pairs poll() saw, and what of them, before anything is done: a number may be another's a moment later."""
        peers = [(guest, guest.peer) for guest in self._guests.values()]
        return [
            (guest, peer, events[peer.number])
            for guest, peer in peers
            if peer is not None and peer.number in events
        ]

    def end(self) -> None:
        """Answer who still waits."""
        for guest in self._guests.values():
            guest.disconnect()
