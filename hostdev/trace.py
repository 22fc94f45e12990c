"""Writes a trace: each record before the act that it describes, into a mapped file, so that it survives SIGKILL.

What reaches a shared mapping is the kernel's at once: a process killed at any instruction leaves whole records behind, for
a record counts only once the header says that the file is that long. Used by worker.py, balloon.py and session.py through
the Tracer class, which traces nothing and costs a call.
"""

from __future__ import annotations

import logging
import mmap
import os
import time
from pathlib import Path

from hostdev.errors import SetupError
from hostdev.wire import trace as wire
from hostdev.wire.layout import LayoutError
from hostdev.wire.trace import Cause, Kind
from hostdev.wire.virtqueue import Descriptor

log = logging.getLogger(__name__)

# The file grows by this much: a day of a guest that reports now and then fits in one step.
GROWTH = 1 << 20
# And no further than this: some 200,000 full reports. Then the trace says that it is full and stays as it is.
MAX_TRACE = 256 << 20
# Of a message's payload: all of every message but SET_MEM_TABLE, of which two regions.
MAX_PAYLOAD = 76
# An indirect table may have more; the chain's first entries tell enough.
MAX_ENTRIES = 1024
# No record is longer: a chain of so many entries, 14 bytes each.
MAX_RECORD = 16 << 10

NO_RING = 255
NO_ROLE = 255


class Tracer:
    """What can be traced, each before the act. This one traces nothing: a device without --trace has it."""

    def guest(self) -> None:
        """This process serves a front end."""

    def message(self, request: int, payload: bytes, descriptors: int) -> None:
        """A message is about to be handled."""

    def ring(self, index: int, *, started: bool, size: int, base: int) -> None:
        """A ring starts or has stopped."""

    def chain(self, index: int, role: int | None, head: int, descriptors: tuple[Descriptor, ...]) -> None:
        """A chain was taken."""

    def release(self, index: int, cause: Cause, address: int, length: int, *, withheld: bool) -> None:
        """A range of guest physical bytes is about to be given back, or is kept."""

    def answer(self, index: int, head: int) -> None:
        """A chain is about to be put back."""

    def fault(self, index: int | None, text: str) -> None:
        """Something went wrong."""

    def close(self) -> None:
        """Nothing more will be traced."""


