"""Properties of who waits for what, whatever becomes of the workers in between.

- Every question that is not called off has exactly one answer: its own, from whichever worker gave it first; "no device",
  which only a disconnected guest's clients hear; or "busy", which only one who has just asked hears.
- No worker is asked what another has answered, or what was called off before it came.
- A worker is told to call off only what it was asked, and once.
- Once a worker listens, nobody waits for anything that was not asked.
"""

from __future__ import annotations

import json
import select
import socket
from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hostdev import fds
from hostdev.client import Client
from hostdev.control_guests import MAX_LEFT, Guest
from hostdev.control_peer import ask_guest, ids
from hostdev.errors import CommandError
from hostdev.wire.control import ENVELOPE, MAX_ENVELOPE, Envelope, Kind
from tests import qmp_texts

INACTIVE: qmp_texts.Reply = {
    "error": {"class": "DeviceNotActive", "desc": "No balloon device has been activated"}
}
BUSY = qmp_texts.generic("the device is busy")
# The least that the kernel makes a buffer: it takes a few questions and no more.
SMALL_BUFFER = 1
# As many as fill it twice.
PEOPLE = 12


def pair() -> tuple[fds.Fd, socket.socket]:
    """The control process's end, which takes little, and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
    return fds.Fd(ours.detach()), theirs


class Worker:
    """Reads what it is asked, and answers what and when it is told to."""

    def __init__(self, channel: socket.socket, off_limits: set[int]) -> None:
        self.channel = channel
        # Values that no question to it may have.
        self._off_limits = off_limits
        self.asked: dict[int, int] = {}
        self.open: dict[int, int] = {}

    def read(self, limit: int) -> None:
        """Read at most so many envelopes."""
        for _ in range(limit):
            try:
                envelope = ENVELOPE.decode(self.channel.recv(MAX_ENVELOPE, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return
            if envelope.kind == Kind.CANCEL:
                assert envelope.id in self.asked, "called off without having been asked"
                del self.asked[envelope.id]
                self.open.pop(envelope.id, None)
                continue
            value = json.loads(envelope.text)["arguments"]["value"]
            assert value not in self._off_limits
            assert value not in self.asked.values()
            self.asked[envelope.id] = self.open[envelope.id] = value


class Person:
    """A client that asks one thing at a time."""

    def __init__(self) -> None:
        self._connection, ours = socket.socketpair()
        self.client = Client(ours)
        self.client.session.feed(b'{"execute":"qmp_capabilities"}')
        assert self.client.session.next_command() is None
        self.client.session.outgoing.clear()
        # What it waits for, and what else than the answer it may hear.
        self.value: int | None = None
        self.excuses: list[qmp_texts.Reply] = []

    def close(self) -> None:
        self._connection.close()
        self.client.connection.close()


class Succession(RuleBasedStateMachine):
    """One guest, several people, and workers one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = Guest("vm1", ids(0), lambda _event, _data: None)
        self.people = [Person() for _ in range(PEOPLE)]
        self.worker: Worker | None = None
        self.connected = False
        self.values = count(1)
        self.answered: set[int] = set()
        self.cancelled: set[int] = set()

    def teardown(self) -> None:
        """Whoever waits at the end is answered by one last worker, or hears that there is none."""
        try:
            if self.connected:
                self.successor()
                self.settle()
                assert self.guest.mask == select.POLLIN
            for person in self.people:
                self.look(person)
                assert person.value is None
        finally:
            self.disconnect()
            for person in self.people:
                person.close()

    def settle(self) -> None:
        assert self.worker is not None
        for _ in range(20):
            self.worker.read(100)
            for number in list(self.worker.open):
                self.reply(number)
            self.serve()

    def reply(self, number: int) -> None:
        assert self.worker is not None
        value = self.worker.open.pop(number)
        text = json.dumps({"value": value}).encode()
        self.worker.channel.send(ENVELOPE.encode(Envelope(Kind.RETURN, number, text)))
        self.answered.add(value)

    def look(self, person: Person) -> None:
        """At what the client has heard: nothing, or one answer to what it waits for."""
        outgoing = person.client.session.outgoing
        heard = qmp_texts.replies(bytes(outgoing))
        outgoing.clear()
        if not heard:
            return
        (answer,) = heard
        assert person.value is not None
        assert answer == {"return": {"value": person.value}} or answer in person.excuses
        person.value, person.excuses = None, []

    @invariant()
    def everybody_has_heard_at_most_what_is_due(self) -> None:
        for person in self.people:
            self.look(person)

    # What may happen

    @rule(who=st.integers(0, PEOPLE - 1))
    def ask(self, who: int) -> None:
        person = self.people[who]
        if person.value is not None:
            return
        person.value = next(self.values)
        if not self.connected:
            person.excuses = [INACTIVE]
        elif self.guest.peer is not None:
            person.excuses = [BUSY]
        person.client.session.feed(
            json.dumps({"execute": "balloon", "arguments": {"value": person.value}}).encode()
        )
        command = person.client.session.next_command()
        assert command is not None
        try:
            self.guest.ask(ask_guest(person.client, command))
        except CommandError as error:
            person.client.session.refuse(error)
        self.look(person)
        person.excuses = []

    @rule(who=st.integers(0, PEOPLE - 1))
    def leave(self, who: int) -> None:
        person = self.people[who]
        self.look(person)
        if person.value is not None:
            self.cancelled.add(person.value)
        self.guest.cancel(person.client)
        person.close()
        self.people[who] = Person()

    @precondition(lambda self: self.worker is not None)
    @rule(limit=st.integers(1, 3))
    def read(self, limit: int) -> None:
        assert self.worker is not None
        self.worker.read(limit)

    @precondition(lambda self: self.worker is not None and self.worker.open)
    @rule(last=st.booleans())
    def answer(self, last: bool) -> None:
        assert self.worker is not None
        self.reply(list(self.worker.open)[-1 if last else 0])

    @rule()
    def serve(self) -> None:
        """As the loop does."""
        peer = self.guest.peer
        if peer is None:
            return
        poll = select.poll()
        poll.register(peer.number, self.guest.mask)
        for _number, mask in poll.poll(0):
            self.guest.serve(peer, mask)

    @precondition(lambda self: self.worker is not None)
    @rule(at_once=st.booleans())
    def die(self, at_once: bool) -> None:
        """With questions unread or not, and its end seen before its successor or not."""
        assert self.worker is not None
        self.worker.channel.close()
        self.worker = None
        if at_once:
            self.successor()

    @rule()
    def successor(self) -> None:
        """Whether its predecessor has died or not."""
        if self.worker is not None:
            self.worker.read(100)
        ours, theirs = pair()
        predecessor, self.worker = self.worker, Worker(theirs, self.answered | self.cancelled)
        self.connected = True
        self.guest.connect(ours)
        if predecessor is not None:
            predecessor.channel.close()

    @rule()
    def disconnect(self) -> None:
        for person in self.people:
            self.look(person)
            person.excuses = [INACTIVE]
        self.guest.disconnect()
        for person in self.people:
            self.look(person)
            assert person.value is None
        if self.worker is not None:
            self.worker.channel.close()
        self.worker, self.connected = None, False


