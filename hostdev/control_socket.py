"""The control socket's file and its folder: made at the start, removed at the end, or handed to another version.

Used by launch.py, and by those who hand a device over and take it over. Who connects is served by control.py.
"""

from __future__ import annotations

import contextlib
import socket
from types import TracebackType

from hostdev.control import MAX_CLIENTS
from hostdev.listening import ListeningPath, PrivateFolder

_OPTION = "--control"


class ControlSocket:
    """Where clients connect. listener: None once nobody listens there any more."""

    def __init__(self, path: str) -> None:
        self._folder = PrivateFolder(path, _OPTION)
        self._listening = ListeningPath(path, _OPTION, MAX_CLIENTS)
        self.listener: socket.socket | None = None

    @classmethod
    def adopted(
        cls, path: str, listener: socket.socket | None, identity: tuple[int, int] | None, *, folder_made: bool
    ) -> ControlSocket:
        """Return one that another process made. identity: of the file, if that is to be removed."""
        control = cls(path)
        control._listening = ListeningPath.adopted(path, _OPTION, listener, identity)
        control._folder.made = folder_made
        control.listener = listener
        return control

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the file, if it is ours to remove."""
        return self._listening.identity

    @property
    def folder_made(self) -> bool:
        """True if the folder is ours to remove."""
        return self._folder.made

    def disown(self) -> None:
        """Leave file and folder to another process."""
        self._listening.disown()
        self._folder.made = False

    def open(self) -> None:
        """Listen. Raises SetupError."""
        with contextlib.ExitStack() as opened:
            opened.enter_context(self._folder)
            self.listener = self._listening.__enter__()
            opened.pop_all()

    def close(self) -> None:
        """Listen no longer, and remove what is ours to remove."""
        self._listening.__exit__()
        self._folder.__exit__()

    def __enter__(self) -> ControlSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
