"""The log goes where standard error goes, and waits for nobody there."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostdev.driver import DEADLINE
from hostdev.log_output import PIECE, Output

Ends = tuple[int, int]


def _pipe() -> Ends:
    return os.pipe()


def _sockets() -> Ends:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


KINDS: dict[str, Callable[[], Ends]] = {"pipe": _pipe, "socket": _sockets, "terminal": pty.openpty}


@pytest.fixture(params=list(KINDS.values()), ids=list(KINDS))
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Where to read, and where to write."""
    both = request.param()
    yield both
    for number in both:
        os.close(number)


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("tests", logging.WARNING, __file__, 1, text, None, None)


def fill(output: Output) -> int:
    """Log until a line is left out. Returns how many lines went."""
    went = 0
    while not output._lost:
        output.emit(record(f"line {went} " + "x" * 900))
        went += 1
    return went - 1


def test_nobody_is_waited_for(ends: Ends) -> None:
    reading, writing = ends
    shared = os.dup(writing)
    output = Output(writing)
    went = fill(output)
    assert went > 2
    output.emit(record("left out as well" + "x" * 900))
    os.set_blocking(reading, False)
    taken = b""
    while True:
        try:
            taken += os.read(reading, 1 << 20)
        except BlockingIOError:
            break
    assert f"line {went - 1} ".encode() in taken
    output.emit(record("read again"))
    os.set_blocking(reading, True)
    said = ""
    while not said.endswith("read again\n"):  # a terminal's lines may come in pieces
        assert select.select([reading], [], [], DEADLINE)[0], said
        said += os.read(reading, 1 << 20).decode().replace("\r", "")
    assert said == "2 lines of the log are missing here: nobody read them\nread again\n"
    # Whoever else has it finds it as it was.
    assert not fcntl.fcntl(shared, fcntl.F_GETFL) & os.O_NONBLOCK
    os.close(shared)
    output.close()


def test_something_long_goes_as_far_as_it_can() -> None:
    reading, writing = os.pipe()
    output = Output(writing)
    capacity = fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ)
    output.emit(record("y" * (2 * capacity)))
    assert os.read(reading, 2 * capacity) == b"y" * capacity
    output.emit(record("z" * (PIECE + 1)))
    assert os.read(reading, capacity) == b"z" * (PIECE + 1) + b"\n"
    for number in (reading, writing):
        os.close(number)


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    with path.open("a") as file:
        output = Output(file.fileno())
        output.emit(record("after"))
        output.close()
    assert path.read_text() == "before\nafter\n"


@pytest.mark.parametrize("kind", ["a pipe that nobody reads", "nothing at all"])
def test_nobody_is_no_error(kind: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    if kind == "nothing at all":
        os.close(writing)
    output = Output(writing)
    output.emit(record("unheard"))
    assert output._lost == 0
    output.close()
    if kind != "nothing at all":
        os.close(writing)
