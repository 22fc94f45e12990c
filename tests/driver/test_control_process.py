"""The control process between clients, a keeper and a worker: what is passed on, and to whom.

The test is the keeper; the worker is a FakeWorker, which answers when it is told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from hostdev.driver import DEADLINE
from hostdev.errors import CommandError
from hostdev.fds import Fd
from hostdev.schema import COMMANDS, Place
from hostdev.wire.control import QUIT_ACCEPTED, QUIT_FORCED, QUIT_REFUSED, Kind
from tests import qmp_texts
from tests.control_process import (
    ANSWERS,
    GUEST,
    ControlProcess,
    FakeWorker,
    QmpSocket,
    control_process,
    exchange,
    gets_on,
    say,
)
from tests.device_program import descriptors, wait_for
from tests.schema_check import Schema

pytestmark = pytest.mark.usefixtures("nothing_is_left")

# A channel has room for 278 announcements unread.
PLACES = 200

CONNECTED_NOT = {"return": {"connected": False}}
INACTIVE = {"error": {"class": "DeviceNotActive", "desc": "No balloon device has been activated"}}
DEVICE_COMMANDS = [name for name, command in COMMANDS.items() if command.place is Place.DEVICE]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "balloon": {"value": 1 << 29},
    "set-target": {"percent": 50},
    "qom-get": {"path": "balloon0", "property": "guest-stats"},
    "qom-set": {"path": "balloon0", "property": "x", "value": {"any": [1, None]}},
    "query-balloon-stats": {"refresh": True},
}


# What is passed on


@pytest.mark.parametrize("name", DEVICE_COMMANDS)
def test_a_command_reaches_the_worker_as_it_is(client: QmpSocket, worker: FakeWorker, name: str) -> None:
    arguments = ARGUMENTS.get(name, {})
    client.send(name, **arguments)
    worker.serve()
    assert client.answer() == {"return": ANSWERS[name]}
    assert worker.commands == [{"execute": name, "arguments": arguments}]


def test_the_schema_as_a_client_gets_it(client: QmpSocket) -> None:
    schema = Schema(client.execute("query-qmp-schema")["return"])
    for name in ("query-qmp-schema", "query-commands", "query-version", "query-status"):
        schema.validate_return(name, client.execute(name)["return"])
    schema.validate_return("qom-list", client.execute("qom-list", path="/machine/peripheral")["return"])
    for name, answer in ANSWERS.items():
        schema.validate_return(name, answer)


@pytest.mark.parametrize("error", [CommandError("no"), CommandError("not now", "DeviceNotActive")])
def test_the_workers_errors(client: QmpSocket, worker: FakeWorker, error: CommandError) -> None:
    worker.answers["inhibit"] = error
    client.send("inhibit")
    worker.serve()
    assert client.answer() == {"error": {"class": error.error_class, "desc": str(error)}}


def test_wrong_arguments_do_not_reach_the_worker(client: QmpSocket, worker: FakeWorker) -> None:
    assert client.execute("balloon", value="x") == qmp_texts.generic(qmp_texts.NO_INTEGER)
    assert client.execute("foo") == qmp_texts.not_found(qmp_texts.FOO)
    client.send("query-balloon")
    worker.serve()
    assert client.answer() == {"return": ANSWERS["query-balloon"]}
    assert [command["execute"] for command in worker.commands] == ["query-balloon"]


def test_each_client_gets_its_own_answer(process: ControlProcess, worker: FakeWorker) -> None:
    """Answered in another order than asked."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(process.connect()) for _ in range(5)]
        asked = {}
        for value, client in enumerate(clients):
            client.send("balloon", value=value)
            number, command = worker.receive()
            asked[command["arguments"]["value"]] = number
        assert len(set(asked.values())) == 5
        for value in (3, 0, 4, 1, 2):
            say(worker.channel, Kind.RETURN, asked[value], {"value": value})
        for value, client in enumerate(clients):
            assert client.answer() == {"return": {"value": value}}


