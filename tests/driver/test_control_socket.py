"""The control socket of a real device: keeper, control process and worker, and what one's death does to the others."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostdev.control import MAX_CLIENTS
from hostdev.control_link import MAX_DEATHS
from hostdev.driver import DEADLINE, FrontendError
from hostdev.errors import EXIT_PASS
from hostdev.fds import Fd
from hostdev.frontend import Frontend
from hostdev.wire.vhost_user import Request
from tests.control_process import Controlled, QmpSocket, controlled
from tests.device_program import children, descriptors, serves, wait_ended, wait_for, works

pytestmark = pytest.mark.usefixtures("nothing_is_left")

INACTIVE = {"error": {"class": "DeviceNotActive", "desc": "No balloon device has been activated"}}


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Controlled]:
    """Ended by SIGTERM; must say nothing of a defect."""
    with controlled(tmp_path) as device:
        yield device
        status, said = device.device.end()
    assert (status, "Traceback" in said) == (EXIT_PASS, False)


# What people do


def test_the_socket_is_its_owners_alone(device: Controlled) -> None:
    assert stat.S_IMODE(device.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(device.path.parent.stat().st_mode) == 0o700


def test_a_session_of_qmp_shell(device: Controlled) -> None:
    """As a person at a terminal has it."""
    shell = Path(sys.executable).with_name("qmp-shell")
    typed = (
        "query-version\nquery-status\nballoon\nballoon value=1073741824\nqom-list path=/machine/peripheral\n"
    )
    done = subprocess.run(
        [shell, device.path], input=typed, capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    lines = [line.removeprefix("(QEMU) ") for line in done.stdout.splitlines() if line]
    assert lines[2:] == [
        '{"return": {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": "vhost-user-balloon"}}',
        '{"return": {"connected": false}}',
        '{"error": {"class": "GenericError", "desc": "Parameter \'value\' is missing"}}',
        '{"error": {"class": "DeviceNotActive", "desc": "No balloon device has been activated"}}',
        '{"return": [{"name": "balloon0", "type": "child<virtio-balloon>"}]}',
        "",
    ]


def test_front_ends_come_and_go(device: Controlled) -> None:
    with device.client() as client:
        for _ in range(3):
            assert client.execute("query-balloon") == INACTIVE
            serves(device.device.connect())
            wait_for(lambda: not device.others(), "the worker's end")
            assert client.execute("query-status") == {"return": {"connected": False}}


def test_a_worker_keeps_its_end_of_the_pair(device: Controlled) -> None:
    with Frontend(device.device.connect()) as guest:
        guest.negotiate()
        (worker,) = device.others()
        assert (
            sockets(worker) == 3
        )  # the keeper's channel, the control process's, the front end's back channel
        # The keeper's channel, the listener, the worker's.
        wait_for(lambda: sockets(device.control_pid) == 3, "the worker's pair")


def sockets(pid: int) -> int:
    return sum(what.startswith("socket:") for what in descriptors(pid).values())


def test_a_crowd_disturbs_no_front_end(device: Controlled) -> None:
    """Idle ones, one that sends garbage and never reads, one that stopped in the middle of a command."""
    with Frontend(device.device.connect()) as guest, contextlib.ExitStack() as stack:
        guest.start()
        clients = [stack.enter_context(device.client()) for _ in range(MAX_CLIENTS - 2)]
        half, flood = (stack.enter_context(device.client()) for _ in range(2))
        half.connection.sendall(b'{"execute":"query-')
        flood.connection.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                flood.connection.send(b"}" * 1000)
        config = guest.read_config()
        for client in clients:
            client.send("query-version")
        works(guest)
        for client in clients:
            assert "return" in client.answer()
        assert guest.read_config() == config
        half.connection.sendall(b'version"}')
        assert "return" in half.answer()


# quit


def test_quit_without_a_front_end(tmp_path: Path) -> None:
    with controlled(tmp_path) as device, device.client() as client, device.client() as other:
        assert client.execute("quit") == {"return": {}}
        for each in (client, other):
            assert each.event()["data"] == {"guest": False, "reason": "host-qmp-quit"}
            assert each.is_closed()
        status, said = device.device.wait()
    assert (status, "Traceback" in said) == (EXIT_PASS, False)


def test_quit_under_a_front_end_must_be_forced(tmp_path: Path) -> None:
    with controlled(tmp_path) as device, device.client() as client:
        with Frontend(device.device.connect()) as guest:
            guest.start()
            for arguments in ({}, {"force": False}):
                refused = client.execute("quit", **arguments)
                assert refused["error"]["class"] == "GenericError"
                assert "its VM would not survive" in refused["error"]["desc"]
                assert '"force": true' in refused["error"]["desc"]
            works(guest)
            assert client.execute("quit", force=True) == {"return": {}}
            with pytest.raises((FrontendError, ConnectionResetError)):
                guest.receive()
        status, said = device.device.wait()
    assert (status, "Traceback" in said) == (EXIT_PASS, False)
    assert "quit over the control socket: ending while a front end is connected" in said


def test_once_ends_the_control_socket_too(tmp_path: Path) -> None:
    with controlled(tmp_path, "--once") as device, device.client() as client:
        serves(device.device.connect())
        assert client.is_closed()
        assert device.device.wait()[0] == EXIT_PASS


# Deaths


def successor(device: Controlled, *predecessors: int) -> int:
    """The control process after those, once it serves."""
    with QmpSocket(device.path) as client:
        assert "return" in client.execute("query-version")
    (worker, *_) = device.others()
    (pid,) = [pid for pid in children(device.device.pid) if pid not in (worker, *predecessors)]
    return pid


def test_a_dead_control_process_is_replaced(tmp_path: Path) -> None:
    """Its clients are gone, and nothing else: the front end's messages and rings are served as before."""
    with controlled(tmp_path) as device:
        with Frontend(device.device.connect()) as guest, device.client() as client:
            guest.start()
            config = guest.read_config()
            (worker,) = device.others()
            os.kill(device.control_pid, signal.SIGKILL)
            assert client.is_closed()
            assert guest.read_config() == config
            works(guest)
            assert worker in device.others()
            second = successor(device, device.control_pid)
            assert second != device.control_pid
            # It was given the worker's pair again.
            wait_for(lambda: sockets(second) == 3, "its own descriptors, and no client's")
        status, said = device.device.end()
    assert (status, "Traceback" in said) == (EXIT_PASS, False)
    assert "the control process ended with signal SIGKILL" in said


