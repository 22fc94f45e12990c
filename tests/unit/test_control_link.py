"""The keeper's side of the control process: how often it is replaced, and that nothing waits for it."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostdev import control
from hostdev.control_link import DEATHS_PERIOD, MAX_DEATHS, ControlLink
from hostdev.driver import DEADLINE
from hostdev.fds import Fd
from hostdev.isolation import isolate
from hostdev.wire.control import ENVELOPE, Envelope, Kind


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def sleeper(channel: socket.socket, listener: socket.socket, _generation: int) -> int:
    """A control process that reads nothing and ends when it is to."""
    isolate(channel, listener)
    poll = select.poll()
    poll.register(channel, 0)
    poll.poll()
    return 0


def babbler(channel: socket.socket, listener: socket.socket, generation: int) -> int:
    """One that begins with what is no envelope."""
    channel.send(b"\x07")
    return sleeper(channel, listener, generation)


def quitter(channel: socket.socket, listener: socket.socket, generation: int) -> int:
    channel.send(ENVELOPE.encode(Envelope(Kind.QUIT, 7, b"{}")))
    return sleeper(channel, listener, generation)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        yield listener


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def link(listener: socket.socket, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[ControlLink]:
    monkeypatch.setattr(control, "start", sleeper)
    link = ControlLink(listener, clock)
    link.start()
    yield link
    link.close()
    gc.unfreeze()
    assert link.channel is None


def children() -> list[int]:
    pid = os.getpid()
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def die(link: ControlLink) -> None:
    (pid,) = children()
    os.kill(pid, signal.SIGKILL)
    assert heard(link) is None
    link.replace()


def heard(link: ControlLink) -> Envelope | None:
    """What the process says next; None for its end."""
    assert link.channel is not None
    poll = select.poll()
    poll.register(link.channel, select.POLLIN)
    assert poll.poll(DEADLINE * 1000)
    return link.receive()


def test_it_is_replaced(link: ControlLink) -> None:
    before = children()
    die(link)
    assert len(children()) == 1
    assert children() != before


def test_too_many_deaths_at_once(link: ControlLink, listener: socket.socket, clock: Clock) -> None:
    for _ in range(MAX_DEATHS):
        clock.now += DEATHS_PERIOD / MAX_DEATHS / 2
        die(link)
    die(link)
    assert (children(), link.channel, listener.fileno()) == ([], None, -1)
    with Fd(os.memfd_create("guest")) as guest:
        link.announce("vm", guest)  # there is nobody to be given it


def test_deaths_now_and_then(link: ControlLink, listener: socket.socket, clock: Clock) -> None:
    for _ in range(5 * MAX_DEATHS):
        clock.now += DEATHS_PERIOD / MAX_DEATHS + 1
        die(link)
    assert len(children()) == 1
    assert listener.fileno() >= 0


def test_one_that_does_not_read_is_killed(link: ControlLink) -> None:
    """The keeper has a front end to serve: it does not wait until there is room."""
    with Fd(os.memfd_create("guest")) as guest, Fd(os.pidfd_open(children()[0])) as ended:
        poll = select.poll()
        poll.register(ended.fileno(), select.POLLIN)
        announced = 0
        while not poll.poll(0):
            link.announce("vm", guest)
            announced += 1
            assert announced < 10000
        assert announced > 100
        assert heard(link) is None
        link.replace()
    assert len(children()) == 1


def test_one_that_says_what_is_no_envelope(link: ControlLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "start", babbler)
    link.replace()
    assert heard(link) is None


def test_what_a_quit_looks_like(link: ControlLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "start", quitter)
    link.replace()
    assert heard(link) == Envelope(Kind.QUIT, 7, b"{}")
