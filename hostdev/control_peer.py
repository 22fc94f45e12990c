"""The keeper or a worker as the control process sees it: datagrams there and back, and a client that waits for one.

Used by control_keeper.py and control_guests.py, which know who waits for which.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from hostdev import fds
from hostdev.client import Client
from hostdev.errors import CommandError
from hostdev.json_stream import parse_whole
from hostdev.qmp_session import Command
from hostdev.wire.control import ENVELOPE, MAX_ENVELOPE, Envelope, Kind

log = logging.getLogger(__name__)

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
    """A client that waits, the name of its command, and what is asked for it."""

    client: Client
    command: str
    kind: Kind
    text: bytes

    def answer(self, envelope: Envelope) -> None:
        """Give the client its answer. Read on the way: what a worker that was taken over says must not get at it."""
        session = self.client.session
        try:
            value = parse_whole(envelope.text)
            if envelope.kind == Kind.RETURN:
                session.answer(value)
            else:
                session.refuse(CommandError(str(value["desc"]), str(value["class"])))
        except (CommandError, LookupError, TypeError) as error:
            log.error("an answer to %s cannot be read: %s", self.command, error)  # noqa: TRY400
            session.refuse(CommandError("the device's answer cannot be read"))

    def answer_without_device(self) -> None:
        """Answer what is asked about a guest while there is none."""
        if self.command == "query-status":
            self.client.session.answer({"connected": False})
        else:
            error = CommandError("No balloon device has been activated", "DeviceNotActive")
            self.client.session.refuse(error)


def ask_guest(client: Client, command: Command) -> Question:
    """Return what a worker is asked: which guest is meant is no business of its."""
    arguments = {name: value for name, value in command.arguments.items() if name != "guest"}
    text = json.dumps({"execute": command.name, "arguments": arguments}).encode()
    return Question(client, command.name, Kind.COMMAND, text)


class Peer:
    """One end of a SOCK_SEQPACKET pair. Nothing here waits."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    @property
    def number(self) -> int:
        """Its descriptor."""
        return self._channel.fileno()

    def close(self) -> None:
        """Close it."""
        self._channel.close()

    def send(self, envelope: Envelope) -> None:
        """Send one envelope.

        Raises CommandError if it is too long, BlockingIOError if it cannot be sent now, BrokenPipeError or
        ConnectionResetError if the peer has ended.
        """
        data = ENVELOPE.encode(envelope)
        if len(data) > MAX_ENVELOPE:
            raise CommandError(f"the command is longer than {MAX_ENVELOPE} bytes")
        fds.send(self._channel, data)

    def receive(self) -> tuple[Envelope, list[fds.Fd]]:
        """Receive one envelope and its descriptors.

        Raises EOFError if the peer has ended and all that it said was received, LayoutError for what is no envelope,
        BlockingIOError if there is none.
        """
        received = self._receive()
        if not received.data:
            raise EOFError
        return ENVELOPE.decode(received.data), received.fds

    def _receive(self) -> fds.Received:
        try:
            return fds.receive(self._channel, MAX_ENVELOPE)
        except ConnectionResetError:
            # A peer that ended with something of ours unread: said once, and ahead of what it sent before
            # (__skb_try_recv_datagram() looks at the socket's error first).
            return fds.receive(self._channel, MAX_ENVELOPE)
