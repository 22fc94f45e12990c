"""The worker's loop when something of ours goes wrong: it answers, becomes inert, and goes on."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Iterator

import pytest

from hostdev.errors import RingError
from hostdev.options import Options, Start
from hostdev.rings import Step
from hostdev.wire import vhost_user as wire
from hostdev.wire.channel import Frame, ToKeeper, ToWorker
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, Request
from hostdev.worker import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        worker = Worker(theirs, Options())
        yield worker
        worker.session.close()


def test_its_time_to_take_over_ends_with_that(worker: Worker) -> None:
    """Or it would be killed in its first wait, for a front end that has nothing to say."""
    worker.take_over(Start())
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def fail(*_arguments: object, **_options: object) -> None:
    raise ZeroDivisionError("a defect of ours")


@pytest.mark.parametrize("request_", [Request.GET_FEATURES, Request.GET_VRING_BASE, Request.GET_CONFIG])
def test_an_error_in_a_message_is_answered(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, request_: Request
) -> None:
    monkeypatch.setattr(worker.session, "handle", fail)
    with caplog.at_level(logging.ERROR):
        worker._messages.handle(Frame(ToWorker.MESSAGE, 0, 1, wire.message(request_, 0, bytes(8))), [])
    answer = worker._messages.answer()
    assert answer.kind == ToKeeper.HOLDING
    assert wire.HEADER.decode(answer.reply[: wire.HEADER_SIZE]).request == request_
    assert worker.balloon.inert
    assert "a defect of ours" in caplog.text


def test_a_broken_stream_is_no_defect(worker: Worker) -> None:
    header = wire.HEADER.encode(wire.Header(Request.SET_OWNER, 2 | FLAG_NEED_REPLY, 0))
    worker._messages.handle(Frame(ToWorker.MESSAGE, 0, 1, header), [])
    assert worker._messages.answer().kind == ToKeeper.CLOSE
    assert not worker.balloon.inert


def test_an_error_in_a_ring_is_tried_once_more(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, inert, so that the chain gets its answer; not for ever, or the loop would spin."""
    monkeypatch.setattr(worker.balloon, "service", fail)
    assert worker._step(0) == Step(returned=False, more=True)
    assert worker.balloon.inert
    assert worker._step(0) == Step(returned=False, more=False)


def test_a_broken_ring_is_the_guests_fault(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_index: int) -> Step:
        raise RingError("ring 0 is broken")

    monkeypatch.setattr(worker.balloon, "service", broken)
    assert worker._step(0) == Step(returned=False, more=False)
    assert not worker.balloon.inert
