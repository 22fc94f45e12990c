"""The control process and its clients: those that go, those that misbehave, and how many there may be."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import resource
import select
import socket
from pathlib import Path
from typing import Any

import pytest

from hostdev.acceptor import PAUSE
from hostdev.client import MAX_OUTGOING
from hostdev.control import MAX_CLIENTS
from hostdev.driver import DEADLINE
from hostdev.json_stream import MAX_VALUE
from hostdev.wire.control import Kind
from tests import qmp_texts
from tests.control_process import (
    ANSWERS,
    ROOM,
    ControlProcess,
    FakeWorker,
    QmpSocket,
    exchange,
    gets_on,
    say,
)
from tests.device_program import descriptors, wait_for

pytestmark = pytest.mark.usefixtures("nothing_is_left")


# Clients that go


def test_a_client_that_goes_calls_its_command_off(process: ControlProcess, worker: FakeWorker) -> None:
    client = process.connect()
    client.send("query-balloon-stats", refresh=True)
    number, _command = worker.receive()
    client.close()
    cancelled = exchange(worker.channel)
    assert (cancelled.kind, cancelled.id, cancelled.text) == (Kind.CANCEL, number, b"")
    say(worker.channel, Kind.RETURN, number, {})  # crossed on the way: for nobody
    with process.connect() as another:
        another.send("query-balloon")
        worker.serve()
        assert another.answer() == {"return": ANSWERS["query-balloon"]}


def test_a_client_that_shuts_down_its_side_gets_its_answers(
    process: ControlProcess, worker: FakeWorker
) -> None:
    """As from a script: echo ... | nc -N -U."""
    with process.connect(negotiate=False) as client:
        client.send("qmp_capabilities")
        client.send("query-balloon")
        client.send("query-version")
        client.connection.shutdown(socket.SHUT_WR)
        worker.serve()
        assert client.answer() == {"return": {}}
        assert client.answer() == {"return": ANSWERS["query-balloon"]}
        assert "qemu" in client.answer()["return"]
        assert client.is_closed()


def test_a_client_that_does_not_wait_is_heard(process: ControlProcess, worker: FakeWorker) -> None:
    client = process.connect()
    client.send("balloon", value=4096)
    client.close()
    _number, command = worker.receive()
    assert command == {"execute": "balloon", "arguments": {"value": 4096}}


# Clients that misbehave


def test_a_client_that_never_reads_is_given_up(process: ControlProcess, worker: FakeWorker) -> None:
    """Others get every event meanwhile."""
    with process.connect() as deaf, process.connect() as client:
        sent = 0
        # Of what is sent the kernel keeps as much as this for it.
        room = deaf.connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        while sent * len("x" * 30000) < 4 * MAX_OUTGOING + room:
            worker.tell("BALLOON_CHANGE", {"actual": sent, "padding": "x" * 30000})
            assert client.event()["data"]["actual"] == sent
            sent += 1
        gets_on(client)
        heard = 0
        with contextlib.suppress(EOFError, ConnectionResetError):
            while deaf.message():
                heard += 1
        assert heard < sent


def test_a_client_that_sends_without_reading_is_not_read(process: ControlProcess, client: QmpSocket) -> None:
    """What it can have kept is one answer more than the limit, whatever it sends."""
    poll = select.poll()
    with process.connect() as flood:
        flood.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
        poll.register(flood.connection, select.POLLOUT)
        sent = 0
        while poll.poll(300) and sent < 64 << 20:
            with contextlib.suppress(BlockingIOError):
                sent += flood.connection.send(b"} " * 2000, socket.MSG_DONTWAIT)
        assert sent < 4 << 20  # two socket buffers and what one read takes
        gets_on(client)
        with process.connect() as another:
            gets_on(another)
        answered = 0
        while answered < sent // 2:
            assert flood.message()["error"]["desc"].startswith(qmp_texts.PARSE_ERROR)
            answered += 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 5000,
        b"\xff" * 5000,
        b"[" * 200000,
        b'{"a":"' + b"x" * 200000,
        random.Random(1).randbytes(100000),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["zeroes", "ones", "brackets", "a string without end", "random", "HTTP"],
)
def test_garbage_disturbs_nobody_else(process: ControlProcess, client: QmpSocket, garbage: bytes) -> None:
    with process.connect() as other:
        # A byte of no JSON, and it is understood again.
        replies = talk(other, garbage + b'\x01{"execute":"query-version","id":"after"}', b'"after"')
        assert all("error" in json.loads(line) for line in replies.splitlines()[:-1])
        gets_on(client)


def talk(client: QmpSocket, text: bytes, end: bytes) -> bytes:
    """Send without waiting for answers, reading all the while, until an answer that has end in it."""
    replies = b""
    poll = select.poll()
    while end not in replies[-1000:]:
        poll.register(client.connection, select.POLLIN | (select.POLLOUT if text else 0))
        assert poll.poll(DEADLINE * 1000), replies[-1000:]
        with contextlib.suppress(BlockingIOError):
            text = text[client.connection.send(text, socket.MSG_DONTWAIT) :] if text else b""
        with contextlib.suppress(BlockingIOError):
            replies += client.connection.recv(1 << 20, socket.MSG_DONTWAIT)
    return replies


def test_half_a_command_disturbs_nobody_else(process: ControlProcess, client: QmpSocket) -> None:
    with process.connect() as slow:
        slow.connection.sendall(b'{"execute":"query-ver')
        gets_on(client)
        slow.connection.sendall(b'sion","id":1}')
        assert slow.answer()["id"] == 1
        slow.connection.sendall(b'{"execute":')
    gets_on(client)


def test_a_command_too_long_for_an_envelope(client: QmpSocket, worker: FakeWorker) -> None:
    """It is shorter in the client's UTF-8 than in our ASCII."""
    value = "é" * (MAX_VALUE // 4)
    client.connection.sendall(
        json.dumps(
            {"execute": "qom-set", "arguments": {"path": "x", "property": "y", "value": value}},
            ensure_ascii=False,
        ).encode()
    )
    assert "longer than" in client.answer()["error"]["desc"]
    client.send("inhibit")
    worker.serve()
    assert client.answer() == {"return": {}}


def test_a_worker_that_does_not_listen_is_busy(process: ControlProcess, worker: FakeWorker) -> None:
    """The control process waits for nobody: who finds the worker's channel full is told so."""
    busy = qmp_texts.generic("the device is busy")
    arguments = {"path": "x", "property": "y", "value": "x" * 60000}
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(process.connect()) for _ in range(20)]
        poll = select.poll()
        for client in clients:
            poll.register(client.connection, select.POLLIN)
            client.send("qom-set", **arguments)
        (first, _mask), *_others = poll.poll(DEADLINE * 1000)
        with process.connect() as another:
            gets_on(another)
        # From here on the worker listens.
        answers: dict[int, dict[str, Any]] = {}
        poll.register(worker.channel, select.POLLIN)
        while len(answers) < len(clients):
            ready = {number for number, _mask in poll.poll(DEADLINE * 1000)}
            assert ready
            if worker.channel.fileno() in ready:
                worker.serve()
            for client in clients:
                if client.connection.fileno() in ready:
                    answers[client.connection.fileno()] = client.answer()
        assert answers[first] == busy
        assert sum(answer == {"return": {}} for answer in answers.values()) >= 2
        assert all(answer in (busy, {"return": {}}) for answer in answers.values())
        clients[0].send("inhibit")
        worker.serve()
        assert clients[0].answer() == {"return": {}}


