"""One message of the front end as it comes in: exactly its header, then exactly its payload.

Nothing of it is looked at but the size. Used by front_end.py.
"""

from __future__ import annotations

import logging
import socket

from hostdev import fds
from hostdev.wire.vhost_user import HEADER, HEADER_SIZE, MAX_PAYLOAD

log = logging.getLogger(__name__)

_NOTHING = fds.Received(b"", [])


class Incoming:
    """What was read of the message at hand."""

    def __init__(self, begun: fds.Received = _NOTHING) -> None:
        """begun: what another has read of it."""
        self._data = bytearray(begun.data)
        self._received = list(begun.fds)
        self._is_curtailed = begun.curtailed
        # Of the whole message, once its header is there.
        self._size: int | None = None

    @property
    def begun(self) -> fds.Received:
        """What was read of a message that is not whole yet."""
        return fds.Received(bytes(self._data), self._received, self._is_curtailed)

    def read(self, connection: socket.socket) -> bool:
        """Read on. False if the other side has closed.

        Raises OverflowError for a size or a number of descriptors that no message has, BlockingIOError if there is nothing
        to read yet, OSError.
        """
        data, received, curtailed = fds.receive(connection, self._missing())
        self._received += received
        self._data += data
        if curtailed:
            self._curtail()
        # At once: a header with an impossible size may be all that ever comes.
        self._missing()
        return bool(data)

    def _curtail(self) -> None:
        """Some descriptors were lost: keep none, for the message is refused, and read it to its end."""
        self._is_curtailed = True
        fds.close_all(self._received)
        self._received = []

    @property
    def is_whole(self) -> bool:
        """True once it can be taken."""
        return bool(self._data) and self._missing() == 0

    def take(self) -> fds.Received:
        """Return the whole message, and its descriptors, which are the caller's from now on; the next one begins."""
        received = self.begun
        self._data, self._received = bytearray(), []
        self._size, self._is_curtailed = None, False
        return received

    def _missing(self) -> int:
        if len(self._received) > fds.MAX_RECEIVED:
            raise OverflowError(f"more than {fds.MAX_RECEIVED} descriptors with one message")
        if len(self._data) < HEADER_SIZE:
            return HEADER_SIZE - len(self._data)
        if self._size is None:
            payload = HEADER.decode(bytes(self._data[:HEADER_SIZE])).size
            if payload > MAX_PAYLOAD:
                raise OverflowError(f"a message of {payload} bytes, at most {MAX_PAYLOAD} are allowed")
            self._size = HEADER_SIZE + payload
        return self._size - len(self._data)

    def close(self) -> None:
        """The connection has gone: close what had arrived."""
        if self._data:
            log.warning("the front end closed in the middle of a message")
        fds.close_all(self._received)