TestSuccession = Succession.TestCase
TestSuccession.settings = settings(deadline=None, max_examples=150, stateful_step_count=60)


def test_who_comes_later_does_not_overtake() -> None:
    """Room that has come meanwhile is for those who wait, and who leaves unasked is not called off."""
    guest = Guest("vm1", ids(0), lambda _event, _data: None)
    people = [Person() for _ in range(60)]
    ours, theirs = pair()
    first, gone = pair()
    guest.connect(first)
    gone.close()
    try:
        for value, person in enumerate(people[:-1]):
            ask(guest, person, value)
        guest.connect(ours)
        worker = Worker(theirs, set())
        worker.read(1)
        guest.cancel(people[58].client)
        assert ask(guest, people[-1], 59) == "the device is busy"
        while guest.mask & select.POLLOUT:
            worker.read(100)
            assert guest.peer is not None
            guest.serve(guest.peer, select.POLLOUT)
        worker.read(100)
        assert list(worker.asked.values()) == list(range(58))
    finally:
        guest.disconnect()
        theirs.close()
        for person in people:
            person.close()


def ask(guest: Guest, person: Person, value: int) -> str:
    """Why it could not be asked."""
    session = person.client.session
    session.feed(json.dumps({"execute": "balloon", "arguments": {"value": value}}).encode())
    command = session.next_command()
    assert command is not None
    try:
        guest.ask(ask_guest(person.client, command))
    except CommandError as error:
        return str(error)
    return ""


def test_a_worker_that_never_stops_talking_is_replaced_all_the_same() -> None:
    """It says the next thing whenever one is heard."""
    event = ENVELOPE.encode(Envelope(Kind.EVENT, 0, b'{"event": "BALLOON_CHANGE", "data": {"actual": 1}}'))
    (first, talker), (second, quiet) = pair(), pair()
    heard = []

    def tell(_event: str, data: object) -> None:
        heard.append(data)
        talker.send(event)

    guest = Guest("vm1", ids(0), tell)
    with talker, quiet:
        guest.connect(first)
        talker.send(event)
        guest.connect(second)
        assert len(heard) == MAX_LEFT
        assert guest.peer is not None
        guest.disconnect()
        assert guest.peer is None
