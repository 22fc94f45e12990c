"""What a run left in its folder: the samples over time, the end of the console, and what is found on it.

Read back from the files and not handed over by the run, so that a report can be made again of any run folder. Used by
everything that shows a report; judges nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from balloonlab.errors import UsageError
from balloonlab.measure.console import findings_in
from balloonlab.measure.report import Finding, Report, Run
from balloonlab.printable import printable
from balloonlab.timeline import Sample, read_csv

TIMELINE = "timeline.csv"
CONSOLE = "console.log"

# A panic with its registers and its trace is some 50 lines; what led to it stands before.
CONSOLE_LINES = 80
CONSOLE_CHARACTERS = 400
# 80 lines of the kernel's are below it, at 100 bytes each on the average; what a guest floods its console with is not read.
CONSOLE_BYTES = 16 << 10

# Of a console, so much from its beginning and as much from its end is searched: a guest may write without end. A boot with
# all of its messages is 50 KiB; the worst that a guest can write takes some two seconds to search.
SEARCHED_BYTES = 1 << 20


@dataclass(frozen=True)
class Evidence:
    """Of one run. console: its last lines, of printable characters only."""

    run: Run
    samples: tuple[Sample, ...] = ()
    console: tuple[str, ...] = ()


def read_evidence(report: Report, folder: Path) -> list[Evidence]:
    """Read what each run of a report left in the report's folder; of a run that left nothing, nothing.

    Raises UsageError for a timeline that is none.
    """
    return [
        Evidence(run, _samples(folder / run.folder / TIMELINE), _console(folder / run.folder / CONSOLE))
        for run in report.runs
    ]


def _samples(path: Path) -> tuple[Sample, ...]:
    try:
        return tuple(read_csv(path))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}: {path.name} cannot be shown, remove it or measure again") from error


def _console(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - CONSOLE_BYTES))
            return console_tail(file.read(CONSOLE_BYTES).decode(errors="replace"), cut=size > CONSOLE_BYTES)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: let it be read, or remove it") from error


def console_tail(text: str, *, cut: bool = False) -> tuple[str, ...]:
    """Return the last CONSOLE_LINES lines of a console's text, each printable and bounded. cut: it begins within a line."""
    if not text.strip():
        return ()
    lines = text.rstrip().split("\n")[cut:]
    return tuple(printable(line.rstrip("\r"), CONSOLE_CHARACTERS) for line in lines[-CONSOLE_LINES:])


def read_findings(path: Path) -> list[Finding]:
    """Return what is found in a console's file, or in a kernel's log; nothing where there is no such file. Raises OSError."""
    try:
        with path.open("rb") as file:
            return findings_in(_searched(file))
    except FileNotFoundError:
        return []


def _searched(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers: those of the first SEARCHED_BYTES, and those of the last where there is more."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(SEARCHED_BYTES)
    yield from _lines(head, 1)
    number = 1 + head.count(b"\n")
    for length in _steps(size - SEARCHED_BYTES - len(head)):
        number += file.read(length).count(b"\n")
    tail = file.read(SEARCHED_BYTES)
    yield from _lines(tail, number)


def _steps(length: int) -> Iterator[int]:
    """Yield how much to read at a time to skip so much; nothing for nothing."""
    for begin in range(0, max(0, length), SEARCHED_BYTES):
        yield min(SEARCHED_BYTES, length - begin)


def _lines(content: bytes, number: int) -> Iterator[tuple[int, str]]:
    for more, line in enumerate(content.split(b"\n")):
        yield number + more, line.decode(errors="replace")
