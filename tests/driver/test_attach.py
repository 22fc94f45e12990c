"""The device added to a running QEMU and taken out again: a real QEMU with no guest, and a real device.

What is shown: each attachment is a fresh connection and QEMU survives each; what forbids it is found before anything is
changed, on either side; what fails half-way is undone. A guest that lets go of the device is played by what QEMU does
without one: a port that nobody has powered gives its device up at once, and elsewhere a reset completes the removal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path

import pytest

from hostdev.wire import vhost_user as wire
from qmp_glue.attach import attach, detach
from qmp_glue.commandline import Machine
from qmp_glue.errors import AttachError, BackendError, DeadlineError, QmpGlueError, RefusedError
from qmp_glue.find import Qemu, find_qemu
from qmp_glue.monitor import Monitor, open_monitor
from qmp_glue.pci_buses import find_buses, free_bus
from qmp_glue.running_setup import children, entries
from qmp_glue.vm import VirtualMachine
from tests.device_on_path import Device, device_on_path

MIB = 1 << 20
WAIT_SECONDS = 30.0
PORT = ("-device", "pcie-root-port,id=port0,chassis=1")
# Ports plug for themselves, and one that no guest has powered lets its device go at once (hw/pci/pcie.c).
NATIVE = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
PC = ("-machine", "pc")
UNSHARED = (
    "-object",
    f"memory-backend-memfd,id=own,size={64 * MIB},share=off",
    "-machine",
    "memory-backend=own",
)
# Not guest RAM here, which no query tells of a backend: so it counts, and needs no huge pages reserved.
HUGETLB = ("-object", "memory-backend-memfd,id=huge,size=2M,hugetlb=on,reserve=off")


def machine(*extra: str, paused: bool = True) -> Machine:
    """Nothing here needs a CPU that runs."""
    return Machine(64 * MIB, paused=paused, extra=extra)


@pytest.fixture
def qemu(unmet: Callable[[str], None]) -> Qemu:
    try:
        return find_qemu(fetch=os.environ.get("CI") == "true")
    except QmpGlueError as error:
        unmet(str(error))
        raise


def run(main: Callable[[], Coroutine[object, object, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 100))


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with device_on_path(tmp_path) as running:
        yield running


async def state(vm: VirtualMachine) -> tuple[object, ...]:
    """What an attachment changes in a machine."""
    chardevs = sorted(str(entry["label"]) for entry in entries(await vm.execute("query-chardev")))
    return (*chardevs, *await children(vm, "/machine/peripheral"))


async def reset(vm: VirtualMachine) -> None:
    """A reset completes removals that no guest has answered; the lab's machines end at a reset unless told."""
    await vm.execute("set-action", {"reboot": "reset"})
    await vm.execute("system_reset")


def test_attach_and_detach_again_and_again(qemu: Qemu, device: Device) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, machine(*NATIVE, *PORT)) as vm:
            before = await state(vm)
            for number in range(1, 4):
                attachment = await attach(vm.monitor, device.path)
                assert (attachment.device, attachment.bus) == ("balloon0", "port0")
                assert not attachment.inhibited
                assert attachment.findings == ()
                answer = entries(await vm.execute("x-query-virtio"))
                assert [entry["name"] for entry in answer] == ["virtio-balloon"]
                assert device.connections() == number
                with pytest.raises(RefusedError) as caught:
                    await attach(vm.monitor, device.path, device="other")
                assert [finding.rule for finding in caught.value.findings] == ["two-balloons"]
                await detach(vm.monitor, seconds=WAIT_SECONDS)
                device.wait_served(number)
                assert await state(vm) == before
            assert await vm.query_status() == "prelaunch"

    run(main)


@pytest.mark.parametrize("extra", [PORT, PC], ids=["q35", "pc"])
def test_without_a_guest_the_removal_waits_for_a_reset(
    qemu: Qemu, device: Device, extra: tuple[str, ...]
) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, machine(*extra)) as vm:
            before = await state(vm)
            for number in range(1, 3):
                await attach(vm.monitor, device.path)
                for _ in range(2):
                    with pytest.raises(DeadlineError, match=r"has not let go of 'balloon0' in 0\.1 s"):
                        await detach(vm.monitor, seconds=0.1)
                assert len(entries(await vm.execute("x-query-virtio"))) == 1
                detaching = asyncio.create_task(detach(vm.monitor, seconds=WAIT_SECONDS))
                await reset(vm)
                await detaching
                device.wait_served(number)
                assert await state(vm) == before

    run(main)


