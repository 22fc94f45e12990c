"""One client's conversation in QMP, the server's side, sans I/O: bytes in, commands out; answers in, bytes out.

What a client can do wrong is answered here, in QEMU's words (read off QEMU 11.1.3); what comes out is a command that
exists, with arguments of the declared types. One command is out at a time and the next is not looked at before it is
answered, so answers come in the order of the commands. Who carries it out is control.py's business.

    session = QmpSession()               # session.outgoing holds the greeting
    session.feed(data)
    command = session.next_command()     # None: more input is needed, or what is outgoing must go first
    session.answer({"actual": 1 << 30})  # or session.refuse(error)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hostdev import __version__
from hostdev.errors import CommandError
from hostdev.json_stream import JsonStream, parse
from hostdev.schema import COMMANDS, Place, check_arguments

PACKAGE = "vhost-user-balloon"

# Bytes that may wait for a client before its next command is looked at: one that sends without reading is held up by
# its own answers, and not by ours to others.
ANSWERS_LIMIT = 4 << 10
# Values looked at before others have their turn. Each costs some 20 us, and a client can send nothing but errors.
VALUES_PER_TURN = 32


@dataclass(frozen=True, slots=True)
class Command:
    """A checked command."""

    name: str
    arguments: Mapping[str, Any]


def version() -> dict[str, Any]:
    """Answer query-version: this program's version in the shape that clients of QEMU expect."""
    major, minor, micro = (int(number) for number in re.findall(r"\d+", __version__)[:3])
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": PACKAGE}


class QmpSession:
    """One client. ``outgoing`` is for the owner to send, and to delete from as far as it was taken."""

    def __init__(self) -> None:
        self._stream = JsonStream()
        self._id: dict[str, Any] = {}
        self.negotiated = False
        # A command was handed out and not answered yet.
        self.outstanding = False
        # There may be a whole value among what was fed.
        self.has_input = False
        self.outgoing = bytearray()
        self._send({"QMP": {"version": version(), "capabilities": []}})

    def feed(self, data: bytes) -> None:
        """Take what the client sent."""
        self._stream.feed(data)
        self.has_input = True

    @property
    def is_ready(self) -> bool:
        """True if next_command() may get on."""
        return self.has_input and not self.outstanding and len(self.outgoing) < ANSWERS_LIMIT

    def next_command(self) -> Command | None:
        """Return the next command that is to be carried out; answer by itself what is none. None: see is_ready."""
        for _turn in range(VALUES_PER_TURN):
            if not self.is_ready:
                break
            try:
                command = self._next()
            except CommandError as error:
                self.refuse(error)
                continue
            if command is not None:
                self.outstanding = True
                return command
        return None

    def _next(self) -> Command | None:
        """Look at one value. Raises CommandError."""
        self._id = {}
        value = self._stream.next()
        if value is None:
            self.has_input = False
            return None
        command = self._command(parse(value))
        if not self.negotiated and command.name != "qmp_capabilities":
            text = "Expecting capabilities negotiation with 'qmp_capabilities'"
            raise CommandError(text, "CommandNotFound")
        check_arguments(command.name, command.arguments)
        if COMMANDS[command.name].place is not Place.SESSION:
            return command
        self._negotiate(command.arguments.get("enable", []))
        return None

    def _command(self, value: object) -> Command:
        """Check what all commands have in common."""
        if not isinstance(value, dict):
            raise CommandError("QMP input must be a JSON object")
        if "id" in value:
            self._id = {"id": value["id"]}
        for key, member in value.items():
            _check_member(key, member)
        if "execute" not in value:
            raise CommandError("QMP input lacks member 'execute'")
        return Command(value["execute"], value.get("arguments", {}))

    def _negotiate(self, enable: list[str]) -> None:
        if self.negotiated:
            text = "Capabilities negotiation is already complete, command ignored"
            raise CommandError(text, "CommandNotFound")
        if enable:
            raise CommandError(f"Capability {', '.join(enable)} not available")
        self.negotiated = True
        self.answer({})

    def answer(self, value: object) -> None:
        """Answer the outstanding command."""
        self.outstanding = False
        self._send({"return": value, **self._id})

    def refuse(self, error: CommandError) -> None:
        """Answer the outstanding command, or what could not become one, with an error."""
        self.outstanding = False
        self._send({"error": {"class": error.error_class, "desc": str(error)}, **self._id})

    def tell(self, event: str, data: Mapping[str, Any], nanoseconds: int) -> None:
        """Send an event to a client that has negotiated. nanoseconds: since the epoch."""
        if self.negotiated:
            timestamp = {
                "seconds": nanoseconds // 1_000_000_000,
                "microseconds": nanoseconds // 1000 % 1_000_000,
            }
            self._send({"event": event, "data": data, "timestamp": timestamp})

    def _send(self, message: Mapping[str, Any]) -> None:
        """ASCII in any case, and a line each: QEMU's end in CRLF."""
        self.outgoing += json.dumps(message).encode() + b"\r\n"


def _check_member(key: str, member: object) -> None:
    if key == "execute":
        if not isinstance(member, str):
            raise CommandError("QMP input member 'execute' must be a string")
    elif key == "arguments":
        if not isinstance(member, dict):
            raise CommandError("QMP input member 'arguments' must be an object")
    elif key != "id":
        raise CommandError(f"QMP input member '{key}' is unexpected")
