"""One client of the control socket: its connection, its session, and what it is waited for. Used by control.py.

A client that has shut down its sending side (``echo ... | nc -N``) still gets its answers; one that has closed altogether
gets none, and whatever it asked for is called off.
"""

from __future__ import annotations

import select
import socket

from hostdev import fds
from hostdev.qmp_session import QmpSession

# Bytes taken from a client at once: many commands, and little to hold while one of them is outstanding.
READ_SIZE = 4 << 10
# Bytes that may wait for a client. One answer is at most 64 KiB (an envelope) and waits alone, so what piles up to this
# is events that a client does not read, more than a thousand of them.
MAX_OUTGOING = 256 << 10


class Client:
    """A connected client. Nothing here waits."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.session = QmpSession()
        self._ended = False

    def wanted(self) -> int:
        """What to wait for, as poll() has it. Nothing is read while anything is left to do about what was."""
        if self.session.outgoing:
            return select.POLLOUT
        if self._ended or self.session.outstanding or self.session.has_input:
            return 0
        return select.POLLIN

    def serve(self, mask: int) -> bool:
        """Act on poll()'s word. False if the client is gone, and nobody there to be answered."""
        if mask & (select.POLLHUP | select.POLLERR) and self.session.outstanding:
            return False
        return self.wanted() != select.POLLIN or self._receive()

    def _receive(self) -> bool:
        try:
            data = self.connection.recv(READ_SIZE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._ended = not data
        self.session.feed(data)
        return True

    def flush(self) -> bool:
        """Send what the connection takes. False if the client is gone."""
        outgoing = self.session.outgoing
        try:
            while outgoing:
                del outgoing[: fds.send(self.connection, bytes(outgoing))]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    @property
    def is_too_slow(self) -> bool:
        """True if the client reads so little of what it is told that it is to be given up."""
        return len(self.session.outgoing) > MAX_OUTGOING

    @property
    def is_done(self) -> bool:
        """True if the client sends nothing more and has all its answers."""
        return (
            self._ended
            and not self.session.has_input
            and not self.session.outstanding
            and not self.session.outgoing
        )
