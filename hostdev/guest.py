"""One front end's connection and the worker that serves it, as the keeper has them.

Relays whole messages and looks at nothing but the size in a message's header: what a message means is the worker's
business, in a process of its own. One message at a time: the next is read once the worker's answer to this one has been
forwarded, so a front end that does not read its answers is not read from either. Used by keeper.py.
"""

from __future__ import annotations

import functools
import logging
import select
import selectors
import socket
from dataclasses import dataclass, field

from hostdev import fds, worker
from hostdev.child import Child
from hostdev.wire.channel import ANSWER, MAX_DATAGRAM, Action
from hostdev.wire.vhost_user import HEADER, HEADER_SIZE, MAX_PAYLOAD

log = logging.getLogger(__name__)


@dataclass
class _Incoming:
    """A message that is being read: exactly its header, then exactly its payload."""

    data: bytearray = field(default_factory=bytearray)
    received: list[fds.Fd] = field(default_factory=list)

    def missing(self) -> int:
        """Bytes still to be read. Raises OverflowError for a size or a number of descriptors that no message has."""
        if len(self.received) > fds.MAX_RECEIVED:
            raise OverflowError(f"more than {fds.MAX_RECEIVED} descriptors with one message")
        if len(self.data) < HEADER_SIZE:
            return HEADER_SIZE - len(self.data)
        size = HEADER.decode(bytes(self.data[:HEADER_SIZE])).size
        if size > MAX_PAYLOAD:
            raise OverflowError(f"a message of {size} bytes, at most {MAX_PAYLOAD} are allowed")
        return HEADER_SIZE + size - len(self.data)


class Guest:
    """One front end's connection and the worker that serves it."""

    def __init__(
        self, connection: socket.socket, options: worker.Options, *, controlled: bool = False
    ) -> None:
        """controlled: make a pair between the worker and the control process as well."""
        self.connection = connection
        self._incoming = _Incoming()
        self._outgoing = b""
        self._waiting = False
        self._closing = False
        self.channel, theirs = _pair()
        # The control process's end, kept here as well: a successor of that process is to be given it again.
        self.control: fds.Fd | None = None
        workers: socket.socket | None = None
        if controlled:
            controls, workers = _pair()
            self.control = fds.Fd(controls.detach())
        self._worker = Child("worker", functools.partial(worker.start, theirs, options, workers))
        theirs.close()
        if workers is not None:
            workers.close()

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._worker.pid

    @property
    def interest(self) -> int:
        """What to wait for on the connection: nothing while the worker has a message, writing while a reply is due."""
        if self._outgoing:
            return selectors.EVENT_WRITE
        return 0 if self._waiting else selectors.EVENT_READ

    def receive(self) -> bool:
        """Read on; pass the message to the worker when it is whole. False when the connection is to be closed."""
        try:
            data, received = fds.receive(self.connection, self._incoming.missing())
            self._incoming.received += received
            self._incoming.data += data
            if not data:
                return self._ended()
            # Before the next read: a header with an impossible size may be all that ever comes.
            return self._incoming.missing() > 0 or self._pass_on()
        except BlockingIOError:
            return True
        except (OSError, OverflowError) as error:
            log.error("closing the connection: %s", error)  # noqa: TRY400  (the peer's fault: no traceback)
            return False

    def _ended(self) -> bool:
        if self._incoming.data:
            log.warning("the front end closed in the middle of a message")
        return False

    def _pass_on(self) -> bool:
        """Pass the whole message to the worker. False if the worker is gone."""
        message, self._incoming = self._incoming, _Incoming()
        try:
            fds.send(self.channel, bytes(message.data), message.received)
        except (BrokenPipeError, ConnectionResetError):
            return False  # close() says how it ended
        finally:
            fds.close_all(message.received)
        self._waiting = True
        return True

    def forward(self) -> bool:
        """Take the worker's answer and forward it. False when the connection is to be closed."""
        try:
            data, _none = fds.receive(self.channel, MAX_DATAGRAM)
        except ConnectionResetError:
            return False  # the worker died with a message unread
        if not data:
            return False
        answer = ANSWER.decode(data)
        self._waiting = False
        self._closing = answer.action == Action.CLOSE
        self._outgoing = answer.reply
        return self.flush()

    def flush(self) -> bool:
        """Write what is due. False when the connection is to be closed."""
        try:
            if self._outgoing:
                self._outgoing = self._outgoing[fds.send(self.connection, self._outgoing) :]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return not self._closing or bool(self._outgoing)

    def has_gone(self) -> bool:
        """True if the front end has closed, whatever of it is still unread."""
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> bool:
        """End the worker by closing its channel, reap it, close everything. False if the worker had crashed."""
        fds.close_all(self._incoming.received)
        self.channel.close()
        ended_well = self._worker.reap()
        self.connection.close()
        if self.control is not None:
            self.control.close()
        return ended_well


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