def test_buses(qemu: Qemu) -> None:
    async def seen(*extra: str) -> dict[str, tuple[bool, int]]:
        async with VirtualMachine(qemu, machine(*extra)) as vm:
            return {bus.name: (bus.is_free, bus.devices) async for bus in find_buses(vm)}

    async def main() -> None:
        ports = (
            *PORT,
            "-device",
            "pcie-root-port,id=shut,chassis=2,hotplug=off",
            "-device",
            "virtio-rng-pci,bus=port0",
        )
        for handlers in ((), NATIVE):
            found = await seen(*handlers, *ports)
            assert found["port0"] == (False, 1)
            assert found["shut"] == (False, 0)
            assert not found["pcie.0"][0]
            assert (await seen(*handlers, *PORT))["port0"] == (True, 0)
        bridges = await seen(*PC, "-device", "pci-bridge,id=bridge0,chassis_nr=1")
        assert bridges["bridge0"] == (True, 0)
        assert bridges["pci.0"][0]

    run(main)


def test_every_free_bus_takes_a_device_and_no_other_does(qemu: Qemu) -> None:
    """Our reading of the object tree against QEMU's own answer."""
    layout = (
        *PORT,
        *("-device", "pcie-root-port,id=shut,chassis=2,hotplug=off"),
        *("-device", "pcie-root-port,id=taken,chassis=3"),
        *("-device", "pcie-pci-bridge,id=bridge0,bus=taken"),
        *("-device", "pcie-root-port,chassis=4"),
    )

    async def takes(vm: VirtualMachine, bus: str) -> bool:
        try:
            await vm.execute("device_add", {"driver": "virtio-rng-pci", "bus": bus, "id": f"rng-{bus}"})
        except QmpGlueError:
            return False
        return True

    async def main() -> None:
        for handlers in ((), NATIVE):
            async with VirtualMachine(qemu, machine(*handlers, *layout)) as vm:
                found = [bus async for bus in find_buses(vm) if bus.name not in ("pcie.0",)]
                assert {bus.name for bus in found} >= {"port0", "shut", "taken", "bridge0"}
                assert [bus.is_free for bus in found] == [await takes(vm, bus.name) for bus in found]

    run(main)


def test_no_room_is_said_and_named_buses_are_taken(qemu: Qemu, device: Device) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, machine()) as vm:
            before = await state(vm)
            with pytest.raises(AttachError, match=r"no free hot-pluggable PCI bus .* -device pcie-root-port"):
                await attach(vm.monitor, device.path)
            assert device.connections() == 0
            with pytest.raises(QmpGlueError, match=r"Bus .pcie\.0. does not support hotplugging"):
                await attach(vm.monitor, device.path, bus="pcie.0")
            device.wait_served(1)
            assert await state(vm) == before
        async with VirtualMachine(qemu, machine(*PORT, "-device", "pcie-root-port,id=port1,chassis=2")) as vm:
            assert await free_bus(vm) == "port0"
            attachment = await attach(vm.monitor, device.path, bus="port1", device="mine")
            assert (attachment.bus, attachment.device, attachment.chardev) == ("port1", "mine", "mine-socket")

    run(main)


@pytest.mark.parametrize(
    ("extra", "rule"),
    [
        (UNSHARED, "memory-unshared"),
        (("-object", "memory-backend-ram,id=x,size=1M"), "memory-anonymous"),
        (HUGETLB, "memory-hugetlb"),
        (("-incoming", "defer"), "migration"),
        (("-device", "virtio-balloon-pci"), "two-balloons"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_forbids_it_is_found_before_anything_is_changed(
    qemu: Qemu, device: Device, extra: tuple[str, ...], rule: str
) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, machine(*PORT, *extra)) as vm:
            before = await state(vm)
            with pytest.raises(RefusedError, match="the machine is as it was") as caught:
                await attach(vm.monitor, device.path)
            assert rule in [finding.rule for finding in caught.value.findings]
            assert f"[{rule}]" in str(caught.value)
            assert caught.value.exit_code == 1
            assert await state(vm) == before
            assert device.connections() == 0

    run(main)


def test_a_migration_under_way_forbids_it(qemu: Qemu, device: Device) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, machine(*PORT, paused=False)) as vm:
            # So that it does not come to its end: 64 MiB are soon sent, and no limit on the bandwidth is kept to.
            held = [{"capability": "pause-before-switchover", "state": True}]
            await vm.execute("migrate-set-capabilities", {"capabilities": held})
            await vm.execute("migrate", {"uri": "exec:cat >/dev/null"})
            states = "setup|active|pre-switchover"
            with pytest.raises(RefusedError, match=rf"a migration is in state ({states});.*\[migration\]"):
                await attach(vm.monitor, device.path)
            await vm.execute("migrate_cancel")

    run(main)


def test_prepared_capabilities_are_told_and_do_not_forbid_it(qemu: Qemu, device: Device) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, machine(*PORT)) as vm:
            switched = [{"capability": "background-snapshot", "state": True}]
            await vm.execute("migrate-set-capabilities", {"capabilities": switched})
            attachment = await attach(vm.monitor, device.path)
            told = [(finding.severity, finding.rule) for finding in attachment.findings]
            assert told == [("warning", "background-snapshot")]
            assert not attachment.inhibited

    run(main)


