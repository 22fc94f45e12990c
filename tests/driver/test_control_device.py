"""The control socket of a whole device: keeper, worker and control process, with a front end that is not QEMU.

What is shown: each real answer is what the schema says, commands do what they do, waiting ones wait for nobody else, and
the worker's clock asks the guest by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostdev.commands import EVENT_SECONDS
from hostdev.control_link import MAX_DEATHS
from hostdev.driver import DEADLINE, Buffer, GuestMemory
from hostdev.frontend import Frontend
from hostdev.hinting import ID_DONE, ID_MIN, ID_STOP
from hostdev.schema import COMMANDS, Place
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import STATISTIC, STATISTIC_NAMES, Config, Role, Statistic
from hostdev.wire.vhost_user import BackendRequest
from qmp_glue.commandline import Machine
from qmp_glue.errors import QmpGlueError
from qmp_glue.find import find_qemu
from qmp_glue.vm import VirtualMachine
from tests.conftest import HUGE_PAGES
from tests.control_process import QmpSocket
from tests.device_program import PATIENT, Program, children, descriptors, program, wait_for
from tests.in_process import MIB, PAGE
from tests.schema_check import Schema

MEMORY = 64 * MIB
LIST = 0x180000
PATH = "/machine/peripheral/balloon0"
INTERVAL = "guest-stats-polling-interval"


class MainLoop(threading.Thread):
    """Reads what the back end says of its own accord, as QEMU's main loop does: the first byte, then the rest.

    A front end that goes in the middle of a message finds its end instead.
    """

    def __init__(self, channel: socket.socket) -> None:
        super().__init__(daemon=True)
        self._channel = channel
        self.requests: list[int] = []

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while len(header := self._channel.recv(wire.HEADER_SIZE, socket.MSG_WAITALL)) == wire.HEADER_SIZE:
                self.requests.append(wire.HEADER.decode(header).request)


class Device:
    """A running device, its front end, its control socket."""

    def __init__(self, running: Program, path: Path) -> None:
        self.program = running
        self.path = path
        self.frontend = Frontend(running.connect(), memory=GuestMemory(MEMORY))
        self.loop = MainLoop(self.frontend.backend_channel)
        self.loop.start()
        self.client = QmpSocket(path)
        self.schema = Schema(self.client.execute("query-qmp-schema")["return"])

    def command(self, name: str, /, **arguments: object) -> Any:  # noqa: ANN401
        """Execute a command that succeeds; its answer is of the declared type."""
        answer = self.client.execute(name, **arguments)
        assert "return" in answer, answer
        self.schema.validate_return(name, answer["return"])
        return answer["return"]

    def refused(self, name: str, /, **arguments: object) -> tuple[str, str]:
        error = self.client.execute(name, **arguments)["error"]
        return error["class"], error["desc"]

    def send_statistics(self, *pairs: tuple[int, int]) -> int:
        data = b"".join(STATISTIC.encode(Statistic(*pair)) for pair in pairs)
        self.frontend.memory.write(LIST, data)
        return self.frontend.rings[Role.STATISTICS].offer([Buffer(LIST, len(data))])

    def hint(self, *buffers: Buffer) -> None:
        ring = self.frontend.rings[Role.FREE_PAGE_HINT]
        ring.wait_used(ring.offer(buffers))

    def hint_id(self, value: int) -> None:
        self.frontend.memory.write(LIST, struct.pack("<I", value))
        self.hint(Buffer(LIST, 4))

    def shown_id(self) -> int:
        return self.frontend.read_config().free_page_hint_cmd_id

    def close(self) -> None:
        self.client.close()
        self.frontend.backend_channel.shutdown(socket.SHUT_RDWR)
        self.loop.join()
        self.frontend.close()


@contextlib.contextmanager
def negotiated(tmp_path: Path, **constants: float) -> Iterator[Device]:
    """The guest's driver is not up. constants: of the device, by module and name."""
    control = tmp_path / "own" / "control"
    with program(tmp_path / "socket", f"--control={control}", constants=PATIENT | constants) as running:
        wait_for(control.exists, "the control socket")
        device = Device(running, control)
        device.frontend.negotiate()
        try:
            yield device
        finally:
            device.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """Negotiated; the guest's driver is not up."""
    with negotiated(tmp_path) as device:
        yield device


