"""Accepting: who is trusted, and that a listener whose accept() fails is left alone for a moment."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostdev import acceptor
from hostdev.acceptor import PAUSE, Acceptor, is_trusted, peer_of
from tests.clock import Clock


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        yield listener


def test_whom_a_socket_comes_from(listener: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(listener.getsockname())
        connection = Acceptor(listener, "client").accept()
        assert connection is not None
        with connection:
            assert peer_of(connection).uid == os.geteuid()


def test_a_connection_that_another_was_faster_to_accept(listener: socket.socket) -> None:
    """As where an inherited listener is shared: accept() must not wait for the next one."""
    assert Acceptor(listener, "client").accept() is None


def test_who_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert [uid for uid in (0, 1, 999, 1000, 1001, 65534) if is_trusted(uid)] == [0, 1000]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert [uid for uid in (0, 1, 1000) if is_trusted(uid)] == [0]


def test_a_stranger_is_turned_away(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor, "is_trusted", lambda _uid: False)
    door = Acceptor(listener, "client")
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(listener.getsockname())
                assert door.accept() is None
                assert client.recv(1) == b""
    # At the first, second and fourth.
    assert len(caplog.messages) == 3
    assert door.pause() is None


@pytest.mark.parametrize(
    "code",
    [errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED],
    ids=lambda code: errno.errorcode[code],
)
def test_case_46_the_host_has_no_room_for_a_connection(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """Of any process, not of ours: a few lines, a pause each time, and who waits is accepted once there is."""

    class Refusing(socket.socket):
        lacks = True

        def accept(self) -> tuple[socket.socket, object]:
            if self.lacks:
                raise OSError(code, os.strerror(code))
            return super().accept()

    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Refusing(fileno=os.dup(listener.fileno())) as refusing, socket.socket(socket.AF_UNIX) as client:
        client.connect(listener.getsockname())
        door = Acceptor(refusing, "front end")
        for _ in range(8):
            assert door.accept() is None
            assert door.pause() == PAUSE
            now += PAUSE
            assert door.pause() is None
        # At the first, second, fourth and eighth.
        assert len(caplog.messages) == 4
        assert caplog.messages[0] == f"no front end can be accepted: {os.strerror(code)}: trying again in 1 s"
        refusing.lacks = False
        connection = door.accept()
        assert connection is not None
        connection.close()


def test_a_failure_pauses(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With no descriptor left; who waits in the backlog is accepted once there is."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    door = Acceptor(listener, "client")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(listener.getsockname())
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with open(os.devnull) as file:  # noqa: PTH123
            first_free = file.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
        try:
            assert door.accept() is None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        clock.now += PAUSE / 4
        assert door.pause() == PAUSE * 3 / 4
        assert os.strerror(errno.EMFILE) in caplog.text
        clock.now += PAUSE * 3 / 4
        assert door.pause() is None
        connection = door.accept()
        assert connection is not None
        connection.close()