def test_inhibited_before_qemu_gets_it(qemu: Qemu, device: Device) -> None:
    seen = []

    async def main() -> None:
        async with VirtualMachine(qemu, machine(*NATIVE, *PORT, *HUGETLB)) as vm:

            async def inhibit(_process: int) -> None:
                chardevs = entries(await vm.execute("query-chardev"))
                seen.append((device.connections(), [entry["label"] for entry in chardevs]))

            attachment = await attach(vm.monitor, device.path, inhibit=inhibit)
            assert attachment.inhibited
            assert [finding.rule for finding in attachment.findings] == ["memory-hugetlb"]
            assert seen == [(1, ["qmp"])]
            await detach(vm.monitor, seconds=WAIT_SECONDS)

            async def refuse(_process: int) -> None:
                raise AttachError("it does not want to")

            before = await state(vm)
            with pytest.raises(AttachError, match="does not want to"):
                await attach(vm.monitor, device.path, inhibit=refuse)
            assert await state(vm) == before
            device.wait_served(2)

    run(main)


def test_inhibiting_does_not_cure_memory_that_nobody_can_map(qemu: Qemu, device: Device) -> None:
    async def inhibit(_process: int) -> None:
        pytest.fail("the device was inhibited, although it could not be attached")

    async def main() -> None:
        async with VirtualMachine(qemu, machine(*PORT, *UNSHARED)) as vm:
            with pytest.raises(RefusedError, match="memory-unshared"):
                await attach(vm.monitor, device.path, inhibit=inhibit)

    run(main)


def test_a_device_that_serves_another_vm_does_not_hold_this_one_up(
    qemu: Qemu, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmp_glue.backend_socket.ANSWER_SECONDS", 0.5)

    async def main() -> None:
        async with VirtualMachine(qemu, machine(*NATIVE, *PORT)) as first:
            await attach(first.monitor, device.path)
            async with VirtualMachine(qemu, machine(*PORT)) as second:
                before = await state(second)
                with pytest.raises(BackendError, match="serves one at a time"):
                    await attach(second.monitor, device.path)
                assert await state(second) == before
            await detach(first.monitor, seconds=WAIT_SECONDS)
            await attach(first.monitor, device.path)

    run(main)


# What somebody must answer to get as far as QEMU.
FEATURES = {
    wire.Request.GET_FEATURES: (1 << 30) | (1 << 32),
    wire.Request.GET_PROTOCOL_FEATURES: 1 | (1 << 9),
    wire.Request.GET_QUEUE_NUM: 5,
}


@pytest.mark.parametrize(
    ("answers", "error", "said"),
    [(0, BackendError, "hangs up"), (1, QmpGlueError, "vhost"), (4, QmpGlueError, "vhost")],
)
def test_a_device_that_dies_on_the_way_is_undone(
    qemu: Qemu, tmp_path: Path, answers: int, error: type[Exception], said: str
) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, machine(*PORT)) as vm:
            before = await state(vm)
            with pytest.raises(error, match=said):
                await attach(vm.monitor, tmp_path / "dying")
            assert await state(vm) == before
            assert await vm.query_status() == "prelaunch"

    with answering_at(tmp_path / "dying", answers):
        run(main)


@contextlib.contextmanager
def answering_at(path: Path, answers: int) -> Iterator[None]:
    """Somebody who listens there, answers its first peer so often, and hangs up."""

    def serve() -> None:
        with listener.accept()[0] as peer:
            peer.settimeout(WAIT_SECONDS)
            for _ in range(answers):
                _answer_one(peer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def _answer_one(peer: socket.socket) -> None:
    header = wire.HEADER.decode(peer.recv(wire.HEADER_SIZE, socket.MSG_WAITALL))
    if header.size:
        peer.recv(header.size, socket.MSG_WAITALL)
    if header.request in FEATURES:
        payload = FEATURES[wire.Request(header.request)].to_bytes(8, "little")
        peer.sendall(wire.message(header.request, wire.FLAG_REPLY, payload))


def test_nobody_listens(qemu: Qemu, tmp_path: Path) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, machine(*PORT)) as vm:
            with pytest.raises(BackendError, match="start vhost-user-balloon --socket-path"):
                await attach(vm.monitor, tmp_path / "nobody")
            with pytest.raises(AttachError, match="has no balloon 'balloon0'"):
                await detach(vm.monitor)
            with pytest.raises(AttachError, match=r"has no balloon 'port0' \(pcie-root-port\)"):
                await detach(vm.monitor, device="port0")

    run(main)