@pytest.fixture
def up(device: Device) -> Device:
    """The guest's driver is up."""
    device.frontend.resume(first=True)
    return device


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Device]:
    """The guest's driver is up, and has all the time there is: it is the test, which may have to wait for its turn."""
    times = ("hostdev.commands.STATISTICS_SECONDS", "hostdev.hinting.ROUND_SECONDS")
    with negotiated(tmp_path, **dict.fromkeys(times, 10 * DEADLINE)) as device:
        device.frontend.resume(first=True)
        yield device


def test_every_answer_is_of_the_declared_type(device: Device) -> None:
    """Before the driver is up, with it, inert or not: whatever there is to be said."""
    for stage in ("early", "up", "paused"):
        if stage == "up":
            device.frontend.resume(first=True)
            device.send_statistics((4, 1), (99, 2))
        if stage == "paused":
            device.frontend.stop()
        for name in (
            "query-status",
            "query-memory",
            "query-rings",
            "query-balloon-stats",
            "inhibit",
            "allow",
        ):
            device.command(name)
        device.command("set-target", percent=80)
        device.command("balloon", value=MEMORY)
        for name in ("type", "guest-stats", INTERVAL):
            device.command("qom-get", path=PATH, property=name)
        device.command("qom-set", path=PATH, property=INTERVAL, value=0)
        if stage != "early":
            device.command("query-balloon")
    passed_on = {name for name, command in COMMANDS.items() if command.place is Place.DEVICE}
    asked = {
        *("query-status", "query-memory", "query-rings", "query-balloon-stats", "inhibit", "allow"),
        *("set-target", "balloon", "qom-get", "qom-set", "query-balloon", "estimate-free"),
    }
    assert passed_on <= asked


def test_a_target_is_answered_when_the_front_end_was_told(up: Device) -> None:
    for size in (48, 32, 40):
        told = len(up.loop.requests)
        up.command("balloon", value=size * MIB)
        wait_for(lambda before=told: len(up.loop.requests) > before, "the message")  # type: ignore[misc]
        assert up.frontend.read_config().num_pages == (64 - size) * MIB // PAGE
    assert set(up.loop.requests) == {BackendRequest.CONFIG_CHANGE_MSG}


