"""The keeper as the control process asks it: to end, to serve more guests or fewer, to be upgraded. Used by control.py.

It parses no JSON: what it needs goes to it as bare text, checked here. What it answers is JSON that it was written with.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hostdev import fds
from hostdev.client import Client
from hostdev.control_peer import Peer, Question
from hostdev.errors import CommandError
from hostdev.qmp_session import Command
from hostdev.wire.control import QUIT_FORCED, Envelope, Kind


def _quit(arguments: Mapping[str, Any]) -> bytes:
    return QUIT_FORCED if arguments.get("force", False) else b"{}"


def _path(arguments: Mapping[str, Any]) -> bytes:
    """Return where to listen. Raises CommandError for what is no absolute path."""
    path: str = arguments["socket-path"]
    if not path:
        raise CommandError("Parameter 'socket-path' is empty: name where the front end is to connect")
    if "\0" in path:
        raise CommandError("Parameter 'socket-path' has a NUL in it, which no path can have")
    if not path.startswith("/"):
        raise CommandError(
            f"Parameter 'socket-path' must be absolute, and '{path}' is not: the device's folder is not yours"
        )
    return path.encode()


# Each command's envelope, and its text.
_QUESTIONS: Mapping[str, tuple[Kind, Callable[[Mapping[str, Any]], bytes]]] = {
    "quit": (Kind.QUIT, _quit),
    "guest-add": (Kind.ADD, _path),
    "guest-remove": (Kind.REMOVE, lambda arguments: str(arguments["guest"]).encode()),
    "query-guests": (Kind.GUESTS, lambda _arguments: b""),
    "upgrade": (Kind.UPGRADE, lambda _arguments: b""),
}


class KeeperEnd:
    """The channel to the keeper, and who waits for its answers.

    A question is not called off when its client goes: who asks for an end, or for another guest, may leave at once.
    """

    def __init__(self, channel: socket.socket, numbers: Iterator[int]) -> None:
        self._peer = Peer(channel)
        self._numbers = numbers
        self._waiting: dict[int, Question] = {}

    @property
    def number(self) -> int:
        """The channel's descriptor."""
        return self._peer.number

    def ask(self, client: Client, command: Command) -> None:
        """Send a question. Raises CommandError if it is none, or cannot be sent now."""
        kind, write = _QUESTIONS[command.name]
        question = Question(client, command.name, kind, write(command.arguments))
        number = next(self._numbers)
        try:
            self._peer.send(Envelope(kind, number, question.text))
        except BlockingIOError:
            raise CommandError("the device is busy") from None
        except (BrokenPipeError, ConnectionResetError):
            raise CommandError("the device is ending already") from None
        self._waiting[number] = question

    def receive(self) -> tuple[Envelope, list[fds.Fd]]:
        """Receive one envelope and its descriptors. Raises EOFError when the keeper has closed the channel."""
        return self._peer.receive()

    def answer(self, envelope: Envelope) -> str | None:
        """Give who asked its answer. Returns the name of the command that the keeper carries out, None for a refusal."""
        question = self._waiting.pop(envelope.id, None)
        if question is None:
            return None
        question.answer(envelope)
        return question.command if envelope.kind == Kind.RETURN else None
