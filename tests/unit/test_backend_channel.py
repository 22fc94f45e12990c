"""The one message that a back end sends of its own accord."""

from __future__ import annotations

import logging
import socket

import pytest

from hostdev.backend_channel import BackendChannel
from hostdev.wire import vhost_user as wire
from hostdev.wire.vhost_user import BackendRequest


def test_the_message() -> None:
    ours, theirs = socket.socketpair()
    channel = BackendChannel(ours)
    assert channel.tell_config_change()
    header = wire.HEADER.decode(theirs.recv(64))
    assert header == wire.Header(BackendRequest.CONFIG_CHANGE_MSG, wire.VERSION, 0)
    channel.close()
    theirs.close()


def test_a_front_end_that_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    channel = BackendChannel(ours)
    sent = 0
    while channel.tell_config_change():
        sent += 1
    while sent:
        assert len(theirs.recv(wire.HEADER_SIZE, socket.MSG_WAITALL)) == wire.HEADER_SIZE
        sent -= 1
    assert channel.tell_config_change()
    channel.close()
    theirs.close()


def test_a_front_end_that_has_closed_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    channel = BackendChannel(ours)
    theirs.close()
    with caplog.at_level(logging.WARNING):
        assert channel.tell_config_change()
        assert channel.tell_config_change()
    assert len(caplog.records) == 1
    channel.close()
