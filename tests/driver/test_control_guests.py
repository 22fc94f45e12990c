"""Several guests behind one control process, and workers that are replaced under them.

The test is the keeper and says who serves which guest; workers are FakeWorkers, which answer when they are told to.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hostdev.driver import DEADLINE
from hostdev.schema import COMMANDS, Place
from hostdev.wire.control import ENVELOPE, Envelope, Kind
from tests import qmp_texts
from tests.control_process import (
    ANSWERS,
    GUEST,
    ROOM,
    ControlProcess,
    FakeWorker,
    QmpSocket,
    exchange,
    gets_on,
    state,
)
from tests.device_program import descriptors, wait_for

pytestmark = pytest.mark.usefixtures("nothing_is_left")

CONNECTED_NOT = {"return": {"connected": False}}
INACTIVE = {"error": {"class": "DeviceNotActive", "desc": "No balloon device has been activated"}}
SEVERAL = qmp_texts.generic('several guests are served: name one, e.g. "guest": "vm1"')
# What fills a pair: three of these do.
LARGE: dict[str, Any] = {"path": "x", "property": "y"}
LARGE_VALUE = "x" * 60000


@dataclass
class Scene:
    """A worker, three clients, and workers that come after it."""

    process: ControlProcess
    worker: FakeWorker
    clients: list[QmpSocket]
    new_worker: Callable[[], FakeWorker]

    def ask_sizes(self) -> dict[int, int]:
        """Each client sets a size of its own, in turn. The ids of their questions."""
        asked = {}
        for size, client in enumerate(self.clients):
            client.send("balloon", value=size)
            number, command = self.worker.receive()
            assert command["arguments"] == {"value": size}
            asked[size] = number
        return asked

    def die(self) -> None:
        """The worker dies, and the control process has let go of the pair."""
        before = len(descriptors(self.process.pid))
        self.worker.close()
        wait_for(lambda: len(descriptors(self.process.pid)) == before - 1, "the pair's end")


@pytest.fixture
def scene(process: ControlProcess, worker: FakeWorker) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:

        def new_worker() -> FakeWorker:
            successor = FakeWorker()
            stack.callback(successor.close)
            return successor

        clients = [stack.enter_context(process.connect()) for _ in range(3)]
        for client in clients:
            gets_on(client)
        yield Scene(process, worker, clients, new_worker)


def hears_once(client: QmpSocket, answer: dict[str, Any]) -> None:
    """This answer and no other: the next is that to another command."""
    assert client.answer() == answer
    gets_on(client)


def hears_nothing(client: QmpSocket) -> None:
    """So far."""
    poll = select.poll()
    poll.register(client.connection, select.POLLIN)
    assert poll.poll(50) == []


# Successors


def test_a_successor_is_asked_what_is_open(scene: Scene) -> None:
    """In the order in which it was asked, under ids that are nobody else's."""
    asked = scene.ask_sizes()
    scene.worker.returns(asked[1], {"by": "the first"})
    hears_once(scene.clients[1], {"return": {"by": "the first"}})
    scene.die()
    successor = scene.new_worker()
    scene.process.connect_guest(successor)
    again = [successor.receive() for _ in range(2)]
    assert [command["arguments"]["value"] for _number, command in again] == [0, 2]
    assert len({number for number, _command in again}) == 2
    for number, command in reversed(again):
        successor.returns(number, command["arguments"])
    for size in (0, 2):
        hears_once(scene.clients[size], {"return": {"value": size}})
    assert not successor.is_asked()