# How many


def test_as_many_clients_as_promised(process: ControlProcess, worker: FakeWorker) -> None:
    assert MAX_CLIENTS >= 64
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(process.connect()) for _ in range(MAX_CLIENTS)]
        for client in clients:
            client.send("query-balloon")
        with socket.socket(socket.AF_UNIX) as one_too_many:
            one_too_many.connect(str(process.path))
            one_too_many.settimeout(DEADLINE)
            assert one_too_many.recv(1) == b""
        for _ in clients:
            worker.serve()
        for client in clients:
            assert client.answer() == {"return": ANSWERS["query-balloon"]}
        clients[0].close()
        wait_for(lambda: len(descriptors(process.pid)) < len(clients) + 6, "the connection's end")
        gets_on(stack.enter_context(process.connect()))


def test_no_descriptor_left(process: ControlProcess, client: QmpSocket) -> None:
    """The listener stays readable; the loop leaves it alone for a moment instead of spinning."""
    limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    used = descriptors(process.pid)
    first_free = next(number for number in itertools.count() if number not in used)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (first_free, limits[1]))
    with socket.socket(socket.AF_UNIX) as another:
        another.connect(str(process.path))
        before = _ticks(process.pid)
        another.settimeout(PAUSE * 1.5)
        with pytest.raises(TimeoutError):
            another.recv(1)
        gets_on(client)
        assert _ticks(process.pid) - before < os.sysconf("SC_CLK_TCK") * PAUSE / 4
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
        another.settimeout(DEADLINE)
        assert b"QMP" in another.recv(1000)


def _ticks(pid: int) -> int:
    """Processor time, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
