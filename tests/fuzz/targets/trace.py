"""Trace files, damaged in any way: read, printed and judged by balloonlab, and gone on with by a device.

An input is a list of records, whole ones whose fields are chosen and raw bytes, behind a header that may lie. Each record is
printed in both forms, or the file is refused as damaged (UsageError; SetupError by a device): nothing else is raised, and
what is yielded is bounded by the bytes that there are.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

from balloonlab.decode import _plain, describe, read_trace
from balloonlab.errors import UsageError
from balloonlab.trace_check import TraceCheck, violations
from hostdev.errors import SetupError
from hostdev.fds import Fd
from hostdev.trace import TraceFile
from hostdev.wire import trace as wire
from hostdev.wire.trace import Kind
from tests.fuzz.source import Source

MAX_RECORDS = 64
_USED = (None, None, None, 0, 31, 32, 33, 1 << 20, (1 << 64) - 1)


@functools.cache
def _file() -> Fd:
    return Fd(os.memfd_create("fuzz-trace", os.MFD_CLOEXEC))


def check(data: bytes) -> None:
    """Write one input as a file, and have it read."""
    source = Source(data)
    path = Path(f"/proc/self/fd/{_file().fileno()}")
    content = _content(source)
    os.ftruncate(_file().fileno(), 0)
    os.pwrite(_file().fileno(), content, 0)
    _read(path, len(content))
    if source.flag():
        _go_on(path)


def _read(path: Path, size: int) -> None:
    try:
        records = list(read_trace(path))
    except UsageError:
        return
    assert len(records) <= size // wire.RECORD_HEADER_SIZE
    for record in records:
        assert describe(record).isprintable()
        json.dumps(_plain(record))
    check = TraceCheck()
    found = violations(records, check)
    assert check.chains <= len(records)
    assert check.releases <= len(records)
    assert len(found) <= 3 * len(records)


def _go_on(path: Path) -> None:
    """A device goes on with it: what it writes is there, or it refuses the file."""
    try:
        trace = TraceFile(path)
    except SetupError:
        return
    trace.guest()
    trace.fault(3, "a word")
    trace.close()


def _content(source: Source) -> bytes:
    if source.one_in(8):
        return source.take(4096)
    records = b"".join(_record(source) for _ in range(source.below(MAX_RECORDS)) if source)
    said = source.pick(_USED)
    used = wire.TRACE_HEADER_SIZE + len(records) if said is None else said
    header = wire.TRACE_HEADER.encode(wire.TraceHeader(wire.MAGIC, source.pick((1, 1, 1, 0, 2)), 0, 0, used))
    return (header + records)[: len(header) + len(records) - source.pick((0, 0, 0, 1, 8))]


def _record(source: Source) -> bytes:
    kind = source.below(len(Kind) + 2)
    payload = _PAYLOADS[Kind(kind)](source) if kind in _PAYLOADS else source.take(source.below(40))
    ring = source.pick((0, 0, 1, 2, 3, 4, 255))
    size = len(payload) if source.below(8) else source.number(2)
    return wire.RECORD_HEADER_STRUCT.pack(kind, ring, size, source.number(4)) + payload


def _message(source: Source) -> bytes:
    payload = source.take(source.below(50))
    size = len(payload) if source.below(4) else source.number(4)
    request = source.below(45) if source.below(8) else source.number(4)
    return wire.MESSAGE.encode(wire.Message(request, size, source.below(20), payload))


def _chain(source: Source) -> bytes:
    entries = tuple(
        wire.Entry(source.below(8) << 12, source.pick((4096, 8192, 0, 1 << 31)), source.below(8))
        for _ in range(source.below(5))
    )
    return wire.CHAIN.encode(wire.Chain(source.below(8), source.pick((4, 4, 0, 1, 2, 3, 255, 7)), entries))


def _release(source: Source) -> bytes:
    cause = source.pick((1, 1, 2, 0, 3, 255))
    return wire.RELEASE.encode(wire.Release(source.below(8) << 12, source.pick((4096, 8192, 0)), cause))


def _ring(source: Source) -> bytes:
    return wire.RING_EVENT.encode(wire.RingEvent(source.pick((8, 0)), source.pick((0, 1, 0xFFFF, 2))))


_PAYLOADS: dict[Kind, Callable[[Source], bytes]] = {
    Kind.MESSAGE: _message,
    Kind.RING_STARTED: _ring,
    Kind.RING_STOPPED: _ring,
    Kind.CHAIN: _chain,
    Kind.RELEASE: _release,
    Kind.WITHHOLD: _release,
    Kind.ANSWER: lambda source: wire.ANSWER.encode(wire.Answer(source.below(8))),
    Kind.FAULT: lambda source: source.take(source.below(20)),
}
