"""Where one front end at a time may connect: a name, a listening socket, and the guest that is served there.

Used by keeper.py.
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path

from hostdev.acceptor import Acceptor
from hostdev.guest import Guest
from hostdev.listening import ListeningPath

log = logging.getLogger(__name__)

# What a place with an inherited socket is called.
INHERITED = "fd"


class Place:
    """One place. path: of its socket, empty for an inherited one. guest: who is served, or is being seen off."""

    def __init__(self, name: str, listener: socket.socket | None = None, path: str = "") -> None:
        """listener: None where nobody else can connect."""
        self.name = name
        self.path = path
        self.guest: Guest | None = None
        # True once it is to go with its last guest.
        self.is_leaving = False
        self._listening: ListeningPath | None = None
        self._acceptor: Acceptor | None = None
        if listener is not None:
            self._acceptor = Acceptor(listener, "front end")

    @classmethod
    def at(cls, path: str, option: str = "--socket-path") -> Place:
        """Make a place with a socket of its own. option: for the error. Raises SetupError."""
        listening = ListeningPath(path, option)
        place = cls(name_of(path), listening.__enter__(), path)
        place._listening = listening
        return place

    @classmethod
    def adopted(
        cls, name: str, path: str, listener: socket.socket | None, identity: tuple[int, int] | None
    ) -> Place:
        """Return one that another process made. identity: of its socket's file, if that is to be removed."""
        place = cls(name, listener, path)
        if identity is not None:
            place._listening = ListeningPath.adopted(path, "--socket-path", listener, identity)
        return place

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the socket's file, if it is ours to remove."""
        return None if self._listening is None else self._listening.identity

    def disown(self) -> None:
        """Leave the socket's file to another process: close() does not remove it."""
        if self._listening is not None:
            self._listening.disown()

    @property
    def acceptor(self) -> Acceptor | None:
        """Where front ends are accepted, None where none can come any more."""
        return self._acceptor

    @property
    def is_connected(self) -> bool:
        """True while there is a front end."""
        return self.guest is not None and self.guest.is_served

    def close(self) -> None:
        """Accept nobody any more, and remove the socket."""
        if self._acceptor is not None:
            self._acceptor.listener.close()
            self._acceptor = None
        if self._listening is not None:
            self._listening.__exit__()
            self._listening = None


def name_of(path: str) -> str:
    """Return the name of the guest whose front end connects at this path: its file's, without the suffix."""
    return Path(path).stem
