"""The owner of each file descriptor, and messages that carry descriptors.

A number that outlives its descriptor may name somebody else's file a moment later; so a descriptor lives in an Fd, which
forgets the number when it closes. Used by keeper, worker, session and frontend.

Nothing here sets O_NONBLOCK: that flag belongs to the open file description and would be seen by QEMU and KVM too.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import stat
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple

# SET_MEM_TABLE carries at most 8. The room is larger so that a peer that sends too many is told so, and not that there was
# no room for them.
MAX_RECEIVED = 16

# Standard input, output and error are the numbers up to this one. Workers keep them (isolation.py).
LAST_STANDARD = 2

_EVENTFD_VALUE = (1).to_bytes(8, "little")


class Fd:
    """Owns one descriptor. Closing twice is harmless; using it after closing raises ValueError.

    token: by which the keeper knows it (wire/channel.py), 0 for one that came with no message.
    """

    __slots__ = ("_number", "token")

    def __init__(self, number: int, token: int = 0) -> None:
        self._number = number
        self.token = token

    def fileno(self) -> int:
        """Return the number. Raises ValueError if it is closed or detached."""
        if self._number < 0:
            raise ValueError("descriptor is closed")
        return self._number

    @property
    def closed(self) -> bool:
        """True once closed or detached."""
        return self._number < 0

    def detach(self) -> int:
        """Give the number away: from now on it is the caller's to close."""
        number = self.fileno()
        self._number = -1
        return number

    def close(self) -> None:
        """Close the descriptor, once."""
        number, self._number = getattr(self, "_number", -1), -1
        if number >= 0:
            os.close(number)

    def __enter__(self) -> Fd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Fd {self._number if self._number >= 0 else 'closed'}>"


class Received(NamedTuple):
    """What came in. fds: descriptors that came with data, all of them or none.

    curtailed: true for none because some were lost. The kernel drops what the receiver has no room for (MSG_CTRUNC,
    recvmsg(2)): it is at its limit of open files, or more were sent than it had asked for.
    """

    data: bytes
    fds: list[Fd]
    curtailed: bool = False


def occupy_standard() -> None:
    """Put /dev/null where a standard descriptor is closed. Raises OSError.

    Else what is opened next gets the number: a worker would keep it, and what is said on standard error end up in there.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= LAST_STANDARD:
        os.set_inheritable(number, True)
    os.close(number)


def close_all(fds: Iterable[Fd]) -> None:
    """Close each of fds."""
    for fd in fds:
        fd.close()


def receive(sock: socket.socket, size: int, most: int = MAX_RECEIVED) -> Received:
    """Receive at most size bytes and the descriptors that come with them, at most so many, without blocking.

    Raises BlockingIOError if there is nothing to read yet. No bytes means that the peer has closed.
    recvmsg and not socket.recv_fds: the latter ignores its flags, so descriptors would not be close-on-exec.
    """
    flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    data, ancillary, came_with, _address = sock.recvmsg(size, socket.CMSG_SPACE(4 * most), flags)
    received = _descriptors(ancillary)
    if not came_with & socket.MSG_CTRUNC:
        return Received(data, received)
    close_all(received)
    return Received(data, [], curtailed=True)


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[Fd]:
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return [Fd(number) for number in numbers]


def send(sock: socket.socket, data: bytes, fds: Sequence[Fd] = ()) -> int:
    """Send data with duplicates of fds, without blocking. Returns the bytes taken. Raises BlockingIOError if none."""
    flags = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
    if not fds:
        return sock.send(data, flags)
    numbers = array.array("i", [fd.fileno() for fd in fds])
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)], flags)


def stream_socket(fd: Fd) -> socket.socket | None:
    """Make a socket object of a connected unix stream socket, which then owns it; None for anything else."""
    if not stat.S_ISSOCK(os.fstat(fd.fileno()).st_mode):
        return None
    sock = socket.socket(fileno=fd.detach())
    if sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM:
        return sock
    sock.close()
    return None


def is_eventfd(fd: Fd) -> bool:
    """True if fd is an eventfd. Anything else could block a read or a write, or is no notification at all."""
    return os.readlink(f"/proc/self/fd/{fd.fileno()}").startswith("anon_inode:[eventfd")


def seals(fd: Fd) -> int:
    """Return the seals of a file (fcntl(2), F_GET_SEALS); 0 for a kind of file that has none."""
    try:
        return fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS)
    except OSError:
        return 0


def drain_event(fd: Fd) -> bool:
    """Take the count of an eventfd if there is one, never blocking. True if it was signalled."""
    if not _ready(fd, select.POLLIN):
        return False
    return len(os.read(fd.fileno(), 8)) == 8


def signal_event(fd: Fd) -> bool:
    """Add one to an eventfd, never blocking. False if its counter is full, which says that nobody looks at it."""
    if not _ready(fd, select.POLLOUT):
        return False
    return os.write(fd.fileno(), _EVENTFD_VALUE) == len(_EVENTFD_VALUE)


def _ready(fd: Fd, event: int) -> bool:
    poll = select.poll()
    poll.register(fd.fileno(), event)
    return any(mask & event for _fd, mask in poll.poll(0))