def test_names_that_are_taken(qemu: Qemu, device: Device) -> None:
    async def main() -> None:
        extra = ("-device", "virtio-rng-pci,id=rng0", "-chardev", "null,id=x-socket")
        async with VirtualMachine(qemu, machine(*PORT, *extra)) as vm:
            with pytest.raises(AttachError, match="has a device 'rng0'"):
                await attach(vm.monitor, device.path, device="rng0")
            with pytest.raises(AttachError, match="has a chardev 'x-socket'"):
                await attach(vm.monitor, device.path, device="x")
            assert device.connections() == 0

    run(main)


class CancelsAt:
    """A monitor whose user is told to stop just as the command of this number is sent."""

    def __init__(self, monitor: Monitor, number: int) -> None:
        self.monitor = monitor
        self.left = number
        self.user: asyncio.Task[object] | None = None

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            assert self.user is not None
            self.user.cancel()

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        self.count()
        return await self.monitor.execute(command, arguments)

    async def pass_fd(self, name: str, fd: int) -> None:
        self.count()
        await self.monitor.pass_fd(name, fd)

    async def wait_event(self, *names: str, seconds: float) -> dict[str, object]:
        return await self.monitor.wait_event(*names, seconds=seconds)


def test_a_cancelled_attach_leaves_no_half(qemu: Qemu, device: Device) -> None:
    """Cancelled at each command in turn: then the machine has both chardev and device, or neither."""

    async def cancelled_at(vm: VirtualMachine, number: int) -> bool:
        """Return whether it was cancelled at all: there is no command of that number after the last."""
        cancelling = CancelsAt(vm.monitor, number)
        cancelling.user = asyncio.create_task(attach(cancelling, device.path))
        await asyncio.wait([cancelling.user])
        return cancelling.user.cancelled()

    async def main() -> None:
        async with VirtualMachine(qemu, machine(*NATIVE, *PORT)) as vm:
            before, outcomes, number = await state(vm), [], 1
            while await cancelled_at(vm, number):
                after = await state(vm)
                outcomes.append(after != before)
                if after != before:
                    assert {"balloon0-socket", ("balloon0", "vhost-user-test-device-pci")} <= set(after)
                    await detach(vm.monitor, seconds=WAIT_SECONDS)
                    assert await state(vm) == before
                number += 1
            # Until the descriptor is passed nothing has happened, from then on everything does.
            assert len(outcomes) > 10
            assert outcomes == [False] * (len(outcomes) - 3) + [True] * 3

    run(main)


def lab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "balloonlab.cli", *words],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )


def test_the_commands(qemu: Qemu, device: Device, tmp_path: Path) -> None:
    qmp = tmp_path / "qmp"

    async def main() -> None:
        extra = (*NATIVE, *PORT, "-qmp", f"unix:{qmp},server=on,wait=off")
        where = f"--qmp={qmp}"
        async with VirtualMachine(qemu, machine(*extra)) as vm:
            checked = await asyncio.to_thread(lab, "check", where)
            assert (checked.returncode, checked.stdout.count("\n")) == (0, 1)
            for _ in range(2):
                added = await asyncio.to_thread(lab, "attach", where, f"--socket-path={device.path}")
                said = "balloon0 is on bus port0, through chardev balloon0-socket\n"
                assert (added.returncode, added.stdout, added.stderr) == (0, said, "")
                assert len(entries(await vm.execute("x-query-virtio"))) == 1
                again = await asyncio.to_thread(lab, "attach", where, f"--socket-path={device.path}")
                assert again.returncode == 1
                assert "[two-balloons]" in again.stderr
                gone = await asyncio.to_thread(lab, "detach", where)
                assert (gone.returncode, gone.stderr) == (0, "")
            async with open_monitor(qmp):
                with pytest.raises(DeadlineError, match="QEMU talks to one client at a time"):
                    async with open_monitor(qmp, seconds=0.2):
                        pass

    run(main)