def test_commands_of_a_client_wait_for_each_other(client: QmpSocket, worker: FakeWorker) -> None:
    client.send("query-balloon")
    client.send("inhibit")
    client.send("query-version")
    number, _command = worker.receive()
    poll = select.poll()
    poll.register(worker.channel, select.POLLIN)
    poll.register(client.connection, select.POLLIN)
    assert poll.poll(100) == []
    say(worker.channel, Kind.RETURN, number, {"actual": 5})
    worker.serve()
    assert [client.answer()["return"] for _ in range(2)] == [{"actual": 5}, {}]
    assert "qemu" in client.answer()["return"]


def test_a_session_of_qmp_client(process: ControlProcess, worker: FakeWorker) -> None:
    asyncio.run(asyncio.wait_for(converse(process.path, worker), DEADLINE))


async def converse(path: Path, worker: FakeWorker) -> None:
    client = QMPClient("test")
    await client.connect(str(path))
    asyncio.get_running_loop().add_reader(worker.channel, worker.serve)
    try:
        assert await client.execute("query-balloon") == ANSWERS["query-balloon"]
        assert await client.execute("balloon", {"value": 1 << 29}) == {}
        with client.listener("BALLOON_CHANGE") as listener:
            worker.tell("BALLOON_CHANGE", {"actual": 1 << 29})
            assert (await listener.get())["data"] == {"actual": 1 << 29, "guest": GUEST}
        with pytest.raises(ExecuteError, match="Parameter 'value' is missing"):
            await client.execute("balloon")
        several = [client.execute("qom-get", {"path": "balloon0", "property": "x"}) for _ in range(10)]
        assert await asyncio.gather(*several) == [ANSWERS["qom-get"]] * 10
    finally:
        asyncio.get_running_loop().remove_reader(worker.channel)
        await client.disconnect()


# Without a front end


@pytest.mark.parametrize("name", DEVICE_COMMANDS)
@pytest.mark.parametrize("told", [False, True], ids=["no place", "a place"])
def test_without_a_front_end(process: ControlProcess, client: QmpSocket, name: str, told: bool) -> None:
    expected = {"return": {"connected": False}} if name == "query-status" else INACTIVE
    arguments = ARGUMENTS.get(name, {})
    if told:
        process.disconnect_guest()
        arguments = {**arguments, "guest": GUEST}
        wait_for(lambda: client.execute("query-status", guest=GUEST) == CONNECTED_NOT, "the place")
    assert client.execute(name, **arguments) == expected


# Events


def test_an_event_is_for_all_who_negotiated(process: ControlProcess, worker: FakeWorker) -> None:
    with process.connect() as one, process.connect() as two, process.connect(negotiate=False) as stranger:
        two.send("query-balloon")
        number, _command = worker.receive()
        worker.tell("BALLOON_CHANGE", {"actual": 1 << 28})
        for client in (one, two):
            event = client.event()
            assert (event["event"], event["data"]) == (
                "BALLOON_CHANGE",
                {"actual": 1 << 28, "guest": GUEST},
            )
            assert event["timestamp"].keys() == {"seconds", "microseconds"}
            assert 0 <= event["timestamp"]["microseconds"] < 1_000_000
        say(worker.channel, Kind.RETURN, number, {"actual": 1 << 28})
        assert two.answer() == {"return": {"actual": 1 << 28}}
        assert stranger.execute("qmp_capabilities") == {"return": {}}
        assert stranger.events == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Kind.EVENT, b'{"event": "QUAKE", "data": {}}'),
        (Kind.EVENT, b'{"event": ["BALLOON_CHANGE"], "data": {}}'),
        (Kind.EVENT, b'{"event": "BALLOON_CHANGE"}'),
        (Kind.EVENT, b'{"event": "BALLOON_CHANGE", "data": 1}'),
        (Kind.EVENT, b'{"event": "SHUTDOWN", "data": {"guest": false, "reason": "host-qmp-quit"}}'),
        (Kind.EVENT, b"[]"),
        (Kind.EVENT, b"no JSON"),
        (Kind.EVENT, b"[" * 60000),
        (Kind.GUEST, b""),
        (Kind.GONE, b"vm1"),
        (Kind.QUIT, QUIT_FORCED),
        (Kind.RETURN, b"{}"),
        (99, b""),
    ],
)
def test_what_a_worker_has_no_business_to_say(
    client: QmpSocket, worker: FakeWorker, kind: Kind, text: bytes
) -> None:
    worker.channel.send(bytes([kind]) + (12345).to_bytes(4, "little") + text)
    worker.channel.send(b"\x03")
    client.send("query-balloon")
    worker.serve()
    assert client.answer() == {"return": ANSWERS["query-balloon"]}
    assert client.events == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Kind.RETURN, b""),
        (Kind.RETURN, b'{} {"event": "SHUTDOWN"}'),
        (Kind.RETURN, b"[" * 60000),
        (Kind.ERROR, b"[]"),
        (Kind.ERROR, b'{"class": "GenericError"}'),
    ],
)
def test_an_answer_that_is_none(client: QmpSocket, worker: FakeWorker, kind: Kind, text: bytes) -> None:
    client.send("query-balloon")
    number, _command = worker.receive()
    say(worker.channel, kind, number, text)
    assert client.answer() == qmp_texts.generic("the device's answer cannot be read")
    gets_on(client)