class TraceFile(Tracer):
    """A trace that is being written."""

    def __init__(self, path: Path) -> None:
        """Open the file and go on where it ends, or begin it. Raises SetupError if it is something else."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SetupError(f"--trace {path}: {error.strerror}: name a file that can be written") from error
        self._is_full = False
        try:
            self._open()
        except (OSError, ValueError) as error:
            os.close(self._fd)
            raise SetupError(f"--trace {path}: {error}: name another file") from error

    def _open(self) -> None:
        """Raises OSError or ValueError for what is no trace and cannot become one."""
        size = os.fstat(self._fd).st_size
        header = self._begin() if size == 0 else self._continue()
        self._started = header.started
        self._used = header.used
        self._map(max(size, wire.TRACE_HEADER_SIZE))

    def _begin(self) -> wire.TraceHeader:
        header = wire.TraceHeader(wire.MAGIC, wire.FORMAT, 0, time.time_ns(), wire.TRACE_HEADER_SIZE)
        os.pwrite(self._fd, wire.TRACE_HEADER.encode(header), 0)
        return header

    def _continue(self) -> wire.TraceHeader:
        try:
            header = wire.TRACE_HEADER.decode(os.pread(self._fd, wire.TRACE_HEADER_SIZE, 0))
        except LayoutError as error:
            raise ValueError("it is there and is no trace") from error
        if not wire.TRACE_HEADER_SIZE <= header.used <= os.fstat(self._fd).st_size:
            raise ValueError("it is a damaged trace")
        return header

    def restart(self) -> None:
        """Forget what an earlier device wrote."""
        header = self._begin()
        self._started, self._used = header.started, header.used

    def _map(self, size: int) -> None:
        self._mapping = mmap.mmap(self._fd, size)
        # One aligned store: struct would move a byte at a time, and SIGKILL could come in between.
        self._length = memoryview(self._mapping)[wire.USED_OFFSET : wire.USED_OFFSET + 8].cast("Q")
        self._size = size

    def _unmap(self) -> None:
        self._length.release()
        self._mapping.close()

    def close(self) -> None:
        """Cut the file to what is used and close it."""
        self._unmap()
        os.ftruncate(self._fd, self._used)
        os.close(self._fd)

    def _write(self, kind: Kind, ring: int, payload: bytes) -> None:
        """Append one record: its bytes first, then the length that makes them count."""
        moment = max(0, time.time_ns() - self._started) // 1000
        end = self._used + wire.RECORD_HEADER_SIZE + len(payload)
        if not self._has_room(end):
            return
        wire.RECORD_HEADER_STRUCT.pack_into(self._mapping, self._used, kind, ring, len(payload), moment)
        self._mapping[self._used + wire.RECORD_HEADER_SIZE : end] = payload
        self._length[0] = end
        self._used = end

    def _has_room(self, end: int) -> bool:
        """Say if a record may be written up to end. Whatever its size: or what is small would still be, and leave holes."""
        if self._used > MAX_TRACE - MAX_RECORD:
            self._fill_up(f"it has {MAX_TRACE >> 20} MiB")
        elif end > self._size and not self._is_full:
            self._grow(-(-end // GROWTH) * GROWTH)
        return not self._is_full

    def _grow(self, size: int) -> None:
        """Make room up to size, on the disk as well: a mapping of what a full disk does not hold is a SIGBUS."""
        try:
            os.posix_fallocate(self._fd, self._size, size - self._size)
        except OSError as error:
            self._fill_up(error.strerror or "error")
            return
        self._unmap()
        self._map(size)

    def _fill_up(self, why: str) -> None:
        if not self._is_full:
            log.warning("the trace is full: %s: nothing more is written to it", why)
        self._is_full = True

    # What happens

    def guest(self) -> None:
        """This process serves a front end."""
        self._write(Kind.GUEST, NO_RING, wire.GUEST.encode(wire.Guest(os.getpid())))

    def message(self, request: int, payload: bytes, descriptors: int) -> None:
        """A message is about to be handled."""
        record = wire.Message(request, len(payload), descriptors, payload[:MAX_PAYLOAD])
        self._write(Kind.MESSAGE, NO_RING, wire.MESSAGE.encode(record))

    def ring(self, index: int, *, started: bool, size: int, base: int) -> None:
        """A ring starts or has stopped."""
        kind = Kind.RING_STARTED if started else Kind.RING_STOPPED
        self._write(kind, index, wire.RING_EVENT.encode(wire.RingEvent(size, base)))

    def chain(self, index: int, role: int | None, head: int, descriptors: tuple[Descriptor, ...]) -> None:
        """A chain was taken."""
        start = wire.CHAIN.encode(wire.Chain(head, NO_ROLE if role is None else role, ()))
        entries = (wire.ENTRY_STRUCT.pack(d.address, d.length, d.flags) for d in descriptors[:MAX_ENTRIES])
        self._write(Kind.CHAIN, index, start + b"".join(entries))

    def release(self, index: int, cause: Cause, address: int, length: int, *, withheld: bool) -> None:
        """A range of guest physical bytes is about to be given back, or is kept."""
        kind = Kind.WITHHOLD if withheld else Kind.RELEASE
        self._write(kind, index, wire.RELEASE_STRUCT.pack(address, length, cause))

    def answer(self, index: int, head: int) -> None:
        """A chain is about to be put back."""
        self._write(Kind.ANSWER, index, wire.ANSWER_STRUCT.pack(head))

    def fault(self, index: int | None, text: str) -> None:
        """Something went wrong."""
        record = wire.FAULT.encode(wire.Fault(text.encode()[:MAX_PAYLOAD]))
        self._write(Kind.FAULT, NO_RING if index is None else index, record)


def open_trace(path: Path | None) -> Tracer:
    """Return a trace that goes on at path, one that traces nothing if there is none or it cannot be gone on with."""
    if path is None:
        return Tracer()
    try:
        return TraceFile(path)
    except SetupError as error:
        log.error("nothing more is traced: %s", error)  # noqa: TRY400
        return Tracer()


def begin_trace(path: Path) -> None:
    """Make an empty trace at path, in place of an older one. Raises SetupError for anything else that is there."""
    trace = TraceFile(path)
    trace.restart()
    trace.close()
