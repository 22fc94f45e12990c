"""The one file that gives memory back to the host: which call frees which backing, and that call.

    shared memory (memfd, tmpfs)   MADV_REMOVE punches the pages out of the file: freed for every process that maps it
    private memory                 MADV_DONTNEED: freed
    shared memory                  MADV_DONTNEED drops this process's page-table entries and frees nothing
    hugetlb                        nothing unless asked for: a page given back leaves without its reservation; if
                                   another process takes it, the guest's next touch is a SIGBUS that kills QEMU
    a file on disk                 nothing: punching would destroy the file's data
    bytes of two regions           nothing: a page that is free in one is in use in the other

It decides nothing about which pages: balloon.py hands it whole pages inside one region.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from dataclasses import dataclass
from enum import StrEnum

from hostdev.errors import HostError
from hostdev.fds import Fd, seals
from hostdev.memory import Region, doubled

log = logging.getLogger(__name__)

# Linux uapi/linux/magic.h.
_TMPFS_MAGIC = 0x01021994
_HUGETLBFS_MAGIC = 0x958458F6
# uapi/linux/fcntl.h: with either seal the kernel refuses to punch holes (EPERM), read on Linux 6.18.
_WRITE_SEALS = 0x0008 | 0x0010
# struct statfs is 120 bytes on x86-64 and begins with f_type, a long.
_STATFS_BYTES = 120


class Method(StrEnum):
    """The call that is used."""

    REMOVE = "remove"
    DONTNEED = "dontneed"
    NONE = "none"


class Backing(StrEnum):
    """What holds the guest's pages."""

    SHARED = "shared memory"
    PRIVATE = "private memory"
    HUGETLB = "hugetlb pages"
    FILE = "a file on disk"
    SEALED = "write-sealed shared memory"
    DOUBLED = "memory that another region holds as well"


AUTO = "auto"
REQUESTS = (AUTO, *(method.value for method in Method))

_ADVICE = {Method.REMOVE: mmap.MADV_REMOVE, Method.DONTNEED: mmap.MADV_DONTNEED}


@dataclass(frozen=True, slots=True)
class Choice:
    """A method and, in words, why it was chosen."""

    method: Method
    reason: str


def choose(request: str, backing: Backing, *, hugetlb_release: bool = False) -> Choice:
    """Pick the method for a backing. request: one of REQUESTS. hugetlb_release: whole huge pages may be given back."""
    if backing is Backing.HUGETLB and not hugetlb_release:
        return Choice(
            Method.NONE,
            "a huge page given back may be taken by another process, and the guest's next touch would then kill QEMU; "
            "--hugetlb-release takes that risk",
        )
    if backing is Backing.FILE:
        return Choice(Method.NONE, "punching would destroy the data of the file: use memory-backend-memfd")
    if backing is Backing.SEALED:
        return Choice(Method.NONE, "its seals forbid giving pages back")
    if backing is Backing.DOUBLED:
        return Choice(Method.NONE, "a page that is free in one region may be in use in the other")
    if request == Method.NONE:
        return Choice(Method.NONE, "--discard none was given")
    if backing is Backing.PRIVATE:
        return Choice(Method.DONTNEED, "MADV_DONTNEED frees private pages")
    if request == Method.DONTNEED:
        return Choice(Method.DONTNEED, "--discard dontneed was given: on shared memory this FREES NOTHING")
    if backing is Backing.HUGETLB:
        return Choice(
            Method.REMOVE,
            "--hugetlb-release was given: if another process takes the pages, QEMU dies at the guest's next touch",
        )
    return Choice(Method.REMOVE, "MADV_REMOVE frees shared pages, MADV_DONTNEED would not")


def backing_of(fd: Fd | None) -> Backing:
    """Tell what is behind a descriptor; None stands for an anonymous private mapping."""
    if fd is None:
        return Backing.PRIVATE
    kind = _filesystem(fd)
    if kind == _HUGETLBFS_MAGIC:
        return Backing.HUGETLB
    if kind != _TMPFS_MAGIC:
        return Backing.FILE
    return Backing.SEALED if seals(fd) & _WRITE_SEALS else Backing.SHARED


def _filesystem(fd: Fd) -> int:
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd.fileno(), buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int.from_bytes(buffer.raw[:8], "little")


class Discarder:
    """Gives ranges of regions back by the method that each region's backing needs."""

    def __init__(self, request: str = AUTO, *, hugetlb_release: bool = False) -> None:
        self._request = request
        self._hugetlb_release = hugetlb_release
        self._backings: dict[Region, Backing] = {}
        self._choices: dict[Region, Choice] = {}
        self._said: set[tuple[Backing, Method]] = set()

    def adopt(self, regions: tuple[Region, ...]) -> None:
        """Choose for each region, and say each new choice in the log, once."""
        self._backings = {region: backing_of(region.fd) for region in regions}
        self._backings |= dict.fromkeys(doubled(regions), Backing.DOUBLED)
        self._choices = {region: self._choose(backing) for region, backing in self._backings.items()}

    def _choose(self, backing: Backing) -> Choice:
        choice = choose(self._request, backing, hugetlb_release=self._hugetlb_release)
        if (backing, choice.method) not in self._said:
            self._said.add((backing, choice.method))
            is_usual = choice.method is Method.REMOVE and backing is Backing.SHARED
            level = logging.INFO if is_usual else logging.WARNING
            log.log(
                level, "guest memory is %s: discard method is %s (%s)", backing, choice.method, choice.reason
            )
        return choice

    def method(self, region: Region) -> Method:
        """Return the method for a region of the current table."""
        return self._choices[region].method

    def backing(self, region: Region) -> Backing:
        """Return what is behind a region of the current table."""
        return self._backings[region]

    def release(self, region: Region, offset: int, length: int) -> None:
        """Give back length bytes at offset, whole pages. Raises HostError if the kernel refuses.

        The bounds are checked again because mmap.madvise clamps a range that passes the mapping's end in silence.
        """
        advice = _ADVICE[self.method(region)]
        if offset < 0 or length <= 0 or offset + length > region.size:
            raise ValueError("range outside its region")
        try:
            region.advise(advice, offset, length)
        except OSError as error:
            raise HostError(f"the host refuses to take memory back: {error}") from error
