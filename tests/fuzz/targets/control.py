"""The control socket: a client's bytes, cut anywhere, and the commands that come of them on a real device.

An input is a list of commands with arguments right and wrong, of JSON and what is nearly JSON, and of raw bytes; between
them time passes and guest and front end come and go.

- Each line that is sent is JSON and one of: the greeting, "return", "error", "event"; a "return" is as the schema has it.
- Each command has one answer, at the latest when its time is over, and no other is looked at before.
- I6: cut anywhere, a stream makes the same commands and the same answers.
- What is kept of a client is bounded.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable

from hostdev.backend_channel import BackendChannel
from hostdev.client import READ_SIZE
from hostdev.commands import Commands
from hostdev.control_peer import ask_guest
from hostdev.errors import CommandError
from hostdev.fds import Fd, stream_socket
from hostdev.json_stream import MAX_DEPTH, MAX_VALUE, parse_whole
from hostdev.qmp_session import ANSWERS_LIMIT, Command, QmpSession
from hostdev.schema import COMMANDS, Place, query_qmp_schema
from hostdev.session import Session
from hostdev.wire.balloon import Role
from hostdev.wire.control import Envelope, Kind
from tests.fuzz.descriptors import wares
from tests.fuzz.ground import DATA, PAGE, ground
from tests.fuzz.ring_guest import RingGuest
from tests.fuzz.source import Source
from tests.schema_check import Schema

MAX_PIECES = 40
# Turns of the loop in which a command must be answered: a walk through memory has some for each region.
MAX_TURNS = 16
# Seconds after which whatever waits has been answered: more than any of the device's own limits.
LONG = 10.0
# Bytes of one answer: an envelope of 64 KiB, in JSON of ASCII.
MAX_ANSWER = 512 << 10

_NAMES = tuple(name for name in COMMANDS if name != "qmp_capabilities")
_NEGOTIATE = b'{"execute":"qmp_capabilities"}'
_CUTS = (1, 2, 7, 64)


@functools.cache
def _schema() -> Schema:
    return Schema(query_qmp_schema())


def check(data: bytes) -> None:
    """Act out one input."""
    source = Source(data)
    conversation = Conversation()
    if source.below(8):
        conversation.hear(_NEGOTIATE)
    for _ in range(MAX_PIECES):
        if not source:
            break
        source.pick(_ACTIONS)(conversation, source)
    conversation.close()


class Conversation:
    """One client, and the device that it speaks with."""

    def __init__(self) -> None:
        self.guest = RingGuest()
        for role in Role:
            self.guest.start(role)
        balloon = self.guest.balloon
        self.session = Session(balloon, self.guest.metrics)
        self._commands = Commands(balloon, self.session, clock=lambda: self.guest.now)
        self._client = QmpSession()
        self._stream = b""
        self._asked: list[Command] = []
        self._lines: list[bytes] = []
        self._number = 0

    def hear(self, data: bytes) -> None:
        """The client has sent something, which is read once there is nothing left to do about what it sent before."""
        self._wait()
        self._stream += data
        self._client.feed(data)
        self._go_on()

    def _go_on(self) -> None:
        while self._client.is_ready:
            command = self._client.next_command()
            if command is not None:
                self._asked.append(command)
                self._execute(command)
            assert len(self._client.outgoing) <= ANSWERS_LIMIT + MAX_ANSWER
            self._take_lines()
        self._take_lines()
        assert self._client.outstanding or len(self._client._stream._data) <= MAX_VALUE

    def _execute(self, command: Command) -> None:
        declared = COMMANDS[command.name]
        assert declared.place is not Place.SESSION
        if declared.place is not Place.DEVICE:
            self._client.answer({})
            return
        # The client is used for nothing but its session, which is ours.
        question = ask_guest(None, command)  # type: ignore[arg-type]
        self._number += 1
        self._commands.handle(Envelope(question.kind, self._number, question.text))
        self.take_answers()

    def take_answers(self) -> None:
        """Take what the device has said."""
        while self._commands.outgoing:
            envelope = self._commands.outgoing.popleft()
            value = parse_whole(envelope.text)
            if envelope.kind == Kind.EVENT:
                _schema().validate_event(value["event"], value["data"] | {"guest": ""})
                self._client.tell(value["event"], value["data"], 0)
                continue
            assert (envelope.id, self._client.outstanding) == (self._number, True), "an answer to nothing"
            if envelope.kind == Kind.RETURN:
                _schema().validate_return(self._asked[-1].name, value)
                self._client.answer(value)
            else:
                self._client.refuse(CommandError(value["desc"], value["class"]))

    def _take_lines(self) -> None:
        for line in bytes(self._client.outgoing).splitlines():
            value = json.loads(line)
            kinds = [kind for kind in ("QMP", "return", "error", "event") if kind in value]
            assert len(kinds) == 1, line
            self._lines.append(line)
        self._client.outgoing.clear()

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and the guest be served."""
        self.guest.tick(seconds)
        for index in list(self.guest.balloon.rings.started):
            self.guest.run(index)
        self._commands.tick()
        self.take_answers()
        self._go_on()

    def _wait(self) -> None:
        """Wait for what is owed: as many commands as have room in what is read at once."""
        for _ in range(READ_SIZE):
            if not self._client.outstanding:
                return
            number = self._number
            for _ in range(MAX_TURNS):
                self.pass_time(LONG)
                if not self._client.outstanding or self._number != number:
                    break
            else:
                raise AssertionError("a command is never answered")

    def close(self) -> None:
        """Wait for what is owed; compare with the same stream in one piece."""
        self._wait()
        self._compare()
        if self.session.backend_channel is not None:
            self.session.backend_channel.close()
        self.guest.finish()

    def _compare(self) -> None:
        asked = _commands_of(self._stream)
        assert asked == self._asked, "another command, by how the stream was cut"


