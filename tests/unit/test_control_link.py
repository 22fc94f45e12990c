"""The keeper's side of the control process: how often it is replaced, and that nothing waits for it."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import json
import os
import select
import selectors
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostdev import control, control_link, fds
from hostdev.child import Child
from hostdev.control_link import (
    BURIAL_SECONDS,
    DEATHS_PERIOD,
    MAX_DEATHS,
    RETRY_SECONDS,
    SILENCE_SECONDS,
    ControlLink,
)
from hostdev.driver import DEADLINE
from hostdev.fds import Fd
from hostdev.isolation import isolate
from hostdev.wire.control import ENVELOPE, MAX_ENVELOPE, Envelope, Kind
from tests.control_process import ROOM


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def sleeper(channel: socket.socket, listener: socket.socket, _generation: int, _confined: str) -> int:
    """A control process that reads nothing and ends when it is to."""
    isolate(channel, listener)
    poll = select.poll()
    poll.register(channel, 0)
    poll.poll()
    return 0


def babbler(channel: socket.socket, listener: socket.socket, generation: int, confined: str) -> int:
    """One that begins with what is no envelope."""
    channel.send(b"\x07")
    return sleeper(channel, listener, generation, confined)


def quitter(channel: socket.socket, listener: socket.socket, generation: int, confined: str) -> int:
    channel.send(ENVELOPE.encode(Envelope(Kind.QUIT, 7, b"{}")))
    return sleeper(channel, listener, generation, confined)


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
    for patience in ("KILLED_SECONDS", "END_DEADLINE"):  # how long a process takes is not what is looked at
        monkeypatch.setattr(control_link, patience, DEADLINE)
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


def fill(link: ControlLink, guest: Fd | None = None) -> list[str]:
    """Announce places until there is no room. Their names: the last one waits."""
    assert link.channel is not None
    link.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
    names: list[str] = []
    while not link.is_waiting:
        names.append(f"vm{len(names)}")
        link.announce(names[-1], guest)
        assert len(names) < 10000
    return names


def test_one_that_does_not_read_is_killed(
    link: ControlLink, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The keeper has a front end to serve: it does not wait until there is room. Killed once, in its time, said once."""
    with Fd(os.memfd_create("guest")) as guest, Fd(os.pidfd_open(children()[0])) as ended:
        assert len(fill(link, guest)) > 100
        assert link.due() == clock.now + SILENCE_SECONDS
        clock.now += SILENCE_SECONDS - 1
        link.announce("vm", guest)
        link.tick()
        assert not has_ended(ended, 0)
        clock.now += 1
        link.tick()
        assert has_ended(ended, DEADLINE)
        for _ in range(1000):
            link.announce("vm", guest)
            link.tick()
        assert (link.due(), link.is_waiting) == (None, False)
        assert heard(link) is None
        link.replace()
    assert len(children()) == 1
    assert len([record for record in caplog.records if "does not read" in record.message]) == 1