def test_an_answer_to_a_dead_predecessor(tmp_path: Path) -> None:
    """Its successor's ids are others."""
    used: list[int] = []
    for generation in (0, 1, 255):
        with control_process(tmp_path / "balloon.qmp", generation) as process, process.connect() as client:
            worker = FakeWorker()
            process.announce(worker)
            client.send("query-balloon")
            number, _command = worker.receive()
            for other in used:
                say(worker.channel, Kind.RETURN, other, {"actual": 0})
            say(worker.channel, Kind.RETURN, number, {"actual": 1})
            assert client.answer() == {"return": {"actual": 1}}
            assert number not in used
            used.append(number)
            worker.close()


# What it has, and how it ends


def test_it_has_its_own_descriptors_alone(process: ControlProcess) -> None:
    with process.connect():
        own = {number: what for number, what in descriptors(process.pid).items() if number > 2}
    # The keeper's channel, the listener, one client.
    assert len(own) == 3
    assert all(what.startswith("socket:") for what in own.values()), own


@pytest.mark.parametrize("force", [None, False, True])
def test_quit_is_for_the_keeper(process: ControlProcess, client: QmpSocket, force: bool | None) -> None:
    with process.connect() as other:
        client.send("quit", **({} if force is None else {"force": force}))
        asked = exchange(process.keeper)
        assert (asked.kind, asked.text == QUIT_FORCED) == (Kind.QUIT, force is True)
        say(process.keeper, Kind.ERROR, asked.id, QUIT_REFUSED)
        assert "its VM would not survive" in client.answer()["error"]["desc"]
        client.send("quit")
        asked = exchange(process.keeper)
        say(process.keeper, Kind.RETURN, asked.id, QUIT_ACCEPTED)
        process.keeper.close()
        assert client.answer() == {"return": {}}
        for each in (client, other):
            event = each.event()
            assert (event["event"], event["data"]) == (
                "SHUTDOWN",
                {"guest": False, "reason": "host-qmp-quit"},
            )
            assert each.is_closed()


# What else the keeper is asked


GUESTS = [
    {"name": "vm1", "socket-path": "/run/vm1", "connected": True, "worker": 7, "restarts": 1},
    {"name": "inherited", "connected": False, "restarts": 0},
]
# Each command, and what the keeper is sent for it.
FOR_THE_KEEPER: dict[str, tuple[dict[str, str], Kind, bytes]] = {
    "guest-add": ({"socket-path": "/run/é x"}, Kind.ADD, "/run/é x".encode()),
    "guest-remove": ({"guest": "vm 1"}, Kind.REMOVE, b"vm 1"),
    "query-guests": ({}, Kind.GUESTS, b""),
    "upgrade": ({}, Kind.UPGRADE, b""),
}