def test_a_balloon_that_changes_is_told_to_all(up: Device) -> None:
    with QmpSocket(up.path) as other:
        up.frontend.write_config(Config(actual=MIB // PAGE))
        for client in (up.client, other):
            event = client.event()
            assert event["event"] == "BALLOON_CHANGE"
            assert event["data"]["actual"] == MEMORY - MIB
            assert event["timestamp"].keys() == {"seconds", "microseconds"}
            up.schema.validate_event("BALLOON_CHANGE", event["data"])
        begun = time.monotonic()
        for pages in range(2, 9):
            up.frontend.write_config(Config(actual=pages))
        told = 1
        while up.client.event()["data"]["actual"] != MEMORY - 8 * PAGE:
            told += 1
        # The latest, and others only if there was the time for that.
        assert told <= 1 + (time.monotonic() - begun) / EVENT_SECONDS


def test_the_guest_is_polled_by_the_workers_clock(up: Device) -> None:
    ring = up.frontend.rings[Role.STATISTICS]
    head = up.send_statistics((4, 1))
    up.command("qom-set", path=PATH, property=INTERVAL, value=1)
    for value in (2, 3):
        assert ring.wait_used(head) == 0
        head = up.send_statistics((4, value))
        wait_for(lambda wanted=value: stat(up) == wanted, "the answer")  # type: ignore[misc]


def test_an_interval_of_a_hundred_years(up: Device) -> None:
    """The largest that QEMU takes as well; poll() would not wait for so long at once."""
    worker = up.command("query-status")["worker"]
    head = up.send_statistics((4, 1))
    wait_for(lambda: stat(up) == 1, "the first buffer")
    up.command("qom-set", path=PATH, property=INTERVAL, value=(1 << 32) - 1)
    assert up.frontend.rings[Role.STATISTICS].wait_used(head) == 0
    up.send_statistics((4, 2))
    wait_for(lambda: stat(up) == 2, "the answer")
    up.frontend.write_config(Config(actual=1))
    assert up.command("query-status")["worker"] == worker


def test_a_worker_whose_control_process_is_given_up(up: Device) -> None:
    """After too many deaths there is nobody to talk to, and nothing is kept for anybody: reports go on."""
    worker = up.command("query-status")["worker"]
    for number in range(MAX_DEATHS + 1):
        (control,) = set(children(up.program.pid)) - {worker}
        os.kill(control, signal.SIGKILL)
        wait_for(lambda gone=control: gone not in children(up.program.pid), "its end")  # type: ignore[misc]
        if number < MAX_DEATHS:
            wait_for(lambda: len(children(up.program.pid)) == 2, "a successor")
    assert children(up.program.pid) == [worker]
    for pages in range(3):
        up.frontend.write_config(Config(actual=pages))
    ring = up.frontend.rings[Role.REPORTING]
    ring.wait_used(ring.offer([Buffer(16 * MIB, PAGE, writable=True)]))
    pairs = [what for what in descriptors(worker).values() if what.startswith("socket:")]
    assert len(pairs) == 2  # the keeper's channel and the front end's back channel


def stat(device: Device) -> int:
    answer = device.command("qom-get", path=PATH, property="guest-stats")
    return int(answer["stats"]["stat-free-memory"])


def test_fresh_statistics_hold_nobody_else_up(patient: Device) -> None:
    ring = patient.frontend.rings[Role.STATISTICS]
    head = patient.send_statistics((4, 1))
    wait_for(lambda: stat(patient) == 1, "the first buffer")
    patient.client.send("query-balloon-stats", refresh=True)
    assert ring.wait_used(head) == 0
    with QmpSocket(patient.path) as other:
        assert other.execute("query-status")["return"]["running"] is True
    patient.send_statistics((4, 7), (5, 8))
    answer = patient.client.answer()["return"]
    patient.schema.validate_return("query-balloon-stats", answer)
    assert answer["stats"][STATISTIC_NAMES[4]] == 7


def test_statistics_of_a_guest_that_does_not_answer(up: Device) -> None:
    kind, text = up.refused("query-balloon-stats", refresh=True)
    assert kind == "GenericError"
    assert "did not answer within 1 s" in text


def test_an_estimate(patient: Device) -> None:
    patient.client.send("estimate-free")
    wait_for(lambda: patient.shown_id() > ID_MIN, "a round")
    patient.hint_id(patient.shown_id())
    patient.hint(Buffer(4 * MIB, 4 * MIB, writable=True))
    patient.hint(Buffer(8 * MIB, 4 * MIB, writable=True))
    patient.hint_id(0)
    answer = patient.client.answer()["return"]
    patient.schema.validate_return("estimate-free", answer)
    assert (answer["bytes"], answer["blocks"], answer["complete"]) == (8 * MIB, 2, True)
    assert patient.shown_id() == ID_DONE


def test_a_round_ends_with_the_connection_of_who_asked(patient: Device) -> None:
    with QmpSocket(patient.path) as other:
        other.send("estimate-free")
        wait_for(lambda: patient.shown_id() > ID_MIN, "a round")
        told = len(patient.loop.requests)
    wait_for(lambda: patient.shown_id() == ID_DONE, "the end of the round")
    wait_for(lambda: len(patient.loop.requests) > told, "the message")


def test_a_front_end_that_goes_leaves_nobody_waiting(patient: Device) -> None:
    patient.client.send("estimate-free")
    wait_for(lambda: patient.shown_id() > ID_MIN, "a round")
    patient.frontend.connection.close()
    error = patient.client.answer()["error"]
    assert error["class"] == "DeviceNotActive"
    wait_for(lambda: patient.command("query-status") == {"connected": False}, "the end of the front end")
    assert patient.refused("balloon", value=1)[0] == "DeviceNotActive"


def test_a_round_outlives_the_control_process_no_longer_than_its_deadline(up: Device) -> None:
    """Who asked has gone with it; the guest gets its memory back, and reports go on as before."""
    worker = up.command("query-status")["worker"]
    (control,) = set(children(up.program.pid)) - {worker}
    up.client.send("estimate-free")
    wait_for(lambda: up.shown_id() != ID_STOP, "a round")
    os.kill(control, signal.SIGKILL)
    wait_for(lambda: up.shown_id() == ID_DONE, "the end of the round")
    ring = up.frontend.rings[Role.REPORTING]
    up.frontend.memory.write(16 * MIB, b"x" * PAGE)
    held = up.frontend.memory.footprint()
    ring.wait_used(ring.offer([Buffer(16 * MIB, PAGE, writable=True)]))
    assert held - up.frontend.memory.footprint() == PAGE
    with QmpSocket(up.path) as other:
        assert other.execute("query-status")["return"]["worker"] == worker


def attach_words(qmp: Path, device: Path, control: Path) -> list[str]:
    own = [sys.executable, "-m", "balloonlab.cli", "attach", f"--qmp={qmp}", f"--socket-path={device}"]
    return [*own, "--inhibit-if-unsafe", f"--control={control}"]


def test_attached_inhibited_where_releasing_is_unsafe(tmp_path: Path, unmet: Callable[[str], None]) -> None:
    """Huge pages behind a running VM: refused without --inhibit-if-unsafe, inhibited with it, each by its name."""
    if not HUGE_PAGES.exists():
        pytest.skip("not run: this kernel has no huge pages of 2 MiB")
    try:
        qemu = find_qemu(fetch=os.environ.get("CI") == "true")
    except QmpGlueError as error:
        unmet(str(error))
        raise
    socket_path, control, qmp = tmp_path / "socket", tmp_path / "control", tmp_path / "qmp"
    strange = tmp_path / "strange"
    port = ("-device", "pcie-root-port,id=port0,chassis=1")
    huge = ("-object", "memory-backend-memfd,id=huge,size=2M,hugetlb=on,reserve=off")
    monitor = ("-qmp", f"unix:{qmp},server=on,wait=off")
    machine = Machine(64 * MIB, paused=True, extra=(*port, *huge, *monitor))

    async def main() -> None:
        async with VirtualMachine(qemu, machine):
            words = attach_words(qmp, socket_path, control)
            other = [*attach_words(qmp, socket_path, strange)]
            wrong = await asyncio.to_thread(run, other)
            assert wrong.returncode == 2
            assert "is of another device" in wrong.stderr
            refused = await asyncio.to_thread(run, [word for word in words if word != "--inhibit-if-unsafe"])
            assert refused.returncode == 1
            assert "huge pages" in refused.stderr
            done = await asyncio.to_thread(run, words)
            assert (done.returncode, done.stderr) == (0, "")
            assert "[memory-hugetlb]" in done.stdout
            assert "so it is inhibited" in done.stdout
            with QmpSocket(control) as client:
                assert client.execute("query-status")["return"]["inhibited"] is True

    with (
        program(socket_path, f"--control={control}"),
        program(tmp_path / "another", f"--control={strange}"),
    ):
        wait_for(lambda: control.exists() and strange.exists(), "the control sockets")
        asyncio.run(asyncio.wait_for(main(), 3 * DEADLINE))


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


def test_ctl_before_qemu(tmp_path: Path) -> None:
    control = tmp_path / "control"
    with program(tmp_path / "socket", f"--control={control}"):
        wait_for(control.exists, "the control socket")
        words = [sys.executable, "-m", "balloonlab.cli", "ctl", "--control", str(control)]
        done = run([*words, "status"])
        assert (done.returncode, done.stdout) == (0, "no front end is connected: start QEMU\n")
        done = run([*words, "stats", "--watch", "--count", "0"])
        assert (done.returncode, done.stderr) == (2, "balloonlab: --count 0: give one or more\n")
        done = run([*words, "set", "1G"])
        assert done.returncode == 2
        assert "No balloon device has been activated" in done.stderr
