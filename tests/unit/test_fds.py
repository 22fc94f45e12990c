"""The owner of descriptors, messages that carry them, and eventfds that never block."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from hostdev import fds
from hostdev.fds import Fd


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def eventfd(value: int = 0) -> Fd:
    return Fd(os.eventfd(value, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def test_closing_forgets_the_number() -> None:
    fd = eventfd()
    number = fd.fileno()
    fd.close()
    assert fd.closed
    assert not is_open(number)
    with pytest.raises(ValueError, match="closed"):
        fd.fileno()
    reused = os.dup2(2, number)
    fd.close()  # must not close what has the number now
    assert is_open(reused)
    os.close(reused)


def test_detaching_gives_the_number_away() -> None:
    fd = eventfd()
    number = fd.detach()
    fd.close()
    assert is_open(number)
    os.close(number)


def test_a_dropped_owner_closes() -> None:
    fd = eventfd()
    number = fd.fileno()
    del fd
    assert not is_open(number)


def test_descriptors_travel_and_are_close_on_exec(pair: tuple[socket.socket, socket.socket]) -> None:
    with eventfd(5) as sent:
        assert fds.send(pair[0], b"abc", [sent, sent]) == 3
    data, received, curtailed = fds.receive(pair[1], 10)
    assert (data, len(received), curtailed) == (b"abc", 2, False)
    assert all(fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in received)
    assert os.eventfd_read(received[0].fileno()) == 5
    fds.close_all(received)
    assert all(fd.closed for fd in received)


def test_receiving_never_blocks(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(BlockingIOError):
        fds.receive(pair[0], 1)
    pair[1].close()
    assert fds.receive(pair[0], 1) == fds.Received(b"", [])


def test_sending_never_blocks(pair: tuple[socket.socket, socket.socket]) -> None:
    def fill() -> None:
        while fds.send(pair[0], bytes(65536)):
            pass

    with pytest.raises(BlockingIOError):
        fill()


def count() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.mark.parametrize("number", [fds.MAX_RECEIVED + 1, 253])
def test_more_descriptors_than_there_is_room_for(
    pair: tuple[socket.socket, socket.socket], number: int
) -> None:
    """None is kept, the bytes are there, and what comes next is whole."""
    before = count()
    with eventfd() as sent:
        fds.send(pair[0], b"x", [sent] * number)
        fds.send(pair[0], b"y", [sent] * fds.MAX_RECEIVED)
    assert fds.receive(pair[1], 1) == fds.Received(b"x", [], curtailed=True)
    assert count() == before
    data, received, curtailed = fds.receive(pair[1], 1)
    assert (data, len(received), curtailed) == (b"y", fds.MAX_RECEIVED, False)
    fds.close_all(received)
    assert count() == before


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_receiver_at_its_limit_of_open_files(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """Room for some of three is as good as room for none."""
    before = count()
    with eventfd() as sent:
        fds.send(pair[0], b"x", [sent] * 3)
    with limit_of_files(left):
        assert fds.receive(pair[1], 1) == fds.Received(b"x", [], curtailed=True)
    assert count() == before


@contextlib.contextmanager
def limit_of_files(left: int) -> Iterator[None]:
    """Leave this process room for so many more. Below the limit all are taken, so that gaps are no way around it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        numbers = [os.dup(2) for _ in range(40)]
        for number in numbers:
            stack.callback(os.close, number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(numbers) + 1 + left, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        yield


def test_what_is_an_eventfd() -> None:
    with eventfd() as fd:
        assert fds.is_eventfd(fd)
    for number in (*os.pipe(), os.memfd_create("anon_inode:[eventfd]"), os.open("/dev/null", os.O_RDWR)):
        with Fd(number) as fd:
            assert not fds.is_eventfd(fd)


@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK])
def test_events_are_taken_and_given_without_blocking(flags: int) -> None:
    with Fd(os.eventfd(0, flags | os.EFD_CLOEXEC)) as fd:
        assert not fds.drain_event(fd)
        assert fds.signal_event(fd)
        assert fds.signal_event(fd)
        assert fds.drain_event(fd)
        assert not fds.drain_event(fd)


def test_a_full_counter_is_left_alone() -> None:
    with Fd(os.eventfd(0, os.EFD_CLOEXEC)) as fd:
        os.eventfd_write(fd.fileno(), 2**64 - 2)
        assert not fds.signal_event(fd)
        assert fds.drain_event(fd)
        assert fds.signal_event(fd)