@pytest.mark.parametrize("name", FOR_THE_KEEPER)
def test_what_is_for_the_keeper(process: ControlProcess, client: QmpSocket, name: str) -> None:
    arguments, kind, text = FOR_THE_KEEPER[name]
    value = GUESTS if name == "query-guests" else {}
    schema = Schema(client.execute("query-qmp-schema")["return"])
    client.send(name, **arguments)
    asked = exchange(process.keeper)
    assert (asked.kind, asked.text) == (kind, text)
    with process.connect() as another:
        gets_on(another)  # nobody else waits for the keeper
    say(process.keeper, Kind.RETURN, asked.id, value)
    answer = client.answer()["return"]
    assert answer == value
    schema.validate_return(name, answer)
    client.send(name, **arguments)
    asked = exchange(process.keeper)
    say(process.keeper, Kind.ERROR, asked.id, {"class": "GenericError", "desc": "why not"})
    assert client.answer() == qmp_texts.generic("why not")
    assert client.events == []  # only the answer to a quit is the device's end


@pytest.mark.parametrize(
    ("path", "said"), [("", "is empty"), ("/run/\0", "has a NUL"), ("vm1.sock", "must be absolute")]
)
def test_a_path_that_is_none(process: ControlProcess, client: QmpSocket, path: str, said: str) -> None:
    error = client.execute("guest-add", **{"socket-path": path})["error"]
    assert error["class"] == "GenericError"
    assert said in error["desc"]
    client.send("query-guests")
    assert exchange(process.keeper).kind == Kind.GUESTS  # and nothing before it


def test_who_leaves_calls_nothing_off_at_the_keeper(process: ControlProcess, client: QmpSocket) -> None:
    gets_on(client)
    before = len(descriptors(process.pid))
    with process.connect() as other:
        other.send("upgrade")
        asked = exchange(process.keeper)
    wait_for(lambda: len(descriptors(process.pid)) == before, "the connection's end")
    say(process.keeper, Kind.RETURN, asked.id, {})
    client.send("query-guests")
    assert exchange(process.keeper).kind == Kind.GUESTS
    assert client.events == []


def test_it_ends_with_the_keeper_and_pays_its_debts(process: ControlProcess, worker: FakeWorker) -> None:
    with process.connect() as client:
        client.send("balloon", value=1)
        worker.receive()
        process.keeper.close()
        assert client.answer() == INACTIVE
        assert client.is_closed()


def test_it_ends_though_a_client_does_not_read(process: ControlProcess, worker: FakeWorker) -> None:
    with process.connect():
        for _ in range(10):
            worker.tell("BALLOON_CHANGE", {"actual": 0, "padding": "x" * 30000})
        process.keeper.close()
        poll = select.poll()
        with Fd(os.pidfd_open(process.pid)) as ended:
            poll.register(ended.fileno(), select.POLLIN)
            assert poll.poll(DEADLINE * 1000)


def test_ctrl_c_is_the_keepers_business(process: ControlProcess, client: QmpSocket) -> None:
    os.kill(process.pid, signal.SIGINT)
    gets_on(client)


def test_who_asks_at_once_is_told_of_all_that_the_keeper_has_said_before(tmp_path: Path) -> None:
    """Many places are announced, a client connects and asks of the last of them: it is not accepted before all is heard."""
    with control_process(tmp_path / "balloon.qmp") as process, contextlib.ExitStack() as stack:
        with process.stopped():
            for number in range(PLACES):
                process.disconnect_guest(f"vm{number}")
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(DEADLINE)
            client.connect(str(process.path))
            asked: list[dict[str, Any]] = [{"execute": "qmp_capabilities"}]
            asked += [
                {"execute": "query-status", "arguments": {"guest": f"vm{number}"}}
                for number in (PLACES - 1, 0)
            ]
            client.sendall(b"".join(json.dumps(each).encode() for each in asked))
        said = b""
        while said.count(b"\n") < 1 + len(asked):
            piece = client.recv(1 << 16)
            assert piece
            said += piece
    answers = [json.loads(line) for line in said.splitlines()][1:]
    assert answers == [{"return": {}}, CONNECTED_NOT, CONNECTED_NOT]