def test_who_asks_a_new_control_process_first_is_told_of_every_guest(tmp_path: Path) -> None:
    """It knows them from its beginning: a client that waits for it is the first thing that it sees."""
    with controlled(tmp_path) as device:
        with Frontend(device.device.connect()) as guest:
            guest.start()
            dead = [device.control_pid]
            for _ in range(3):
                with device.client() as client:
                    os.kill(dead[-1], signal.SIGKILL)
                    assert client.is_closed()
                with device.client() as client:
                    assert client.execute("query-status")["return"]["connected"] is True
                dead.append(successor(device, *dead))
        device.device.end()


def test_a_control_process_that_always_dies_is_given_up(tmp_path: Path) -> None:
    with controlled(tmp_path) as device:
        with Frontend(device.device.connect()) as guest:
            guest.start()
            (worker,) = device.others()
            dead = [device.control_pid]
            for _ in range(MAX_DEATHS):
                os.kill(dead[-1], signal.SIGKILL)
                dead.append(successor(device, *dead))
            os.kill(dead[-1], signal.SIGKILL)
            wait_for(lambda: is_refused(device.path) and children(device.device.pid) == [worker], "giving up")
            works(guest)
            assert guest.request(Request.GET_FEATURES)
        serves(device.device.connect())
        status, said = device.device.end()
    assert (status, "Traceback" in said) == (EXIT_PASS, False)
    assert "no control socket any more" in said


def is_refused(path: Path) -> bool:
    """Nobody listens there any more: the keeper ends the last process before it closes the socket."""
    with socket.socket(socket.AF_UNIX) as late:
        late.setblocking(False)
        try:
            late.connect(str(path))
        except ConnectionRefusedError:
            return True
        except BlockingIOError:
            pass  # there is no room for one more who waits
    return False


