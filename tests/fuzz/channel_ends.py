"""Both ends of what goes between the device's processes, each with the fuzzer for its peer. Used by the target channel.

Real objects on real sockets; only the process behind a worker's link is left out.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import socket
from collections.abc import Mapping
from typing import Any

from hostdev import fds
from hostdev.client import Client
from hostdev.control_end import ControlEnd
from hostdev.control_guests import Guest as ControlGuest
from hostdev.control_peer import ask_guest, ids
from hostdev.errors import CommandError
from hostdev.estate import Estate
from hostdev.fds import Fd
from hostdev.guest import Guest, Setting
from hostdev.message_end import MAX_MESSAGE_DEATHS
from hostdev.options import Options
from hostdev.record import make_record
from hostdev.wire.channel import ANSWER, FRAME, Answer, Frame, ToKeeper
from hostdev.wire.control import ENVELOPE, Envelope, Kind
from hostdev.worker_link import WorkerLink, _pair
from tests.fuzz.descriptors import wares
from tests.fuzz.message_texts import Sent
from tests.fuzz.served import Served, copies, frame

# That are started before an input begins: to start all of them takes longer than most inputs.
RINGS = 1


class WorkerEnd:
    """A worker's end of the keeper's channel, and a keeper that keeps what it must."""

    def __init__(self, *, started: bool) -> None:
        self.estate = Estate()
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.device = Served(self.estate.record, self._theirs)
        self.number = 0
        self.is_open = True
        self._last: tuple[Frame, Answer] | None = None
        if started:
            held = self.device.set_up(wares(), RINGS)
            self.number = self.device.messages.done.number
            self.estate.held = {token: Fd(os.dup(fd.fileno()), token) for token, fd in held.items()}

    def give(self, sent: Sent, deaths: int = 0) -> None:
        """Have a message answered, by exactly one datagram; keep what the worker says that it needs."""
        if not self.is_open:
            return
        self.number += 1
        self.estate.arrived = copies(self.number, sent)
        one = frame(self.number, sent, deaths)
        answer = self._ask(one, self.estate.arrived)
        self._last = one, answer
        self.estate.settle(answer.held if answer.kind == ToKeeper.HOLDING else None)
        self._judge(answer, deaths)

    def repeat(self) -> None:
        """Give the last message again, as to a successor: it has been done, and its answer is repeated."""
        if self.is_open and self._last is not None:
            one, before = self._last
            counts = dict(self.device.parts.metrics.samples)
            answer = self._ask(one, ())
            assert answer.reply == before.reply
            assert dict(self.device.parts.metrics.samples) == counts

    def _ask(self, one: Frame, descriptors: list[Fd] | tuple[()]) -> Answer:
        fds.send(self._ours, FRAME.encode(one), descriptors)
        assert self.device.messages.serve()
        data = self._ours.recv(1 << 16, socket.MSG_DONTWAIT)
        with contextlib.suppress(BlockingIOError):
            raise AssertionError(f"a second answer: {self._ours.recv(1 << 16, socket.MSG_DONTWAIT)!r}")
        return ANSWER.decode(data)

    def _judge(self, answer: Answer, deaths: int) -> None:
        assert answer.kind in (ToKeeper.ANSWER, ToKeeper.HOLDING, ToKeeper.CLOSE)
        if answer.kind == ToKeeper.CLOSE:
            self.is_open = False
            return
        assert sorted(self.estate.held) == sorted({*self.device.session.held()})
        assert not self.device.balloon.inert or deaths >= MAX_MESSAGE_DEATHS or self._was_inert
        self._was_inert = self.device.balloon.inert

    _was_inert = False

    def close(self) -> None:
        """End both sides."""
        self.device.close()
        self._ours.close()
        self._theirs.close()
        self.estate.close()


class _PairLink(WorkerLink):
    """A link whose worker is the fuzzer. It ends when it is told to."""

    def __init__(self) -> None:
        self.channel, self.worker = _pair()
        self.control = None
        self.pid = 0
        self.pidfd = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._stopped_since = None
        self.is_killed = False

    def kill(self) -> None:
        self.is_killed = True
        self.end()

    def end(self) -> None:
        """The process has ended."""
        self.worker.close()
        os.eventfd_write(self.pidfd.fileno(), 1)

    def bury(self, *, expected: bool = False) -> bool:
        self._close()
        self.pidfd.close()
        return True

    @property
    def had_bus_error(self) -> bool:
        return False


class KeeperEnd:
    """The keeper's side of a guest, between a front end and a worker that says whatever it likes."""

    def __init__(self) -> None:
        self.front, theirs = socket.socketpair()
        self._selector = selectors.PollSelector()
        self._ended = False
        setting = Setting("guest", Options(), self._selector, None, self._note_end)
        self.guest = Guest(theirs, setting)
        self.link = self._hire()
        self.guest._front.watch()

    def _note_end(self, _guest: Guest) -> None:
        assert not self._ended, "it ends twice"
        self._ended = True

    def _hire(self) -> _PairLink:
        link = _PairLink()
        self.guest._post._adopt(link)
        return link

    def ask(self, sent: Sent) -> None:
        """The front end sends a message."""
        if self.guest.is_served and not self.guest._front.outgoing:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                fds.send(self.front, sent.stream, sent.fds)
            self.turn()

    def say(self, data: bytes) -> None:
        """The worker says something, and the front end reads what comes of it."""
        if self.guest.is_served and not self.link.is_killed:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                fds.send(self.link.worker, data)
            self.turn()
            assert not any(fd.closed for fd in self.guest.estate.known.values())
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            self.front.recv(1 << 16, socket.MSG_DONTWAIT)

    def turn(self) -> None:
        """Have the keeper act until there is nothing to do, but for a worker that has ended."""
        for _ in range(20):
            ready = [key for key, _mask in self._selector.select(0) if key.fileobj is not self.link.pidfd]
            if not ready:
                return
            for key in ready:
                key.data()

    def close(self) -> None:
        """The front end goes, and the worker ends."""
        self.front.close()
        self.guest.end()
        if not self.link.is_killed:
            self.link.end()
        self.guest._post._bury(self.link)
        assert self._ended, "the guest is never seen off"
        self._selector.close()


