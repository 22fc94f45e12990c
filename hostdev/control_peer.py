"""The keeper or a worker as the control process sees it: asked in datagrams, and who waits for which answer.

Used by control.py.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from hostdev import fds
from hostdev.client import Client
from hostdev.errors import CommandError
from hostdev.wire.control import ENVELOPE, MAX_ENVELOPE, Envelope, Kind

# The upper byte of an id is the control process's generation, for a predecessor's question may still be answered.
_GENERATION_SHIFT = 24


def ids(generation: int) -> Iterator[int]:
    """Ids of questions, 1 to 2^24 - 1 in turn, apart from those of the 255 generations before and after."""
    upper = (generation & 0xFF) << _GENERATION_SHIFT
    while True:
        for number in range(1, 1 << _GENERATION_SHIFT):
            yield upper | number


@dataclass(frozen=True, slots=True)
class Question:
    """A client that waits, and the name of its command."""

    client: Client
    command: str


class Peer:
    """One end of a SOCK_SEQPACKET pair."""

    def __init__(self, channel: socket.socket, numbers: Iterator[int]) -> None:
        self.channel = channel
        self._numbers = numbers
        self._waiting: dict[int, Question] = {}

    def ask(self, kind: Kind, text: bytes, question: Question) -> None:
        """Send a question.

        Raises CommandError if it cannot be sent now, BrokenPipeError or ConnectionResetError if the peer has ended.
        """
        number = next(self._numbers)
        data = ENVELOPE.encode(Envelope(kind, number, text))
        if len(data) > MAX_ENVELOPE:
            raise CommandError(f"the command is longer than {MAX_ENVELOPE} bytes")
        try:
            fds.send(self.channel, data)
        except BlockingIOError:
            raise CommandError("the device is busy") from None
        self._waiting[number] = question

    def receive(self) -> tuple[Envelope, list[fds.Fd]]:
        """Receive one envelope and its descriptors.

        Raises EOFError if the peer has ended, LayoutError for what is no envelope, BlockingIOError if there is none.
        """
        try:
            data, received = fds.receive(self.channel, MAX_ENVELOPE)
        except ConnectionResetError:
            raise EOFError from None
        if not data:
            raise EOFError
        return ENVELOPE.decode(data), received

    def take(self, number: int) -> Question | None:
        """Return who asked, once. None: the client has gone, or a predecessor of this process asked."""
        return self._waiting.pop(number, None)

    def take_all(self) -> list[Question]:
        """Return all who wait."""
        questions = list(self._waiting.values())
        self._waiting.clear()
        return questions

    def cancel(self, client: Client) -> None:
        """Call off what the client asked, if anything."""
        for number, question in list(self._waiting.items()):
            if question.client is client:
                del self._waiting[number]
                self._send_cancel(number)

    def _send_cancel(self, number: int) -> None:
        """If it cannot be sent, the answer will find nobody, which is as good."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            fds.send(self.channel, ENVELOPE.encode(Envelope(Kind.CANCEL, number)))