def _commands_of(stream: bytes) -> list[Command]:
    """Return the commands of a stream that comes in one piece."""
    client, found = QmpSession(), list[Command]()
    client.feed(stream)
    while client.is_ready:
        command = client.next_command()
        client.outgoing.clear()
        if command is not None:
            found.append(command)
            client.answer({})
    return found


def _say(conversation: Conversation, source: Source) -> None:
    data = source.pick(_TEXTS)(source)
    cut = 0 if source.below(4) else source.pick(_CUTS)
    step = cut if cut and len(data) < 50 * cut else READ_SIZE
    for start in range(0, len(data), step):
        conversation.hear(data[start : start + step])


def _pass_time(conversation: Conversation, source: Source) -> None:
    conversation.pass_time(source.pick((0.0, 0.5, 1.0, LONG)))


def _forget_memory(conversation: Conversation, source: Source) -> None:
    conversation.guest.set_memory(ground().regions if source.flag() else ())


def _give_channel(conversation: Conversation, source: Source) -> None:
    if conversation.session.backend_channel is None:
        sock = stream_socket(Fd(os.dup(wares().channel.fileno())))
        assert sock is not None
        conversation.session.backend_channel = BackendChannel(sock)


def _offer(conversation: Conversation, source: Source) -> None:
    role = source.below(5)
    ground().write(DATA, source.take(20))
    conversation.guest.offer(role, [(DATA, 20, False), (DATA + PAGE, PAGE, True)], source.below(8) * 2)
    if source.flag():
        conversation.guest.write_config(source.number(4), 0)


def _command(source: Source) -> bytes:
    """A command as a client has it, or with one thing that is wrong."""
    name = source.pick(_NAMES)
    members = [member.removeprefix("*") for member in COMMANDS[name].arguments if member != "*guest"]
    arguments = {each: source.pick(_VALUES)(source) for each in members if source.below(8)}
    if source.one_in(8):
        arguments[source.pick(("guest", "x", "value", ""))] = source.pick(_VALUES)(source)
    message: dict[str, object] = {"execute": name, "arguments": arguments}
    if source.flag():
        message["id"] = source.pick(_VALUES)(source)
    if source.one_in(16):
        message[source.pick(("arguments", "execute", "exec-oob"))] = source.pick(_VALUES)(source)
    return json.dumps(message).encode() + source.pick((b"", b"\n", b" "))


def _nested(source: Source) -> bytes:
    """As deep as is allowed, and deeper."""
    depth = source.pick((MAX_DEPTH - 2, MAX_DEPTH, MAX_DEPTH + 1, 500))
    return b'{"id":' + b"[" * depth + b"]" * (depth - source.below(2)) + b"}"


def _long(source: Source) -> bytes:
    """As long as is allowed, and longer."""
    unit = source.pick((b"x", b"\\u00e9", b"\xc3\xa9", b"\\\\", b"["))
    size = source.pick((ANSWERS_LIMIT, MAX_VALUE - 20, MAX_VALUE + 1, 100))
    if source.one_in(4):
        return b"1" * size
    return b'{"id":"' + (unit * (size // len(unit))) + source.pick((b'"}', b"", b'\\"}'))


_VALUES: tuple[Callable[[Source], object], ...] = (
    lambda source: source.number(3),
    lambda source: source.number(8) - (1 << 63),
    lambda source: -source.number(1),
    lambda source: source.flag(),
    lambda _source: None,
    lambda source: source.number(2) / 7,
    lambda source: source.pick(("", "balloon0", "/machine/peripheral/balloon0", "guest-stats", "type")),
    lambda source: source.pick(("guest-stats-polling-interval", "\u00e9\U0001f600", "\ud800", "x" * 100)),
    lambda source: [source.number(1), source.flag()],
    lambda source: {"x": source.number(1)},
)
_TOKENS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b"\\u",
    b",",
    b":",
    b'"execute"',
    b'"arguments"',
    b'"id"',
    b"true",
    b"nul",
    b"-",
    b"1e999",
    b"18446744073709551616",
    b"NaN",
    b"\xff",
    b"\x00",
    b"\xc3",
    b" ",
    b"\r\n",
    b"'",
    b'{"id":1,"id":2}',
)
_TEXTS: tuple[Callable[[Source], bytes], ...] = (
    _command,
    _command,
    _command,
    lambda source: b"".join(source.pick(_TOKENS) for _ in range(source.below(20))),
    lambda source: source.take(source.below(40)),
    lambda source: b"\xff" if source.flag() else _NEGOTIATE,
    lambda source: _long(source) if source.one_in(64) else _nested(source),
)
_ACTIONS = (_say, _say, _say, _say, _pass_time, _offer, _give_channel, _forget_memory)