class CommandEnd:
    """A worker's end of the pair to the control process, which says whatever it likes."""

    def __init__(self) -> None:
        self._record = make_record()
        ours, self._channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._keeper = ours
        self.device = Served(self._record, self._channel)
        self.device.set_up(wares(), RINGS)
        self._end = ControlEnd(theirs, self.device.parts.commands, select.poll())

    def say(self, data: bytes) -> None:
        """Send a datagram, and have it acted on as the worker does: what is raised is answered, and nothing else is."""
        self._ours.send(data)
        envelope = self._end.receive(select.POLLIN)
        if envelope is None:
            return
        commands = self.device.parts.commands
        try:
            commands.handle(envelope)
        except Exception:  # noqa: BLE001  (as worker.py)
            commands.fail(envelope.id)
        self.device.now += 2
        for _ in range(8):
            commands.tick()
        self._end.flush()
        self._read()

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                envelope = ENVELOPE.decode(self._ours.recv(1 << 16, socket.MSG_DONTWAIT))
                assert envelope.kind in (Kind.RETURN, Kind.ERROR, Kind.EVENT)

    def close(self) -> None:
        """End it."""
        self._ours.close()
        while self._end.number is not None:
            self._end.receive(select.POLLIN)
        self.device.close()
        for each in (self._keeper, self._channel):
            each.close()
        self._record.close()


class ClientEnd:
    """The control process's end of such a pair, with a worker that says whatever it likes, and one client."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self.client = Client(self._near)
        self.client.session.feed(b'{"execute":"qmp_capabilities"}')
        assert self.client.session.next_command() is None
        self._guest = ControlGuest("guest", ids(0), self._tell)
        ours, self._worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._guest.connect(Fd(ours.detach()))
        self.number = 0

    def _tell(self, event: str, data: Mapping[str, Any]) -> None:
        self.client.session.tell(event, data, 0)

    def ask(self) -> None:
        """The client asks something, unless it waits."""
        session = self.client.session
        session.outgoing.clear()
        session.feed(b'{"execute":"query-status"}')
        command = session.next_command()
        if command is not None:
            self.number += 1
            with contextlib.suppress(CommandError):
                self._guest.ask(ask_guest(self.client, command))

    def say(self, data: bytes) -> None:
        """The worker sends a datagram."""
        peer = self._guest.peer
        if peer is not None:
            self._worker.send(data)
            self._guest.serve(peer, select.POLLIN)

    def answer(self) -> None:
        """The worker answers what was asked last."""
        self.say(ENVELOPE.encode(Envelope(Kind.RETURN, self.number, b"{}")))

    def close(self) -> None:
        """The worker ends, the guest goes: the client is not left waiting."""
        self._worker.close()
        self._guest.disconnect()
        assert not self.client.session.outstanding
        self._near.close()
        self._far.close()
