"""The first proof of --verify: what became a hole was released, says the device's trace, at the time when it did.

Two looks at the files of guest RAM, by SEEK_DATA, while everything runs. Each page of a look was data or a hole at one
moment between its begin and its end. A page that was data at one look and is a hole at the next was punched in between, and
nobody but the device punches holes into guest RAM. The device writes a record before each release, and is one thread: a
release is over when the next record is written. So the records in question are those that were written before the later
look ended and after the earlier one began, and the one that was the last when the earlier one began, whose release may have
been on its way. Which these are is told by how much of the trace was there before and after each look, not by clocks.

What this proves: no page that was seen to hold data vanished without a release that was said to be of it. Together with
trace_check.py, which shows that the trace's releases lie in what the guest named, no page vanished that was not named. What
it does not prove: anything about a page that was taken and filled anew between two looks; memory with known contents
(verify-contents) is for that.

take_look() reads files; the rest is pure. verify.py is its user.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from balloonlab.measure.looking import held_places
from balloonlab.measure.ranges import Places, counted, subtract, total
from balloonlab.measure.report import Check
from balloonlab.sizes import human
from hostdev.pages import Span, merge
from hostdev.wire import trace as wire
from hostdev.wire.trace import Kind

NAME = "verify-holes"
# Of a trace at once: many records, and each of them whole.
READ_BYTES = 1 << 20
# What the device's log says where nothing more is written to its trace (hostdev.trace).
_FULL = "the trace is full"


@dataclass(frozen=True)
class Look:
    """What the host held, as places, between two lengths of the trace in bytes; 0 both where there is no trace."""

    name: str
    begin: int
    held: tuple[Span, ...]
    end: int


@dataclass(frozen=True)
class Step:
    """From one look to the next: the places that became holes, between two lengths of the trace."""

    earlier: str
    later: str
    begin: int
    gone: tuple[Span, ...]
    end: int


@dataclass(frozen=True)
class Release:
    """Guest addresses that the trace says were given back; end: of the record, in bytes of the trace."""

    end: int
    span: Span


@dataclass(frozen=True)
class Unexplained:
    """Places that became holes between two looks and were not released."""

    earlier: str
    later: str
    places: tuple[Span, ...]


@dataclass(frozen=True)
class Holes:
    """All steps judged. vanished_bytes: that became holes, once for each time that they did."""

    steps: int
    vanished_bytes: int
    releases: int
    unexplained: tuple[Unexplained, ...]


def trace_length(trace: Path | None) -> int:
    """Return how many bytes of a trace are written; 0 if there is none. Raises OSError, LayoutError."""
    if trace is None:
        return 0
    with trace.open("rb") as file:
        return wire.TRACE_HEADER.decode(os.pread(file.fileno(), wire.TRACE_HEADER_SIZE, 0)).used


def take_look(name: str, files: Sequence[Path], trace: Path | None) -> Look:
    """Look at the files of guest RAM. Raises OSError, LayoutError."""
    begin = trace_length(trace)
    held = tuple(held_places(files))
    return Look(name, begin, held, trace_length(trace))


class Releases(Sequence[Release]):
    """Releases in the order of the trace, in 24 bytes each: a trace that is full has millions of them."""

    def __init__(self) -> None:
        self._ends, self._addresses, self._lengths = array("Q"), array("Q"), array("Q")

    def add(self, end: int, address: int, length: int) -> None:
        """Add the next one."""
        for column, value in zip(self._columns, (end, address, length), strict=True):
            column.append(value)

    @property
    def _columns(self) -> tuple[array[int], ...]:
        return self._ends, self._addresses, self._lengths

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Release: ...

    @overload
    def __getitem__(self, index: slice) -> list[Release]: ...

    def __getitem__(self, index: int | slice) -> Release | list[Release]:
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        return Release(self._ends[index], Span(self._addresses[index], self._lengths[index]))


class ReleaseLog:
    """What a trace that grows says was released: each read() goes on where the one before it ended."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace
        self._position = wire.TRACE_HEADER_SIZE
        self._found = Releases()

    def read(self) -> Releases:
        """Return all releases so far, and nothing else of the trace. Raises OSError, LayoutError."""
        used = trace_length(self._trace)
        with self._trace.open("rb") as file:
            while self._position < used:
                piece = os.pread(file.fileno(), min(READ_BYTES, used - self._position), self._position)
                if not (taken := self._take(piece)):
                    break
                self._position += taken
        return self._found

    def _take(self, piece: bytes) -> int:
        """Take the whole records at the beginning of a piece. Returns their bytes."""
        position = 0
        while position + wire.RECORD_HEADER_SIZE <= len(piece):
            kind, _ring, size, _time = wire.RECORD_HEADER_STRUCT.unpack_from(piece, position)
            body = position + wire.RECORD_HEADER_SIZE
            if body + size > len(piece):
                break
            position = body + size
            if kind == Kind.RELEASE:
                address, length, _cause = wire.RELEASE_STRUCT.unpack_from(piece, body)
                self._found.add(self._position + position, address, length)
        return position


def read_releases(trace: Path) -> Releases:
    """Read what a trace says was released. Raises OSError, LayoutError."""
    return ReleaseLog(trace).read()


def trace_is_full(log: str) -> str:
    """Return what a device's log says of a trace that tells no more, for its length or for the disk; nothing if it is whole."""
    return next((line for line in log.splitlines() if _FULL in line), "")


def step(earlier: Look, later: Look) -> Step:
    """Return what became of the first look until the second one."""
    gone = tuple(subtract(earlier.held, later.held))
    return Step(earlier.name, later.name, earlier.begin, gone, later.end)


def between(releases: Sequence[Release], begin: int, end: int) -> list[Span]:
    """Return the guest addresses of releases that may have been under way while the trace grew from begin to end bytes.

    releases: in the order of the trace.
    """
    first = bisect_left(releases, begin, key=lambda release: release.end)
    after = bisect_right(releases, end, key=lambda release: release.end)
    return merge(release.span for release in releases[first:after])


def judge_holes(steps: Sequence[Step], releases: Sequence[Release], places: Places) -> Holes:
    """Judge what became holes in each step by what was released in it. releases: in the order of the trace."""
    unexplained = []
    for one in steps:
        released = places.of(between(releases, one.begin, one.end)) if one.gone else []
        if left := subtract(one.gone, released):
            unexplained.append(Unexplained(one.earlier, one.later, tuple(left)))
    vanished = sum(total(one.gone) for one in steps)
    return Holes(len(steps), vanished, len(releases), tuple(unexplained))


def check_holes(found: Holes, places: Places) -> Check:
    """Say what was found."""
    size = f"{counted(found.vanished_bytes)} ({human(found.vanished_bytes)})"
    told = f"{size} became holes in {found.steps} steps from look to look"
    if found.unexplained:
        return Check(name=NAME, outcome="fail", message=f"{_unexplained(found.unexplained, places)}; {told}")
    if not found.vanished_bytes:
        return Check(name=NAME, outcome="skip", message=f"nothing to prove: {told}")
    explained = f"all of them in what {found.releases:,} releases of the trace name"
    return Check(name=NAME, outcome="pass", message=f"{told}, {explained}")


def _unexplained(found: Sequence[Unexplained], places: Places) -> str:
    """Describe all of it, and between which looks it was seen first."""
    all_of_it = places.describe(merge(span for one in found for span in one.places))
    moment = f"first seen between the looks {found[0].earlier!r} and {found[0].later!r}"
    return f"holes that no release in the device's trace names: {all_of_it}; {moment}"
