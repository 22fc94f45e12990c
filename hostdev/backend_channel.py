"""The channel on which a back end may speak first: SET_BACKEND_REQ_FD gave it, and a balloon says one thing on it.

It asks for no reply, so nothing is ever read from it. session.py owns it, config_teller.py decides when.

The message goes in two parts, for QEMU's sake. Its generic vhost-user device forgets its VirtIODevice while it is stopped,
and a CONFIG_CHANGE_MSG that it takes then is a SIGSEGV (hw/virtio/vhost-user-base.c, vub_config_notifier after
vhost_dev_stop; seen with 11.1.3). That a stop begins is known only when its first message arrives, and by then ours may be
on its way. But QEMU's main loop takes the first byte under the big lock, and keeps that until it has the rest; and a stop
needs the big lock as well, and answers of ours. So once the first byte has been taken and no stop has come, none can come
before the rest is there: it is sent then. If a stop did come, the rest makes another message of it, one that means nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import select
import socket
import struct

from hostdev import fds
from hostdev.errors import RequestError
from hostdev.journal import Journal
from hostdev.wire.vhost_user import BackendRequest, message

log = logging.getLogger(__name__)

# linux/sockios.h: how much of what was sent the other side has not read; for unix sockets in bytes of kernel memory.
_SIOCOUTQ = 0x5411
_INT = struct.Struct("i")

_CHANGE = message(BackendRequest.CONFIG_CHANGE_MSG, 0, b"")
_HEAD, _REST = _CHANGE[:1], _CHANGE[1:]
# With the same first byte, a request that nobody knows: QEMU says so on its standard error and goes on.
_NOTHING = message(0x7FFF_FF00 | _CHANGE[0], 0, b"")
_REST_OF_NOTHING = _NOTHING[1:]
# Where a first part may have gone before it or not: 12 bytes that are a message alone, and after one more byte a message
# with a payload of one byte. Both have a request that nobody knows, and flags that ask for no reply.
#   alone:           7f ff ff 01 | 01 00 00 01 | 00 00 00 00          request, flags, size 0
#   after a byte: 02 7f ff ff | 01 01 00 00 | 01 00 00 00 | 00       request, flags, size 1, payload
_IN_STEP = bytes.fromhex("7fffff01 01000001 00000000")


class BackendChannel:
    """Our end of it. token: by which the keeper knows its descriptor."""

    def __init__(self, sock: socket.socket, token: int = 0, journal: Journal | None = None) -> None:
        self._socket = sock
        self.token = token
        self._journal = journal or Journal()
        # The front end takes nothing any more: its guest finds a change when it looks.
        self.is_broken = False
        self.is_half_sent = False
        # Readable when the front end has read something: poll() itself knows of no such event.
        self._taking = select.epoll()
        self._taking.register(sock, select.EPOLLOUT | select.EPOLLET)

    @classmethod
    def of(cls, fd: fds.Fd, journal: Journal) -> BackendChannel:
        """Make one of what the front end has sent, which it then owns. Raises RequestError."""
        token = fd.token
        sock = fds.stream_socket(fd)
        if sock is None:
            raise RequestError("the back end's channel is not a unix stream socket")
        try:
            return cls(sock, token, journal)
        except OSError as error:
            sock.close()
            raise RequestError(f"the back end's channel cannot be watched: {error.strerror}") from error

    def fileno(self) -> int:
        """The descriptor to wait on, with POLLIN, for was_taken() to change."""
        return self._taking.fileno()

    def begin(self) -> bool:
        """Send the first part. False if that cannot be: the front end has not read what came before, or is gone."""
        if self.is_broken or not self.was_taken():
            return False
        self._journal.telling(begins=True)
        self.is_half_sent = self._send(_HEAD)
        if not self.is_half_sent:
            self._journal.telling(begins=False)
        return self.is_half_sent

    def was_taken(self) -> bool:
        """True once the front end has read all that was sent. Else fileno() is readable when it has read something."""
        # First this, then the look: what is read in between makes it readable again.
        self._taking.poll(0)
        return not self.has_unread

    @property
    def has_unread(self) -> bool:
        """True while there is something that the front end has not read."""
        if self.is_broken:
            return False
        (unread,) = _INT.unpack(fcntl.ioctl(self._socket, _SIOCOUTQ, _INT.pack(0)))
        # Linux (net/core/sock.c, sock_wfree) lets go of all but one of a buffer's some hundred bytes, wakes who waits for
        # that, and only then lets go of the last: one left means that it has been read, and nobody will be woken again.
        return int(unread) > 1

    def finish(self, *, has_stopped: bool) -> None:
        """Send the second part. There is room for it, as nothing but the first can be unread."""
        self.is_half_sent = False
        if not self._send(_REST_OF_NOTHING if has_stopped else _REST) and not self.is_broken:
            self._break("the second part of a message cannot be sent")
        self._journal.telling(begins=False)

    def recover(self) -> None:
        """Bring a stream back into step that another process may have left in the middle of a message.

        It may have sent the first part, or not, and the second, or not: what is sent here is whole messages either way. That
        this is done the caller writes down, once it is written as well that there is something to tell again.
        """
        if not self._send(_IN_STEP) and not self.is_broken:
            self._break("a message cannot be sent to its end")

    def _send(self, data: bytes) -> bool:
        try:
            return fds.send(self._socket, data) == len(data)
        except BlockingIOError:
            return False
        except OSError as error:
            self._break(error.strerror or "error")
            return False

    def _break(self, why: str) -> None:
        """Use it no more. Who waits for the rest of a message, under QEMU's big lock, finds its end instead."""
        log.warning("the front end takes no messages any more: %s", why)
        self.is_broken = True
        with contextlib.suppress(OSError):  # the front end has closed
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it."""
        self._taking.close()
        self._socket.close()
