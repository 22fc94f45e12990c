"""Accepting connections: from whom, and what is done when the host has no room for one. Used by keeper and control.

Whoever may write to a socket file decides over the device's memory or the guest's: the file's mode keeps others out, and
who has come all the same is asked for its user here. A connection that was inherited is trusted: it was given to us.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import time
from dataclasses import dataclass

from hostdev.metrics import worth_logging

log = logging.getLogger(__name__)

# Seconds for which a listener is left alone after accept() failed (no descriptor or no memory left): it stays readable,
# and a loop that watches it would spin. A front end or a client waits in the backlog meanwhile.
PAUSE = 1.0

# struct ucred: pid, uid, gid (unix(7), SO_PEERCRED).
_UCRED = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who is at the other end of a unix socket, as it was when it connected, or began to listen."""

    pid: int
    uid: int


def peer_of(connection: socket.socket) -> Credentials:
    """Ask the kernel who is at the other end."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _gid = _UCRED.unpack(data)
    return Credentials(pid, uid)


def is_trusted(uid: int) -> bool:
    """True for our own user and for root, who could do what it likes with us anyway."""
    return uid in (os.geteuid(), 0)


class Acceptor:
    """One listening socket of ours."""

    def __init__(self, listener: socket.socket, peer: str) -> None:
        """peer: what connects there, for the log.

        The listener is made non-blocking, for all who share it: another of them may be faster than we are, and accept()
        would then wait, with a VM behind it.
        """
        listener.setblocking(False)
        self.listener = listener
        self._peer = peer
        self._resume: float | None = None
        self._strangers = 0
        self._failures = 0

    def accept(self) -> socket.socket | None:
        """Accept one connection. None if there is none, it was turned away, or the host refuses for now."""
        try:
            connection, _address = self.listener.accept()
        except BlockingIOError:
            return None
        except OSError as error:
            self._fail(error)
            return None
        if is_trusted(uid := peer_of(connection).uid):
            return connection
        connection.close()
        self._strangers += 1
        if worth_logging(self._strangers):
            log.warning("a %s of user %d is turned away: %d so far", self._peer, uid, self._strangers)
        return None

    def _fail(self, error: OSError) -> None:
        self._resume = time.monotonic() + PAUSE
        self._failures += 1
        if worth_logging(self._failures):
            log.warning("no %s can be accepted: %s: trying again in %g s", self._peer, error.strerror, PAUSE)

    def pause(self) -> float | None:
        """Seconds for which the listener is not to be watched, None if it is."""
        if self._resume is not None and time.monotonic() >= self._resume:
            self._resume = None
        return None if self._resume is None else max(0.0, self._resume - time.monotonic())
