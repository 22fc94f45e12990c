"""The one message that a back end sends of its own accord, in two parts."""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from hostdev.backend_channel import BackendChannel
from hostdev.driver import DEADLINE
from hostdev.wire import vhost_user as wire
from hostdev.wire.vhost_user import BackendRequest

# The gap that once lost a wake-up was met every thousandth time.
ROUNDS = 4000


@pytest.fixture
def pair() -> Iterator[tuple[BackendChannel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = BackendChannel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def is_readable(channel: BackendChannel) -> bool:
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def test_the_second_part_goes_when_the_first_was_taken(pair: tuple[BackendChannel, socket.socket]) -> None:
    channel, theirs = pair
    assert channel.begin()
    assert channel.is_half_sent
    assert not channel.was_taken()
    assert not is_readable(channel)
    first = theirs.recv(64)
    assert len(first) == 1
    assert is_readable(channel)
    assert channel.was_taken()
    assert not is_readable(channel)  # or the worker would wake up again and again
    channel.finish(has_stopped=False)
    header = wire.HEADER.decode(first + theirs.recv(64))
    assert header == wire.Header(BackendRequest.CONFIG_CHANGE_MSG, wire.VERSION, 0)


def test_to_a_front_end_that_has_stopped_it_means_nothing(pair: tuple[BackendChannel, socket.socket]) -> None:
    channel, theirs = pair
    channel.begin()
    channel.finish(has_stopped=True)
    header = wire.HEADER.decode(theirs.recv(64))
    assert header.size == 0
    assert header.flags == wire.VERSION
    assert 32 < header.request < 1 << 31


def test_a_front_end_that_does_not_read(pair: tuple[BackendChannel, socket.socket]) -> None:
    """There is never more than one message on its way, so there is always room for the second part."""
    channel, theirs = pair
    channel.begin()
    channel.finish(has_stopped=False)
    assert not channel.begin()
    assert not channel.is_half_sent
    assert len(theirs.recv(64)) == wire.HEADER_SIZE
    assert is_readable(channel)
    assert channel.begin()


def test_a_front_end_that_has_closed_is_said_once(
    pair: tuple[BackendChannel, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    channel, theirs = pair
    theirs.close()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not channel.begin()
            assert not channel.is_half_sent
            assert channel.is_broken
    assert len(caplog.records) == 1


def test_a_front_end_that_closes_between_the_parts(pair: tuple[BackendChannel, socket.socket]) -> None:
    channel, theirs = pair
    channel.begin()
    theirs.close()
    channel.finish(has_stopped=False)
    assert not channel.is_half_sent
    assert channel.is_broken


def test_a_second_part_that_cannot_be_sent_ends_the_channel(
    pair: tuple[BackendChannel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU waits for it under its big lock: it must find an end, if it cannot have the rest."""
    channel, theirs = pair
    channel.begin()
    monkeypatch.setattr(channel, "_send", lambda _data: False)
    channel.finish(has_stopped=False)
    assert len(theirs.recv(64)) == 1
    assert theirs.recv(64) == b""
    assert channel.is_broken
    assert not channel.begin()


def test_no_wake_up_is_lost_whoever_reads_when(pair: tuple[BackendChannel, socket.socket]) -> None:
    """A reader on another CPU, some thousand times: who waits for the reading is woken, and then sees that it was."""
    channel, theirs = pair

    def read_all() -> None:
        for _ in range(ROUNDS):
            assert len(theirs.recv(wire.HEADER_SIZE, socket.MSG_WAITALL)) == wire.HEADER_SIZE

    reader = threading.Thread(target=read_all)
    reader.start()
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    for _ in range(ROUNDS):
        while not channel.begin():
            assert poll.poll(DEADLINE * 1000)
        while not channel.was_taken():
            assert poll.poll(DEADLINE * 1000)
        channel.finish(has_stopped=False)
    reader.join()


CHANGE = wire.message(BackendRequest.CONFIG_CHANGE_MSG, 0, b"")


@pytest.mark.parametrize("sent", [b"", CHANGE[:1], CHANGE], ids=["nothing", "first part", "both parts"])
def test_a_stream_that_a_dead_process_left_is_brought_into_step(
    pair: tuple[BackendChannel, socket.socket], sent: bytes
) -> None:
    """However far it had come, what is sent makes whole messages of it that nobody knows, and the next one is read as such."""
    channel, theirs = pair
    channel._socket.sendall(sent)
    channel.recover()
    if not channel.was_taken():
        stream = theirs.recv(64)
    assert channel.begin()
    stream += theirs.recv(64)
    channel.finish(has_stopped=False)
    stream += theirs.recv(64)
    messages = []
    while stream:
        header = wire.HEADER.decode(stream[: wire.HEADER_SIZE])
        assert not header.flags & (wire.FLAG_NEED_REPLY | wire.FLAG_REPLY)
        assert header.flags & wire.VERSION_MASK == wire.VERSION
        assert header.size <= 1
        messages.append(header.request)
        assert len(stream) >= wire.HEADER_SIZE + header.size
        stream = stream[wire.HEADER_SIZE + header.size :]
    change = [BackendRequest.CONFIG_CHANGE_MSG]
    *before, unknown, last = messages
    assert before == (change if sent == CHANGE else [])
    assert unknown > 1 << 16
    assert [last] == change
