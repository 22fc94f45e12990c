"""The owner of descriptors, messages that carry them, and eventfds that never block."""

from __future__ import annotations

import fcntl
import os
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
    data, received = fds.receive(pair[1], 10)
    assert data == b"abc"
    assert len(received) == 2
    assert all(fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in received)
    assert os.eventfd_read(received[0].fileno()) == 5
    fds.close_all(received)
    assert all(fd.closed for fd in received)


def test_receiving_never_blocks(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(BlockingIOError):
        fds.receive(pair[0], 1)
    pair[1].close()
    assert fds.receive(pair[0], 1) == (b"", [])


def test_sending_never_blocks(pair: tuple[socket.socket, socket.socket]) -> None:
    def fill() -> None:
        while fds.send(pair[0], bytes(65536)):
            pass

    with pytest.raises(BlockingIOError):
        fill()


def test_more_descriptors_than_there_is_room_for_leak_none(pair: tuple[socket.socket, socket.socket]) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with eventfd() as sent:
        fds.send(pair[0], b"x", [sent] * 100)
    _data, received = fds.receive(pair[1], 1)
    assert len(received) >= fds.MAX_RECEIVED  # so that the count shows it
    fds.close_all(received)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


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
