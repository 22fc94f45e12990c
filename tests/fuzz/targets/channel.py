"""What the device's processes say to each other, with one side that says whatever it likes.

An input first chooses an end: a worker's of the keeper's channel (messages with descriptors, some given twice), the keeper's (a
worker that was taken over), the two of the pair to the control process, what one version hands over to the next, or the
layouts alone. Then it is a list of datagrams, right ones with wrong fields, and raw bytes.

- What cannot be read is refused by its own error (LayoutError), ignored, or ends its sender; nothing else is raised.
- Each message is answered by one datagram and takes effect once; the tokens that are held are those of open descriptors.
- What can be decoded encodes to the same bytes. No descriptor is left open.
"""

from __future__ import annotations

import array
import contextlib
import socket

from hostdev.errors import BalloonError
from hostdev.parcels import Contents, Line, unpack_guest, unpack_name
from hostdev.wire import handover
from hostdev.wire.channel import ANSWER, FRAME, MAX_DATAGRAM, Answer, ToKeeper
from hostdev.wire.control import ENVELOPE, Envelope, Kind
from hostdev.wire.handover import Tag, Use
from hostdev.wire.layout import Layout, LayoutError, Value
from tests.fuzz.channel_ends import ClientEnd, CommandEnd, KeeperEnd, WorkerEnd
from tests.fuzz.descriptors import open_descriptors, wares
from tests.fuzz.message_texts import message
from tests.fuzz.source import Source

MAX_ACTIONS = 24
_TEXTS = (
    b"{}",
    b"",
    b"[]",
    b'{"execute":"query-status"}',
    b'{"execute":"qom-get","arguments":{"path":"balloon0","property":"type"}}',
    b'{"execute":"balloon","arguments":{"value":1}}',
    b'{"execute":"query-memory"}',
    b'{"execute":"balloon"}',
    b'{"class":"GenericError","desc":"x"}',
    b'{"event":"BALLOON_CHANGE","data":{"actual":1}}',
    b'{"event":"SHUTDOWN","data":{}}',
    b'{"event":["x"],"data":"x"}',
    b"[" * 100,
    b"\xff",
)


def check(data: bytes) -> None:
    """Act out one input."""
    source = Source(data)
    wares().reset()
    before = open_descriptors()
    source.pick(_ENDS)(source)
    assert open_descriptors() <= before, "descriptors are left open"


def _layouts(source: Source) -> None:
    data = source.take(4096)
    _go_round(FRAME, data)
    _go_round(ANSWER, data)
    _go_round(ENVELOPE, data)
    with contextlib.suppress(LayoutError):
        datagram = handover.decode(data)
        head = datagram.kind.to_bytes(2, "little")
        assert head + handover.encode(handover.Kind.END, datagram.sections)[2:] == data


def _go_round(layout: Layout[Value], data: bytes) -> None:
    with contextlib.suppress(LayoutError):
        assert layout.encode(layout.decode(data)) == data


def _worker(source: Source) -> None:
    end = WorkerEnd(started=source.below(4) > 0)
    try:
        for _ in range(MAX_ACTIONS):
            if not source:
                break
            if source.one_in(6):
                end.repeat()
            elif source.one_in(6):
                end.device.run()
            else:
                end.give(message(source, wares()), 3 if source.one_in(16) else source.below(3))
    finally:
        end.close()


def _keeper(source: Source) -> None:
    end = KeeperEnd()
    try:
        for _ in range(MAX_ACTIONS):
            if not source:
                break
            if source.flag():
                end.ask(message(source, wares()))
            else:
                end.say(_answer(source, end))
    finally:
        end.close()


def _answer(source: Source, end: KeeperEnd) -> bytes:
    if source.one_in(8):
        return source.take(1 + source.below(64)) or b"\0"
    known = [*end.guest.estate.known, 0, 1 << 63]
    held = tuple(source.pick(known) for _ in range(source.below(6)))
    kind = (
        source.pick((*ToKeeper, ToKeeper.ANSWER, ToKeeper.HOLDING)) if source.below(8) else source.number(1)
    )
    data = ANSWER.encode(Answer(kind, source.take(source.below(40)), held))
    return data.ljust(MAX_DATAGRAM + 1, b"x") if source.one_in(16) else data


def _commands(source: Source) -> None:
    end = CommandEnd()
    try:
        for _ in range(MAX_ACTIONS):
            if not source:
                break
            end.say(_envelope(source, 0))
    finally:
        end.close()


def _client(source: Source) -> None:
    end = ClientEnd()
    try:
        for _ in range(MAX_ACTIONS):
            if not source:
                break
            kind = source.below(3)
            if kind == 0:
                end.ask()
            elif kind == 1:
                end.answer()
            else:
                end.say(_envelope(source, end.number))
    finally:
        end.close()


def _envelope(source: Source, number: int) -> bytes:
    if source.one_in(8):
        return source.take(1 + source.below(64)) or b"\0"
    text = source.pick(_TEXTS) if source.below(4) else source.take(source.below(80))
    kind = source.pick(tuple(Kind)) if source.below(8) else source.number(1)
    return ENVELOPE.encode(Envelope(kind, number if source.below(4) else source.number(2), text))


def _handed_over(source: Source) -> None:
    """A datagram of the old version, with descriptors that are right or not."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        uses = [source.pick((*Use, 99)) for _ in range(source.below(8))]
        ware = wares()
        given = [source.pick((ware.channel, ware.ram, ware.event, *ware.odd)) for _ in uses]
        data = _datagram(source, uses)
        numbers = array.array("i", [fd.fileno() for fd in given[source.below(2) :]])
        ours.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else [])
        with contextlib.suppress(BalloonError, OSError, EOFError):
            datagram, received = Line(theirs).receive(0)
            contents = Contents(datagram, received)
            unpack_name(datagram)
            unpack_guest(datagram, contents).close()


def _datagram(source: Source, uses: list[int]) -> bytes:
    sections = [(Tag.DESCRIPTOR, handover.DESCRIPTOR_STRUCT.pack(use, source.number(1))) for use in uses]
    for _ in range(source.below(8)):
        tag = source.pick((*Tag, 99))
        if tag != Tag.DESCRIPTOR:
            sections.append((tag, source.take(source.below(40))))
    data = handover.encode(source.pick(tuple(handover.Kind)), sections)
    return data[: len(data) - source.below(4)] if source.one_in(4) else data


_ENDS = (_worker, _keeper, _commands, _client, _handed_over, _layouts)
