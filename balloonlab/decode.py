"""The command balloonlab decode: a trace file as text that tells what happened, as JSON lines, or judged.

Reads only; a trace that is still being written, or whose writer was killed, is read as far as it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from balloonlab.errors import UsageError
from balloonlab.options import Commands
from balloonlab.printable import printable
from balloonlab.progress import Progress
from balloonlab.sizes import human
from balloonlab.trace_check import TraceCheck, violations
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS
from hostdev.trace import NO_RING, NO_ROLE
from hostdev.wire import trace as wire
from hostdev.wire.balloon import Role
from hostdev.wire.layout import LayoutError
from hostdev.wire.trace import Cause, Kind
from hostdev.wire.vhost_user import MESSAGES, request_of


@dataclass(frozen=True)
class Record:
    """One record: seconds since the trace's start, what, on which ring (None where there is none), and its values."""

    seconds: float
    kind: Kind
    ring: int | None
    value: Any


class TraceReader:
    """Reads a trace that may still be written. records() continues where it ended before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = wire.TRACE_HEADER_SIZE

    def header(self) -> wire.TraceHeader:
        """Return the file's header. Raises UsageError for a file that is no trace."""
        return _header(self._read(0, wire.TRACE_HEADER_SIZE), self._path)

    def records(self) -> Iterator[Record]:
        """Yield the whole records that were not yielded yet. Raises UsageError."""
        header = self.header()
        data = self._read(self._position, header.used - self._position)
        position = 0
        while position + wire.RECORD_HEADER_SIZE <= len(data):
            kind, ring, size, moment = wire.RECORD_HEADER_STRUCT.unpack_from(data, position)
            position += wire.RECORD_HEADER_SIZE
            try:
                value = wire.PAYLOADS[Kind(kind)].decode(data[position : position + size])
                _check_names(value)
            except (ValueError, LayoutError) as error:
                raise UsageError(
                    f"{self._path} is damaged at byte {self._position + wire.RECORD_HEADER_SIZE}: {error}"
                ) from error
            position += size
            self._position += wire.RECORD_HEADER_SIZE + size
            yield Record(moment / 1e6, Kind(kind), None if ring == NO_RING else ring, value)

    def _read(self, start: int, size: int) -> bytes:
        try:
            with self._path.open("rb") as file:
                there = os.fstat(file.fileno()).st_size - start  # the header may say anything
                file.seek(start)
                return file.read(max(0, min(size, there)))
        except OSError as error:
            raise UsageError(
                f"{self._path}: {error.strerror}: name a file that vhost-user-balloon --trace wrote"
            ) from error


def _header(data: bytes, path: Path) -> wire.TraceHeader:
    try:
        return wire.TRACE_HEADER.decode(data)
    except LayoutError as error:
        raise UsageError(f"{path} is no trace: name a file that vhost-user-balloon --trace wrote") from error


def read_trace(path: Path) -> Iterator[Record]:
    """Yield the records of a trace file. Raises UsageError for a file that is none."""
    return TraceReader(path).records()


def _check_names(value: object) -> None:
    """Raise ValueError for a cause or a role that there is none of."""
    if isinstance(value, wire.Release):
        Cause(value.cause)
    elif isinstance(value, wire.Chain) and value.role != NO_ROLE:
        Role(value.role)


def describe(record: Record) -> str:
    """Return one record as a line."""
    ring = "" if record.ring is None else f"ring {record.ring}"
    return f"{record.seconds:12.6f}  {ring:<6}  {_words(record)}"


def _words(record: Record) -> str:
    match record.value:
        case wire.Guest(process):
            return f"process {process} serves a front end"
        case wire.Message():
            return _message(record.value)
        case wire.RingEvent(size, base):
            return f"starts with {size} descriptors at index {base}" if size else f"stops at index {base}"
        case wire.Chain():
            return _chain(record.value)
        case wire.Release(address, length, cause):
            verb = "release " if record.kind is Kind.RELEASE else "withhold"
            return f"  {verb} {address:#014x} + {human(length)} ({Cause(cause).name.lower()})"
        case wire.Answer(head):
            return f"  answer chain {head}"
        case wire.Fault(text):
            return f"fault: {printable(text.decode(errors='replace'))}"
    raise AssertionError(record)


def _message(message: wire.Message) -> str:
    request = request_of(message.request)
    name = request.name if request is not None else "request"
    fds = f", {message.descriptors} descriptors" if message.descriptors else ""
    return f"{name} ({message.request}), {message.size} bytes{fds}{_payload(message)}"


def _payload(message: wire.Message) -> str:
    """Decode a payload that is in the trace as a whole."""
    request = request_of(message.request)
    if request is None or len(message.payload) != message.size:
        return ""
    try:
        value = MESSAGES[request].payload.decode(message.payload)
    except LayoutError:
        return ": malformed"
    fields = ", ".join(f"{name} {item:#x}" for name, item in asdict(value).items() if isinstance(item, int))
    return f": {fields}" if fields else ""


def _chain(chain: wire.Chain) -> str:
    role = "no role" if chain.role == NO_ROLE else Role(chain.role).name.lower()
    total = sum(entry.length for entry in chain.entries)
    return f"{role}: chain {chain.head}, {len(chain.entries)} buffers, {human(total)}"


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("decode", help="print what a device wrote with --trace")
    parser.add_argument("file", type=Path, help="the trace")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON object a line")
    how.add_argument(
        "--check",
        action="store_true",
        help="print nothing but what breaks the device's promises: that it releases what a chain in hand names and "
        "nothing else, and answers each chain once",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Print the trace, or judge it."""
    if options.check:
        return judge(options.file, progress)
    for record in read_trace(options.file):
        if options.json:
            sys.stdout.write(json.dumps(_plain(record)) + "\n")
        else:
            progress.say(describe(record))
    return EXIT_PASS


def judge(path: Path, progress: Progress) -> int:
    """Say what of a trace breaks the device's promises, or that nothing does. Returns the exit status."""
    check = TraceCheck()
    found = violations(read_trace(path), check)
    for one in found:
        ring = "" if one.ring is None else f"ring {one.ring}: "
        progress.say(f"record {one.number}: {ring}{one.text}")
    progress.say(
        f"{check.chains} chains returned, {human(check.released_bytes)} given back in {check.releases} pieces, "
        f"{check.workers} worker processes: {len(found) or 'no'} violations"
    )
    return EXIT_CHECK_FAILED if found else EXIT_PASS


def _plain(record: Record) -> dict[str, Any]:
    value = {
        name: item.hex() if isinstance(item, bytes) else item for name, item in asdict(record.value).items()
    }
    return {"seconds": record.seconds, "kind": record.kind.name.lower(), "ring": record.ring, **value}
