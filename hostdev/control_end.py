"""The worker's end of the pair to the control process: envelopes in, envelopes out, never waiting.

What they ask for is commands.py's business. Used by worker.py.
"""

from __future__ import annotations

import logging
import select
import socket

from hostdev.commands import Commands
from hostdev.wire.control import ENVELOPE, MAX_ENVELOPE, Envelope
from hostdev.wire.layout import LayoutError

log = logging.getLogger(__name__)


class ControlEnd:
    """A connection to the control process, and to nobody once that has gone for good."""

    def __init__(self, sock: socket.socket | None, commands: Commands, poll: select.poll) -> None:
        """poll: what the worker waits with; this keeps it up to date about the socket."""
        self._socket = sock
        self._commands = commands
        self._poll = poll
        self._waits_for_room = False
        if sock is not None:
            poll.register(sock, select.POLLIN)

    @property
    def number(self) -> int | None:
        """The socket's descriptor, None once there is nobody."""
        return None if self._socket is None else self._socket.fileno()

    def receive(self, mask: int) -> Envelope | None:
        """Return the command that poll() saw, None if there is none. A keeper that has closed the other end is final."""
        if self._socket is None:
            return None
        if mask & select.POLLOUT:
            # flush() asks again, if there is still something to send and it is time to.
            self._wait_for_room(wait=False)
        if not mask & ~select.POLLOUT:
            return None
        try:
            data = self._socket.recv(MAX_ENVELOPE, socket.MSG_DONTWAIT)
            if data:
                return ENVELOPE.decode(data)
        except BlockingIOError:
            return None
        except LayoutError as error:
            log.error("what the control process says cannot be read: %s", error)  # noqa: TRY400
            return None
        except ConnectionResetError:
            pass
        self._leave()
        return None

    def flush(self) -> None:
        """Send what is due, as far as it is taken; what is left goes when more is."""
        outgoing = self._commands.outgoing
        if self._socket is None:
            outgoing.clear()
            return
        try:
            while outgoing:
                self._socket.send(ENVELOPE.encode(outgoing[0]), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                outgoing.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._leave()
            return
        self._wait_for_room(wait=bool(outgoing))

    def _wait_for_room(self, *, wait: bool) -> None:
        if self._socket is not None and wait is not self._waits_for_room:
            self._poll.modify(self._socket, select.POLLIN | (select.POLLOUT if wait else 0))
            self._waits_for_room = wait

    def _leave(self) -> None:
        assert self._socket is not None
        self._poll.unregister(self._socket)
        self._socket.close()
        self._socket = None
        self._commands.forget_all()
