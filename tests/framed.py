"""A session behind the keeper's own framing, in one process: bytes go in at one end of a socket, replies come out.

FrontEnd and Incoming are the real ones, and so is the socket; what a worker would do with a message is done at once. Not a
test; used by the tests of the invariants.
"""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Sequence

from hostdev import fds
from hostdev.driver import GuestMemory
from hostdev.errors import StreamError
from hostdev.front_end import FrontEnd
from hostdev.snapshot import Done, Parts, gather
from hostdev.wire import vhost_user as wire
from hostdev.wire.channel import token
from tests.in_process import MIB, InProcess


class Framed:
    """A connection, and the device behind it. is_open: false once the device's side has closed it. messages: taken so far."""

    def __init__(self, *, started: bool) -> None:
        self.guest = InProcess(GuestMemory(4 * MIB))
        if started:
            self.guest.start()
        else:
            self.guest.negotiate()
        self.messages = 0
        self._taken: list[fds.Received] = []
        self.is_open = True
        self._selector = selectors.DefaultSelector()
        self._ours, theirs = socket.socketpair()
        self._ours.setblocking(False)
        self.front = FrontEnd(theirs, self._selector, self._take, self._end)
        self.front.watch()
        reading, writing = os.pipe()
        self._kinds = {
            "ram": self.guest.memory.fd,
            "event": fds.Fd(os.eventfd(0)),
            "pipe": fds.Fd(reading),
            "other end": fds.Fd(writing),
        }
        self.replies = b""

    def _take(self, message: fds.Received) -> None:
        self._taken.append(message)

    def _answer(self, data: bytes, arrived: list[fds.Fd], curtailed: bool) -> None:
        """As a worker would, some time after the message was passed on."""
        self.messages += 1
        for place, fd in enumerate(arrived):
            fd.token = token(self.messages, place)
        header = wire.HEADER.decode(data[: wire.HEADER_SIZE])
        try:
            reply = self.guest.session.handle(header, data[wire.HEADER_SIZE :], arrived, curtailed=curtailed)
        except StreamError:
            self.front.answer(b"", closing=True)
        else:
            self.front.answer(reply, closing=False)

    def _end(self) -> None:
        self.is_open = False
        self.front.close()

    def send(self, data: bytes, kinds: Sequence[str] = (), *, reads: bool = True) -> None:
        """Send a piece, the descriptors with its first byte, and let the device do what it can. reads: its replies, at once."""
        if self.is_open:
            fds.send(self._ours, data, [self._kinds[kind] for kind in kinds])
        self.settle(reads=reads)

    def settle(self, *, reads: bool = True) -> None:
        """Let the device do what it can."""
        while True:
            if reads:
                self._read()
            events = self._selector.select(0)
            if not events:
                return
            for key, _mask in events:
                key.data()
            while self._taken:
                self._answer(*self._taken.pop())

    def _read(self) -> None:
        while True:
            try:
                data = self._ours.recv(1 << 16)
            except ConnectionResetError:
                continue  # the device closed with something of ours unread; its replies come after this
            except BlockingIOError:
                return
            if not data:
                return
            self.replies += data

    def hang_up(self) -> None:
        """The front end closes."""
        self._ours.shutdown(socket.SHUT_WR)
        self.settle()

    def state(self) -> bytes:
        """All that the device knows, as its record would have it."""
        guest = self.guest
        return gather(Parts(guest.session, guest.balloon, guest.commands, guest.metrics), Done())

    def owned(self) -> int:
        """Descriptors that the device has: two for each region, three at most for each ring, two for the back channel, and of the
        connection its own and those of a message that is not whole yet.
        """
        session = self.guest.session
        rings = sum(fd is not None for ring in session.rings for fd in (ring.kick, ring.call, ring.error))
        connection = 1 + len(self.front.begun[1]) if self.is_open else 0
        return (
            2 * len(session.memory.regions) + rings + 2 * (session.backend_channel is not None) + connection
        )

    def close(self) -> None:
        """Close everything."""
        if self.is_open:
            self._end()
        self._selector.close()
        self._ours.close()
        self.guest.close()
        fds.close_all(self._kinds.values())