@pytest.mark.parametrize("unread", [False, True], ids=["all read", "one unread"])
@pytest.mark.parametrize("at_once", [False, True], ids=["later", "at once"])
def test_an_answer_that_lies_there_when_the_worker_dies(scene: Scene, unread: bool, at_once: bool) -> None:
    """Answer, event, end and successor may all come together; a worker with a question unread resets its pair."""
    successor = scene.new_worker()
    scene.clients[0].send("balloon", value=0)
    number, _command = scene.worker.receive()
    scene.clients[1].send("balloon", value=1)
    wait_for(scene.worker.is_asked, "the second question")
    if not unread:
        scene.worker.receive()
    with scene.process.stopped():
        scene.worker.returns(number, {"by": "the dead"})
        scene.worker.tell("BALLOON_CHANGE", {"actual": 5})
        scene.worker.close()
        if at_once:
            scene.process.connect_guest(successor)
    hears_once(scene.clients[0], {"return": {"by": "the dead"}})
    for client in scene.clients[1:]:
        assert client.event()["data"] == {"actual": 5, "guest": GUEST}
    if not at_once:
        hears_nothing(scene.clients[1])
        scene.process.connect_guest(successor)
    number, command = successor.receive()
    assert command["arguments"] == {"value": 1}
    successor.returns(number, {"by": "the successor"})
    hears_once(scene.clients[1], {"return": {"by": "the successor"}})
    assert not successor.is_asked()


def test_a_worker_that_is_replaced_alive(scene: Scene) -> None:
    """What it has said is taken; what it would say is not: its pair is closed."""
    asked = scene.ask_sizes()
    successor = scene.new_worker()
    with scene.process.stopped():
        scene.worker.returns(asked[2], {"by": "the first"})
        scene.process.connect_guest(successor)
    hears_once(scene.clients[2], {"return": {"by": "the first"}})
    for _ in range(2):
        successor.serve()
    for size in range(2):
        hears_once(scene.clients[size], {"return": {}})
    with pytest.raises(BrokenPipeError):
        scene.worker.returns(asked[0], {"too": "late"})


def test_questions_between_two_workers(scene: Scene) -> None:
    scene.die()
    with scene.process.connect() as another:
        for name, client in zip(("query-status", "balloon", "query-balloon"), scene.clients, strict=True):
            client.send(name, **({"value": 1} if name == "balloon" else {}))
            gets_on(another)  # what is asked after this is heard after it
            hears_nothing(client)
    successor = scene.new_worker()
    scene.process.connect_guest(successor)
    for _ in scene.clients:
        successor.serve()
    assert [command["execute"] for command in successor.commands] == [
        "query-status",
        "balloon",
        "query-balloon",
    ]
    for command, client in zip(successor.commands, scene.clients, strict=True):
        hears_once(client, {"return": ANSWERS[command["execute"]]})


@pytest.mark.parametrize("gone", [False, True], ids=["disconnected", "removed"])
@pytest.mark.parametrize("seen", [False, True], ids=["unseen", "seen"])
def test_without_a_successor(scene: Scene, gone: bool, seen: bool) -> None:
    """Answered as without a device, whether the pair's end was seen before the keeper's word or not."""
    names = ("balloon", "query-status", "query-balloon")
    for name, client in zip(names, scene.clients, strict=True):
        client.send(name, **({"value": 1} if name == "balloon" else {}))
    asked = {
        command["execute"]: number for number, command in (scene.worker.receive() for _ in scene.clients)
    }
    say_so = scene.process.remove_guest if gone else scene.process.disconnect_guest
    if seen:
        scene.worker.returns(asked["query-balloon"], {"actual": 1})
        scene.die()
        hears_nothing(scene.clients[0])
        say_so()
    else:
        with scene.process.stopped():
            scene.worker.returns(asked["query-balloon"], {"actual": 1})
            scene.worker.close()
            say_so()
    hears_once(scene.clients[0], INACTIVE)
    hears_once(scene.clients[1], CONNECTED_NOT)
    hears_once(scene.clients[2], {"return": {"actual": 1}})
    assert scene.clients[0].execute("query-balloon") == INACTIVE
    late = scene.clients[0].execute("query-status", guest=GUEST)
    assert late == (unknown(GUEST) if gone else CONNECTED_NOT)
    successor = scene.new_worker()
    scene.process.announce(successor)
    scene.clients[0].send("allow")
    successor.serve()
    hears_once(scene.clients[0], {"return": {}})


