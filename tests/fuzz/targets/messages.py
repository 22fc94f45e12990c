"""A front end's stream: messages of any content with any descriptors, in pieces cut anywhere, on a real device.

An input is a list of what the front end sends (messages as they should be with fields changed, or raw bytes), what is in guest
memory, and when the rings are served. The stream goes through FrontEnd and Session as in the device.

- I1: each message has no effect but a reply, none, or the end of the connection: nothing else is raised.
- What always has a reply, or asks for one, has exactly one, well-formed; nothing else is answered.
- I6: the messages that come out are those that went in, wherever the stream was cut.
- No descriptor is left open that the session does not own; none at all after its end.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
from collections.abc import Sequence

from hostdev import fds
from hostdev.balloon import Balloon
from hostdev.discard import Discarder
from hostdev.errors import RingError, StreamError
from hostdev.fds import Fd
from hostdev.front_end import FrontEnd
from hostdev.metrics import Metrics
from hostdev.session import Session
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import DEFAULT_FEATURES, QUEUE_COUNT
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, ProtocolFeature, Request
from hostdev.wire.virtqueue import available_ring_bytes, used_ring_bytes
from tests.fuzz.descriptors import RAM_BYTES, Wares, open_descriptors, wares
from tests.fuzz.message_texts import REPLIES, Sent, message
from tests.fuzz.source import Source

MAX_ACTIONS = 40
# Steps until a ring must be idle: at most its size, 32768, in heads; here memory has room for rings of 1024.
MAX_STEPS = 5000
_CUTS = (1, 11, 12, 13, 20)


def check(data: bytes) -> None:
    """Act out one input."""
    source = Source(data)
    ware = wares()
    ware.reset()
    before = open_descriptors()
    conversation = Conversation(ware, source.below(4) > 0)
    try:
        for _ in range(MAX_ACTIONS):
            if not source or not conversation.is_open:
                break
            source.pick(_ACTIONS)(conversation, source)
    finally:
        conversation.close()
    assert open_descriptors() <= before, "descriptors are left open"


class Conversation:
    """A front end and a device, with what the one may expect of the other."""

    def __init__(self, ware: Wares, negotiated: bool) -> None:
        """negotiated: begin as QEMU does, so that fewer messages are refused for want of a protocol feature."""
        self.wares = ware
        self._metrics = Metrics()
        self.balloon = Balloon(DEFAULT_FEATURES, Discarder(), self._metrics)
        self.session = Session(self.balloon, self._metrics)
        self._ours, theirs = socket.socketpair()
        self._selector = selectors.PollSelector()
        self._front = FrontEnd(theirs, self._selector, self._take, self._end)
        self._front.watch()
        self.is_open = True
        self._message: fds.Received | None = None
        self._sent = b""
        self._taken = b""
        self._descriptors = open_descriptors()
        if negotiated:
            features = ProtocolFeature(0)
            for each in ProtocolFeature:
                features |= each
            self.send(Sent(Request.SET_PROTOCOL_FEATURES, 0, int(features).to_bytes(8, "little")), 0)

    # The front end

    def send(self, sent: Sent, cut: int) -> None:
        """Send a message, its descriptors with the first piece, and let the device work on each. cut: 0 for in one piece."""
        stream = sent.stream
        self._send_piece(stream[:cut] if cut else stream, sent.fds)
        for start in range(cut, len(stream) if cut else 0, cut or 1):
            self._send_piece(stream[start : start + cut], ())

    def _send_piece(self, piece: bytes, descriptors: Sequence[Fd]) -> None:
        if not self.is_open:
            return
        self._sent += piece
        fds.send(self._ours, piece, descriptors)
        self._work()

    def _work(self) -> None:
        """Let the device read and answer until it has nothing more to do."""
        while self.is_open and (ready := self._selector.select(0)):
            for key, _mask in ready:
                key.data()
            if self._message is not None:
                message, self._message = self._message, None
                self._handle(*message)

    # The device

    def _take(self, message: fds.Received) -> None:
        """Keep a message until the worker has its turn: its answer never comes while it is being passed on."""
        self._message = message

    def _handle(self, data: bytes, received: list[Fd], curtailed: bool) -> None:
        header = wire.HEADER.decode(data[: wire.HEADER_SIZE])
        assert data == self._sent[len(self._taken) : len(self._taken) + len(data)]
        assert len(data) == wire.HEADER_SIZE + header.size
        self._taken += data
        asks = bool(header.flags & FLAG_NEED_REPLY) and self._acknowledges
        try:
            reply = self.session.handle(header, data[wire.HEADER_SIZE :], received, curtailed=curtailed)
        except StreamError:
            assert header.flags & ~FLAG_NEED_REPLY != wire.VERSION
            self._front.answer(b"", closing=True)
            return
        self._judge(header, reply, asks=asks)
        self._front.answer(reply, closing=False)
        if self.is_open:
            assert self._receive() == reply
        self._count()

    @property
    def _acknowledges(self) -> bool:
        return ProtocolFeature.REPLY_ACK in self.session.protocol_features

    def _judge(self, header: wire.Header, reply: bytes, *, asks: bool) -> None:
        due = header.request in REPLIES or asks
        if header.request == Request.SET_PROTOCOL_FEATURES:
            due = bool(reply)  # it may turn acknowledgements on or off
        assert bool(reply) == due, "a reply too many, or none where one is due"
        if reply:
            answer = wire.HEADER.decode(reply[: wire.HEADER_SIZE])
            assert (answer.request, answer.flags) == (header.request, wire.VERSION | wire.FLAG_REPLY)
            assert answer.size == len(reply) - wire.HEADER_SIZE

    def _receive(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            return self._ours.recv(1 << 16, socket.MSG_DONTWAIT)
        return b""

    def _count(self) -> None:
        """The session owns two descriptors for each region, three at most for each ring, and two of the back channel."""
        session = self.session
        events = sum(fd is not None for ring in session.rings for fd in (ring.kick, ring.call, ring.error))
        owned = 2 * len(session.memory.regions) + events + 2 * (session.backend_channel is not None)
        assert open_descriptors() - owned == self._descriptors

    def _end(self) -> None:
        self.is_open = False
        self._front.close()

    def serve(self, index: int) -> None:
        """Serve a ring as the worker does."""
        with contextlib.suppress(RingError):
            for _ in range(MAX_STEPS):
                if not self.balloon.service(index).more:
                    return
            # In such a ring what the device returns is what it is offered next: endless, and a step at a time as any other.
            assert self._feeds_itself(index), "a ring does not become idle"

    def _feeds_itself(self, index: int) -> bool:
        """True if the used ring lies where the available ring does."""
        ring = self.session.rings[index]
        assert ring.addresses is not None
        available, used = ring.addresses.available, ring.addresses.used
        return available < used + used_ring_bytes(ring.size) and used < available + available_ring_bytes(
            ring.size
        )

    def close(self) -> None:
        """End it, from the front end's side if it is still open."""
        self._ours.close()
        self._work()
        if self.is_open:
            self._end()
        self.session.close()
        self._selector.close()
        assert not self.balloon.inert, "the device thinks that the fault is its own"
        for index in range(QUEUE_COUNT):
            assert not self.balloon.service(index).more


def _send(conversation: Conversation, source: Source) -> None:
    cut = source.pick(_CUTS) if source.one_in(8) else 0
    conversation.send(message(source, conversation.wares), cut)


def _write(conversation: Conversation, source: Source) -> None:
    at = source.pick((0, 0x1000, 0x2000, 0x3000)) + source.number(1)
    os.pwrite(conversation.wares.ram.fileno(), source.take(1 + source.below(64)), at % RAM_BYTES)


def _serve(conversation: Conversation, source: Source) -> None:
    conversation.serve(source.below(QUEUE_COUNT))


def _step(conversation: Conversation, source: Source) -> None:
    with contextlib.suppress(RingError):
        conversation.balloon.service(source.below(QUEUE_COUNT))


_ACTIONS = (_send, _send, _send, _send, _send, _write, _serve, _step)
