"""Descriptors of many kinds for a hostile front end to send, made once a process. Used by the targets with messages."""

from __future__ import annotations

import fcntl
import functools
import os
import socket
from dataclasses import dataclass

from hostdev.fds import Fd

RAM_BYTES = 2 << 20
# uapi/linux/fcntl.h.
_F_ADD_SEALS, _F_SEAL_SHRINK, _F_SEAL_WRITE = 1033, 0x0002, 0x0008


@dataclass(frozen=True)
class Wares:
    """What can be sent. ram, event, channel: what a front end sends; odd: what it should not."""

    ram: Fd
    event: Fd
    channel: Fd
    odd: tuple[Fd, ...]

    def reset(self) -> None:
        """Have memory read as zeroes. Nobody may map it at that moment."""
        os.ftruncate(self.ram.fileno(), 0)
        os.ftruncate(self.ram.fileno(), RAM_BYTES)


@functools.cache
def wares() -> Wares:
    """Return those there are."""
    ram = _memory("fuzz-guest-ram", RAM_BYTES)
    small = _memory("fuzz-small", 0x3000)
    sealed = _memory("fuzz-sealed", RAM_BYTES)
    fcntl.fcntl(sealed.fileno(), _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_WRITE)
    read_only = Fd(os.open(f"/proc/self/fd/{ram.fileno()}", os.O_RDONLY | os.O_CLOEXEC))
    reading, writing = os.pipe()
    channel, _other = (Fd(end.detach()) for end in socket.socketpair())
    datagram, _peer = (Fd(end.detach()) for end in socket.socketpair(type=socket.SOCK_DGRAM))
    others = [Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) for path in ("/dev/zero", "/")]
    return Wares(
        ram,
        Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)),
        channel,
        (small, sealed, read_only, Fd(reading), Fd(writing), datagram, *others),
    )


def _memory(name: str, size: int) -> Fd:
    fd = Fd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), size)
    return fd


def open_descriptors() -> int:
    """Count those of this process."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208
