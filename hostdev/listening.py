"""Where front ends and clients connect: a unix socket made at a path, or one that was inherited.

What is done with those who do is acceptor.py's. Used by launch.py, place.py and control_socket.py. Everything wrong with a
path or a descriptor is a SetupError that names the fix.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from hostdev.errors import SetupError
from hostdev.fds import LAST_STANDARD, occupy_standard

# struct sockaddr_un has room for 108 bytes, the last of which Linux wants to be NUL for a path.
MAX_SOCKET_PATH = 107


def inherited(number: int) -> socket.socket:
    """Take over an inherited unix stream socket, connected or listening."""
    try:
        given = socket.socket(fileno=number)
    except (OSError, ValueError, OverflowError) as error:
        raise SetupError(f"--fd {number}: not an inherited socket: {error}") from error
    if given.family != socket.AF_UNIX or given.type != socket.SOCK_STREAM:
        given.detach()
        raise SetupError(f"--fd {number}: not a unix stream socket")
    if number > LAST_STANDARD:
        given.set_inheritable(False)
        return given
    # As from inetd. The others are occupied, so that a duplicate is none of them.
    with given:
        moved = given.dup()
    occupy_standard()
    return moved


class ListeningPath:
    """A unix socket that listens at a path, removed again at the end if it is still the one made here."""

    def __init__(self, path: str, option: str = "--socket-path", backlog: int = 1) -> None:
        """option: for the errors. backlog: how many may wait to be accepted."""
        self._path = path
        self._option = option
        self._backlog = backlog
        # Device and inode of the socket's file; None for one that is not ours to remove.
        self.identity: tuple[int, int] | None = None
        self._listener: socket.socket | None = None

    @classmethod
    def adopted(
        cls, path: str, option: str, listener: socket.socket | None, identity: tuple[int, int] | None
    ) -> ListeningPath:
        """Return one that another process made. listener: None if that listens no longer."""
        listening = cls(path, option)
        listening._listener = listener
        listening.identity = identity
        return listening

    def disown(self) -> None:
        """Leave the socket's file to another process: close() does not remove it."""
        self.identity = None

    def __enter__(self) -> socket.socket:
        length = len(os.fsencode(self._path))
        if length > MAX_SOCKET_PATH:
            raise SetupError(
                f"{self._option} is {length} bytes long, a unix socket's path has at most {MAX_SOCKET_PATH}: "
                "use a shorter one"
            )
        self._make_room()
        self._listener = listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            listener.bind(self._path)
            made = os.lstat(self._path)
            self.identity = made.st_dev, made.st_ino
            listener.listen(self._backlog)
        except OSError as error:
            self.__exit__()
            raise SetupError(
                f"{self._option} {self._path}: {error.strerror}: {_hint(self._path, error)}"
            ) from error
        finally:
            os.umask(mask)
        return listener

    def _make_room(self) -> None:
        """Remove a socket that a program left behind; refuse anything else that is at the path.

        Asked with a datagram socket: a stream socket that somebody holds refuses it for its type (EPROTOTYPE), one that
        nobody holds refuses it altogether, and no program there takes us for its front end.
        """
        try:
            found = os.lstat(self._path)
        except OSError:
            return  # nothing there, or bind() will say why it cannot be looked at
        if not stat.S_ISSOCK(found.st_mode):
            raise SetupError(
                f"{self._option} {self._path} is taken by something that is not a socket: choose another path"
            )
        if self._is_held():
            raise SetupError(
                f"{self._option} {self._path} is taken: another program listens there, choose another path"
            )
        try:
            Path(self._path).unlink()
        except OSError as error:
            raise SetupError(
                f"{self._option} {self._path}: a stale socket is there and cannot be removed: {error.strerror}: "
                "remove it or choose another path"
            ) from error

    def _is_held(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(self._path)
            except ConnectionRefusedError:
                return False
            except OSError as error:
                if error.errno != errno.EPROTOTYPE:
                    raise SetupError(
                        f"{self._option} {self._path} is taken: {error.strerror}: choose another path"
                    ) from error
        return True

    def __exit__(self, *_error: object) -> None:
        if self._listener is not None:
            self._listener.close()
        try:
            found = os.lstat(self._path)
        except OSError:
            return
        if (found.st_dev, found.st_ino) == self.identity:
            Path(self._path).unlink()


class PrivateFolder:
    """The folder of a socket that only its owner may get at: made if need be, and then removed at the end."""

    def __init__(self, path: str, option: str) -> None:
        """path: of the socket."""
        self._folder = Path(path).parent
        self._name = Path(path).name
        self._what = f"{option} {path}"
        # True if it is ours to remove.
        self.made = False

    def __enter__(self) -> None:
        try:
            self._folder.mkdir(mode=0o700)
            self.made = True
        except FileExistsError:
            self._check()
        except OSError as error:
            raise SetupError(
                f"{self._what}: the folder {self._folder} cannot be made: {error.strerror}: {self._advice()}"
            ) from error

    def _check(self) -> None:
        """Raise SetupError if somebody else could replace the socket, or get at it before its mode is set."""
        if self._folder.is_symlink():
            # Whoever made the link could have it point elsewhere later.
            raise SetupError(f"{self._what}: {self._folder} is a link, name the folder itself")
        found = self._folder.stat()
        if found.st_uid != os.geteuid():
            raise SetupError(f"{self._what}: the folder {self._folder} is not yours: {self._advice()}")
        if found.st_mode & 0o022:
            raise SetupError(f"{self._what}: others can write to the folder {self._folder}: {self._advice()}")

    def _advice(self) -> str:
        return f"use one of your own, such as $XDG_RUNTIME_DIR/vhost-user-balloon/{self._name}"

    def __exit__(self, *_error: object) -> None:
        if self.made:
            with contextlib.suppress(OSError):  # something of somebody else's is in it, or it is gone
                self._folder.rmdir()


def _hint(path: str, error: OSError) -> str:
    folder = Path(path).parent
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not folder.is_dir():
        return f"the folder {folder} does not exist"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"the folder {folder} cannot be written to, choose another"
    return "choose another path"


def is_listening(sock: socket.socket) -> bool:
    """Tell a listening socket from a connected one: --fd is given both ways (libvirt, virtiofsd, QEMU's own)."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
