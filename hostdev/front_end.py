"""A front end's connection: one message at a time comes in whole, and its answer goes out before the next is read.

So a front end that does not read its answers is not read from either. Looks at nothing but the size in a message's header.
Used by guest.py, which has a worker answer the messages.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import selectors
import socket
from collections.abc import Callable

from hostdev import fds
from hostdev.incoming import Incoming

log = logging.getLogger(__name__)

# What a host says that has no memory for it now: nothing was read, or written (Linux, sock_alloc_send_pskb). Tried again at
# the next look, which is at once, for nothing would say that there is memory: to close the connection would end the VM.
_NO_MEMORY = (errno.ENOMEM, errno.ENOBUFS)


class FrontEnd:
    """The connection. is_waiting: true while a message has no answer. outgoing: what is left of the last answer."""

    def __init__(
        self,
        connection: socket.socket,
        selector: selectors.BaseSelector,
        take: Callable[[fds.Received], None],
        end: Callable[[], None],
    ) -> None:
        """take: is given each whole message. end: called when the front end has gone, or is to be given up."""
        self.connection = connection
        self._selector = selector
        self._take = take
        self._end = end
        self._incoming = Incoming()
        self.outgoing = b""
        # True if the connection ends with this answer.
        self.closing = False
        self.is_waiting = False
        self.is_open = True

    def watch(self) -> None:
        """Wait for what is next: for writing while an answer is due, for nothing while there is none yet."""
        wanted = selectors.EVENT_WRITE if self.outgoing else 0 if self.is_waiting else selectors.EVENT_READ
        registered = self._selector.get_map().get(self.connection.fileno())
        if registered is None:
            if wanted:
                self._selector.register(self.connection, wanted, self._serve)
        elif not wanted:
            self._selector.unregister(self.connection)
        elif wanted != registered.events:
            self._selector.modify(self.connection, wanted, self._serve)

    def unwatch(self) -> None:
        """Let it be, whatever comes."""
        with contextlib.suppress(KeyError, ValueError):  # not watched, or closed
            self._selector.unregister(self.connection)

    def _serve(self) -> None:
        if not self.is_open:
            return  # ended by an event of the same select()
        if self.outgoing:
            self._flush()
        else:
            self._receive()

    def _receive(self) -> None:
        """Read on; pass the message on when it is whole."""
        try:
            if not self._incoming.read(self.connection):
                self._end()
            elif self._incoming.is_whole:
                self.is_waiting = True
                self._take(self._incoming.take())
                self.watch()
        except (OSError, OverflowError) as error:
            if _is_passing(error):
                return
            log.error("closing the connection: %s", error)  # noqa: TRY400  (the peer's fault: no traceback)
            self._end()

    def answer(self, reply: bytes, *, closing: bool) -> None:
        """Answer the message. closing: and end the connection."""
        self.is_waiting = False
        self.outgoing, self.closing = reply, closing
        self._flush()

    def _flush(self) -> None:
        """Write what is due; end the connection if that was the last."""
        try:
            while self.outgoing:
                self.outgoing = self.outgoing[fds.send(self.connection, self.outgoing) :]
        except OSError as error:
            if not _is_passing(error):
                self._end()
                return
        if self.closing and not self.outgoing:
            self._end()
        elif self.is_open:
            self.watch()

    @property
    def begun(self) -> fds.Received:
        """What was read of a message that is not whole yet."""
        return self._incoming.begun

    def resume(self, begun: fds.Received, outgoing: bytes, *, closing: bool) -> None:
        """Go on where another process was: in the middle of a message, or of an answer."""
        self._incoming = Incoming(begun)
        self.outgoing, self.closing = outgoing, closing

    def has_gone(self) -> bool:
        """True if the front end has closed, whatever of it is still unread."""
        if not self.is_open:
            return True
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close it."""
        self.is_open = False
        self.unwatch()
        self._incoming.close()
        self.connection.close()


def _is_passing(error: Exception) -> bool:
    """True if the same may go well at the next look."""
    return isinstance(error, BlockingIOError) or (isinstance(error, OSError) and error.errno in _NO_MEMORY)
