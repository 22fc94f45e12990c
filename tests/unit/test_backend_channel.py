"""The one message that a back end sends of its own accord, in two parts."""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Iterator

import pytest

from hostdev.backend_channel import BackendChannel
from hostdev.wire import vhost_user as wire
from hostdev.wire.vhost_user import BackendRequest


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
            assert channel.begin()
            assert not channel.is_half_sent
            assert channel.was_taken()
    assert len(caplog.records) == 1


def test_a_front_end_that_closes_between_the_parts(pair: tuple[BackendChannel, socket.socket]) -> None:
    channel, theirs = pair
    channel.begin()
    theirs.close()
    channel.finish(has_stopped=False)
    assert not channel.is_half_sent
    assert channel.was_taken()