def unknown(name: str) -> dict[str, Any]:
    text = f"Guest '{name}' not found: query-guests has them"
    return {"error": {"class": "DeviceNotFound", "desc": text}}


def test_successors_that_die_at_once(scene: Scene) -> None:
    """Before they are asked, with their questions unread, with one answered."""
    scene.ask_sizes()
    scene.worker.close()
    for _ in range(3):
        dead = scene.new_worker()
        dead.channel.close()
        scene.process.connect_guest(dead)
    deaf = scene.new_worker()
    scene.process.connect_guest(deaf)
    wait_for(deaf.is_asked, "a question")
    deaf.close()
    hasty = scene.new_worker()
    scene.process.connect_guest(hasty)
    hasty.serve()
    hasty.close()
    hears_once(scene.clients[0], {"return": {}})
    last = scene.new_worker()
    scene.process.connect_guest(last)
    for _ in range(2):
        last.serve()
    assert [command["arguments"]["value"] for command in last.commands] == [1, 2]
    for client in scene.clients[1:]:
        hears_once(client, {"return": {}})
    assert not last.is_asked()


def test_what_is_called_off_is_not_asked_again(scene: Scene) -> None:
    """Before the worker's death, after it, and by one who asked only then."""
    asked = scene.ask_sizes()
    before = len(descriptors(scene.process.pid))
    scene.clients[0].close()
    cancelled = exchange(scene.worker.channel)
    assert (cancelled.kind, cancelled.id) == (Kind.CANCEL, asked[0])
    scene.worker.close()
    late = scene.process.connect()
    late.send("balloon", value=3)
    late.close()
    scene.clients[1].close()
    wait_for(lambda: len(descriptors(scene.process.pid)) == before - 3, "the ends of them all")
    successor = scene.new_worker()
    scene.process.connect_guest(successor)
    number, command = successor.receive()
    assert (number, command["arguments"]) == (asked[2], {"value": 2})
    successor.returns(number, {})
    hears_once(scene.clients[2], {"return": {}})
    assert not successor.is_asked()


def test_one_who_leaves_as_the_successor_comes(scene: Scene) -> None:
    """Whatever the successor was asked for it is called off there."""
    scene.ask_sizes()
    successor = scene.new_worker()
    with scene.process.stopped():
        scene.worker.close()
        scene.process.connect_guest(successor)
        scene.clients[1].close()
    asked = [exchange(successor.channel) for _ in range(4)]
    commands = [envelope.id for envelope in asked if envelope.kind == Kind.COMMAND]
    (off,) = (envelope.id for envelope in asked if envelope.kind == Kind.CANCEL)
    assert off == commands[1]
    for number in commands:
        successor.returns(number, {})
    for client in (scene.clients[0], scene.clients[2]):
        hears_once(client, {"return": {}})


def test_a_successor_that_does_not_listen_yet(scene: Scene) -> None:
    """What its pair does not take is kept for later, and nobody has asked in vain; who comes then finds it busy."""
    scene.die()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(scene.process.connect()) for _ in range(12)]
        with scene.process.stopped():  # it reads them in turn
            for number, client in enumerate(clients):
                client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
                client.send("qom-set", **LARGE, value=f"{number} {LARGE_VALUE}")
        for client in clients:
            hears_nothing(client)
        successor = scene.new_worker()
        scene.process.connect_guest(successor)
        wait_for(successor.is_asked, "a question")
        newcomer = stack.enter_context(scene.process.connect())
        assert newcomer.execute("query-balloon") == qmp_texts.generic("the device is busy")
        open_now = len(descriptors(scene.process.pid))
        clients.pop().close()  # it was not asked yet: there is nothing to call off
        wait_for(lambda: len(descriptors(scene.process.pid)) == open_now - 1, "the client's end")
        assert sleeps_on(scene.process)
        for _ in clients:
            successor.serve()
        order = [int(command["arguments"]["value"].split()[0]) for command in successor.commands]
        assert order == list(range(11))
        for client in clients:
            hears_once(client, {"return": {}})
        assert not successor.is_asked()
        newcomer.send("query-balloon")
        successor.serve()
        hears_once(newcomer, {"return": ANSWERS["query-balloon"]})