def has_ended(pidfd: Fd, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd.fileno(), select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@contextlib.contextmanager
def reads_ourselves(link: ControlLink) -> Iterator[socket.socket]:
    """The other end is ours from now on: the process at it has none."""
    assert link.channel is not None
    link.channel.close()
    link.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        yield theirs


def read_all(link: ControlLink, theirs: socket.socket) -> list[tuple[Envelope, list[Fd]]]:
    """All that is sent, with room made as it is read."""
    read: list[tuple[Envelope, list[Fd]]] = []
    while True:
        try:
            data, received, _curtailed = fds.receive(theirs, MAX_ENVELOPE)
        except BlockingIOError:
            if not link.is_waiting:
                return read
            link.flush()
            continue
        read.append((ENVELOPE.decode(data), received))


def test_what_there_is_no_room_for_goes_later(link: ControlLink) -> None:
    """A place waits once, as it is now; an answer comes after what was announced before it."""
    with reads_ourselves(link) as theirs, Fd(os.memfd_create("guest")) as guest:
        names = fill(link)
        dead = Fd(os.memfd_create("guest"))
        link.announce("served", None)
        link.announce("gone", guest)
        link.answer(Envelope(Kind.RETURN, 5, b"{}"))
        link.announce("dead", dead)
        link.withdraw("gone")
        for _ in range(100):
            link.announce("served", guest)
        dead.close()
        read = read_all(link, theirs)
        last = [
            (envelope.kind, envelope.text or envelope.id, len(got)) for envelope, got in read[len(names) :]
        ]
        assert [envelope.text.decode() for envelope, _got in read[: len(names)]] == names
        assert last == [
            (Kind.GUEST, b"served", 1),
            (Kind.GONE, b"gone", 0),
            (Kind.RETURN, b"{}", 0),
            (Kind.GUEST, b"dead", 0),
        ]
        assert link.due() is None


def test_one_that_reads_now_and_then_lives(
    link: ControlLink, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with reads_ourselves(link) as theirs:
        for _ in range(5):
            fill(link)
            clock.now += SILENCE_SECONDS
            read_all(link, theirs)
            link.tick()
    assert "killing" not in caplog.text


@pytest.mark.parametrize("number", [errno.ETOOMANYREFS, errno.ENOBUFS])
def test_no_room_for_descriptors(
    link: ControlLink, clock: Clock, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The channel is as good as ever, so there is nothing to wait for but time."""
    with reads_ourselves(link) as theirs:
        with monkeypatch.context() as patch:
            patch.setattr(fds, "send", functools.partial(fail, number))
            link.announce("vm", None)
        assert (link.wanted, link.due()) == (0, clock.now + RETRY_SECONDS)
        link.tick()
        assert link.is_waiting
        clock.now += RETRY_SECONDS
        link.tick()
        assert (link.wanted, link.due()) == (selectors.EVENT_READ, None)
        assert [envelope.text for envelope, _none in read_all(link, theirs)] == [b"vm"]


def fail(number: int, *_arguments: object) -> int:
    raise OSError(number, os.strerror(number))


def test_an_answer_that_is_too_long(link: ControlLink) -> None:
    with reads_ourselves(link) as theirs:
        link.answer(Envelope(Kind.RETURN, 3, b" " * MAX_ENVELOPE))
        ((envelope, _none),) = read_all(link, theirs)
        assert (envelope.kind, envelope.id) == (Kind.ERROR, 3)
        assert "too many guests" in json.loads(envelope.text)["desc"]


def test_answers_are_owed_to_the_end(link: ControlLink) -> None:
    """Announcements are not: who ends does not say what there is."""
    with reads_ourselves(link) as theirs:
        names = fill(link)
        link.answer(Envelope(Kind.RETURN, 5, b"{}"))
        reader = os.fork()
        if not reader:
            os._exit(int(last_of(theirs) != Envelope(Kind.RETURN, 5, b"{}")))
        link.close()
        assert os.waitpid(reader, 0)[1] == 0
        assert len(names) > 100


def last_of(channel: socket.socket) -> Envelope | None:
    """Read up to the answer."""
    envelope = None
    while envelope is None or envelope.kind != Kind.RETURN:
        envelope = ENVELOPE.decode(channel.recv(MAX_ENVELOPE))
    return envelope


def test_one_that_is_killed_and_does_not_end(
    link: ControlLink, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may not let go of it: it is buried when it does, and nobody waits."""
    (before,) = children()
    with monkeypatch.context() as patch:
        patch.setattr(Child, "has_ended", lambda _child, _seconds=0.0: False)
        link.replace()
    assert before in children()
    assert link.due() == clock.now + BURIAL_SECONDS
    with Fd(os.pidfd_open(before)) as ended:
        assert has_ended(ended, DEADLINE)
    clock.now += BURIAL_SECONDS
    link.tick()
    assert children() == [link.pid]
    assert link.due() is None


def test_one_that_says_what_is_no_envelope(link: ControlLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "start", babbler)
    link.replace()
    assert heard(link) is None


def test_what_a_quit_looks_like(link: ControlLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "start", quitter)
    link.replace()
    assert heard(link) == Envelope(Kind.QUIT, 7, b"{}")