def test_a_control_process_that_hangs_is_killed(tmp_path: Path) -> None:
    with (
        controlled(tmp_path, constants={}) as device,
        Fd(os.pidfd_open(device.control_pid)) as hanging,
    ):
        os.kill(device.control_pid, signal.SIGSTOP)
        with Frontend(device.device.connect()) as guest:
            guest.start()
            works(guest)
        status, said = device.device.end()
        wait_ended(hanging)
    assert status == EXIT_PASS
    assert "the control process does not end: killing process" in said


MANY = 700


def test_many_places(tmp_path: Path) -> None:
    """More than a pair has room for: a new control process is told of all of them, and none is killed for it."""
    with controlled(tmp_path) as device:
        with device.client() as client:
            for number in range(MANY):
                path = str(tmp_path / f"many{number}.sock")
                assert client.execute("guest-add", **{"socket-path": path}) == {"return": {}}
                assert client.execute("query-status", guest=f"many{number}")["return"] == {"connected": False}
            os.kill(device.control_pid, signal.SIGKILL)
            assert client.is_closed()
        with device.client() as client:
            for number in (0, MANY // 2, MANY - 1):
                wait_for(functools.partial(is_known, client, f"many{number}"), "the place")
            error = client.execute("query-guests")["error"]
            assert "too many guests" in error["desc"]
            assert client.execute("guest-remove", guest="many0") == {"return": {}}
            assert not is_known(client, "many0")
        status, said = device.device.end()
    assert (status, "Traceback" in said, "killing" in said) == (EXIT_PASS, False, False)


def is_known(client: QmpSocket, name: str) -> bool:
    return "return" in client.execute("query-status", guest=name)


def test_a_dead_workers_successor_answers(tmp_path: Path) -> None:
    """With what it was told before, and with what it had not answered yet."""
    with controlled(tmp_path) as device, device.client() as client:
        with Frontend(device.device.connect()) as guest:
            guest.start()
            assert client.execute("set-target", size=48 << 20) == {"return": {}}
            (worker,) = device.others()
            os.kill(worker, signal.SIGSTOP)
            client.send("query-status")
            os.kill(worker, signal.SIGKILL)
            status = client.answer()["return"]
            assert status["target"] == 48 << 20
            assert status["worker"] not in (worker, 0)
        wait_for(lambda: not device.others(), "the worker's end")
        assert client.execute("query-status") == {"return": {"connected": False}}
        assert device.device.end()[0] == EXIT_PASS


def test_a_dead_keeper_takes_the_control_process_along(tmp_path: Path) -> None:
    """The sockets' files stay, for it was killed: the next start replaces them."""
    with (
        controlled(tmp_path) as device,
        device.client() as client,
        Fd(os.pidfd_open(device.control_pid)) as control,
    ):
        device.device.process.kill()
        wait_ended(control)
        assert client.is_closed()
    with controlled(tmp_path) as device, device.client() as client:
        assert client.execute("query-status") == {"return": {"connected": False}}
        assert device.device.end()[0] == EXIT_PASS
    device.path.parent.rmdir()  # not made by the one that ended, so left alone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("connected", [False, True])
def test_signals_leave_nothing(tmp_path: Path, number: signal.Signals, connected: bool) -> None:
    """To the whole group, as a terminal does. No socket, no folder, no process."""
    with controlled(tmp_path, "--on-term=now") as device, contextlib.ExitStack() as stack:
        client = stack.enter_context(device.client())
        if connected:
            stack.enter_context(Frontend(device.device.connect())).start()
        processes = [stack.enter_context(Fd(os.pidfd_open(pid))) for pid in children(device.device.pid)]
        assert len(processes) == 1 + connected
        if number == signal.SIGINT:
            for pid in children(device.device.pid):
                os.kill(pid, number)
        status, said = device.device.end(number)
        assert (status, "Traceback" in said) == (EXIT_PASS, False)
        for process in processes:
            wait_ended(process)
        assert client.is_closed()