def sleeps_on(process: ControlProcess) -> bool:
    """It is asleep, and a moment later it is in the same sleep: one that woke up has gone to sleep once more."""

    def sleeps() -> int:
        wait_for(lambda: state(process.pid) == "S", "sleep")
        (line,) = (line for line in _status(process.pid) if line.startswith("voluntary_ctxt_switches"))
        return int(line.split()[1])

    before = sleeps()
    assert select.poll().poll(200) == []
    return sleeps() == before


def _status(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/status").read_text().splitlines()


def test_nothing_spins_between_two_workers(scene: Scene) -> None:
    """A pair that has ended is always readable."""
    scene.ask_sizes()
    assert sleeps_on(scene.process)
    scene.die()
    assert sleeps_on(scene.process)
    with scene.process.connect() as late:
        late.send("query-balloon")
        hears_nothing(late)
        assert sleeps_on(scene.process)
        scene.process.disconnect_guest()
        hears_once(late, INACTIVE)
    for client in scene.clients:
        hears_once(client, INACTIVE)
    wait_for(lambda: len(descriptors(scene.process.pid)) == 3 + 2 + len(scene.clients), "the client's end")
    assert sleeps_on(scene.process)


def test_the_keepers_end_between_two_workers(scene: Scene) -> None:
    asked = scene.ask_sizes()
    with scene.process.stopped():
        scene.worker.returns(asked[1], {"by": "the dead"})
        scene.worker.close()
        scene.process.keeper.close()
    assert [client.answer() for client in scene.clients] == [
        INACTIVE,
        {"return": {"by": "the dead"}},
        INACTIVE,
    ]
    assert all(client.is_closed() for client in scene.clients)


# Several guests


def test_a_guest_is_asked_by_its_name(client: QmpSocket, worker: FakeWorker, other: FakeWorker) -> None:
    """Which is no business of the worker's."""
    for name, asked in ((GUEST, worker), ("vm2", other)):
        client.send("balloon", value=7, guest=name)
        asked.serve()
        hears_once(client, {"return": {}})
        assert asked.commands == [{"execute": "balloon", "arguments": {"value": 7}}]


@pytest.mark.parametrize(
    "name", [name for name, command in COMMANDS.items() if command.place is Place.DEVICE]
)
def test_a_guest_must_be_named_among_several(
    client: QmpSocket, worker: FakeWorker, other: FakeWorker, name: str
) -> None:
    arguments = {
        member: _anything(kind) for member, kind in COMMANDS[name].arguments.items() if member[0] != "*"
    }
    assert client.execute(name, **arguments) == SEVERAL
    assert client.execute(name, **arguments, guest="vm3") == unknown("vm3")
    assert client.execute(name, **arguments, guest=1) == qmp_texts.generic(
        "Invalid parameter type for 'guest', expected: string"
    )
    assert not worker.is_asked()
    assert not other.is_asked()


def _anything(kind: str) -> object:
    return 1 if kind == "int" else "x"


def test_the_only_place_needs_no_name(
    process: ControlProcess, client: QmpSocket, worker: FakeWorker, other: FakeWorker
) -> None:
    """Places count and not front ends: whether a name is needed must not change while a VM boots."""
    process.disconnect_guest("vm2")
    wait_for(lambda: client.execute("query-status", guest="vm2") == CONNECTED_NOT, "its end")
    assert client.execute("query-balloon") == SEVERAL
    process.remove_guest("vm2")
    wait_for(lambda: client.execute("query-status", guest="vm2") == unknown("vm2"), "its end")
    client.send("query-balloon")
    worker.serve()
    hears_once(client, {"return": ANSWERS["query-balloon"]})
    assert other.commands == []


@pytest.mark.parametrize("name", ["", 'a "quoted" é\n', "x" * 5000], ids=["empty", "quoted", "long"])
def test_any_name(process: ControlProcess, client: QmpSocket, worker: FakeWorker, name: str) -> None:
    strange = FakeWorker()
    process.announce(strange, name)
    client.send("inhibit", guest=name)
    strange.serve()
    hears_once(client, {"return": {}})
    strange.tell("BALLOON_CHANGE", {"actual": 1})
    assert client.event()["data"] == {"actual": 1, "guest": name}
    process.remove_guest(name)
    client.send("query-balloon", guest=GUEST)
    worker.serve()
    hears_once(client, {"return": ANSWERS["query-balloon"]})
    strange.close()


def test_an_event_says_whose_it_is(client: QmpSocket, worker: FakeWorker, other: FakeWorker) -> None:
    """Whatever the worker says of it."""
    worker.tell("BALLOON_CHANGE", {"actual": 1})
    assert client.event()["data"] == {"actual": 1, "guest": GUEST}
    other.tell("BALLOON_CHANGE", {"actual": 2, "guest": GUEST})
    assert client.event()["data"] == {"actual": 2, "guest": "vm2"}


def test_guests_wait_for_each_other_in_nothing(scene: Scene, other: FakeWorker) -> None:
    """Two clients ask two guests at once; one guest's worker dies, which the other's client does not notice."""
    one, two, _three = scene.clients
    one.send("balloon", value=1, guest=GUEST)
    two.send("balloon", value=2, guest="vm2")
    (first, _), (second, _) = scene.worker.receive(), other.receive()
    assert first != second
    other.returns(first, {"by": "the wrong one"})  # what it was never asked
    scene.worker.close()
    other.returns(second, {"by": "vm2"})
    hears_once(two, {"return": {"by": "vm2"}})
    two.send("query-status", guest="vm2")
    other.serve()
    hears_once(two, {"return": ANSWERS["query-status"]})
    hears_nothing(one)
    successor = scene.new_worker()
    scene.process.connect_guest(successor)
    successor.serve()
    hears_once(one, {"return": {}})


def test_many_guests_come_and_go(process: ControlProcess, client: QmpSocket) -> None:
    """And leave no descriptor."""
    gets_on(client)
    before = len(descriptors(process.pid))
    workers = {f"vm{number}": FakeWorker() for number in range(40)}
    for name, worker in workers.items():
        process.announce(worker, name)
    wait_for(lambda: len(descriptors(process.pid)) == before + 40, "a pair for each")
    with contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(process.connect()) for name in workers}
        for name, each in clients.items():
            each.send("query-balloon", guest=name)
        for value, worker in enumerate(workers.values()):
            number, _command = worker.receive()
            worker.returns(number, {"actual": value})
        for value, each in enumerate(clients.values()):
            hears_once(each, {"return": {"actual": value}})
    for name, worker in workers.items():
        worker.close()
        process.remove_guest(name)
    wait_for(lambda: len(descriptors(process.pid)) == before, "the end of them all")
    wait_for(lambda: client.execute("query-status") == CONNECTED_NOT, "the last place's end")


def test_more_descriptors_than_one(process: ControlProcess, client: QmpSocket, worker: FakeWorker) -> None:
    """The keeper sends one; whatever else came with it does not stay."""
    gets_on(client)
    before = len(descriptors(process.pid))
    ours, theirs = os.pipe()
    pair = os.dup(worker.channel.fileno())
    successor = FakeWorker()
    try:
        send_with(process, [successor.theirs.detach(), ours, theirs, pair])
    finally:
        client.send("query-balloon")
        poll = select.poll()
        poll.register(successor.channel, select.POLLIN)
        assert poll.poll(DEADLINE * 1000)
        successor.serve()
        hears_once(client, {"return": ANSWERS["query-balloon"]})
        assert len(descriptors(process.pid)) == before
        successor.close()


def send_with(process: ControlProcess, numbers: list[int]) -> None:
    """Announce the guest with these descriptors, which are closed."""
    data = ENVELOPE.encode(Envelope(Kind.GUEST, 0, GUEST.encode()))
    socket.send_fds(process.keeper, [data], numbers)
    for number in numbers:
        os.close(number)
