"""VirtualMachine with a real QEMU and no guest: CPUs that never start, so that nothing depends on a kernel.

What is shown: it starts and answers, it says why it did not, its end is noticed whoever caused it, and nothing of it is
left on any path, the sudden death of this side included.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from qmp_glue import monitor as monitor_module
from qmp_glue import vm as vm_module
from qmp_glue.board import PLAIN, Board, equal_nodes
from qmp_glue.commandline import BuiltInBalloon, Machine
from qmp_glue.errors import (
    CommandDeniedError,
    CommandFailedError,
    DeadlineError,
    MonitorClosedError,
    QemuExitedError,
    QmpGlueError,
    VmError,
)
from qmp_glue.find import Qemu, find_qemu
from qmp_glue.inspect import inspect_running
from qmp_glue.qtest import Qtest
from qmp_glue.ram import held
from qmp_glue.vm import VirtualMachine

MIB = 1 << 20
PAUSED = Machine(64 * MIB, paused=True)
WAIT_SECONDS = 30.0


@pytest.fixture(scope="module")
def qemu() -> Qemu:
    """A capable QEMU: on a user's machine without one these tests are skipped, in CI one is fetched or they fail."""
    in_ci = os.environ.get("CI") == "true"
    try:
        return find_qemu(fetch=in_ci)
    except QmpGlueError as error:
        if in_ci:
            pytest.fail(str(error))
        pytest.skip(str(error))


def run(main: Callable[[], Coroutine[object, object, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 100))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def wait_for_end(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], WAIT_SECONDS)[0])


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_start_drive_and_quit(qemu: Qemu) -> None:
    async def main() -> None:
        before = descriptors()
        async with VirtualMachine(qemu, PAUSED) as vm:
            assert await vm.query_status() == "prelaunch"
            await vm.cont()
            assert (await vm.monitor.wait_event("RESUME", seconds=WAIT_SECONDS))["event"] == "RESUME"
            assert await vm.query_status() == "running"
            await vm.stop()
            assert await vm.query_status() == "paused"
            version = await vm.execute("query-version")
            assert isinstance(version, dict)
            assert qemu.version.startswith("{major}.{minor}.{micro}".format(**version["qemu"]))
            assert await vm.quit() == 0
            assert vm.returncode == 0
            assert not exists(vm.pid)
        assert descriptors() == before

    run(main)


def test_leaving_the_block_ends_it(qemu: Qemu) -> None:
    async def main() -> None:
        before = descriptors()
        vm = VirtualMachine(qemu, PAUSED)

        async def fail_inside() -> None:
            async with vm:
                assert exists(vm.pid)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail_inside()
        assert vm.returncode == 0
        assert not exists(vm.pid)
        await vm.close()
        assert descriptors() == before

    run(main)


def test_cancelling_the_block_ends_it(qemu: Qemu) -> None:
    async def main() -> None:
        vm = VirtualMachine(qemu, PAUSED)
        started = asyncio.Event()

        async def work() -> None:
            async with vm:
                started.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert vm.returncode is not None
        assert not exists(vm.pid)

    run(main)


def test_guest_ram_is_measured_by_its_blocks(qemu: Qemu) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, PAUSED) as vm:
            assert vm.ram_file.stat().st_size == 64 * MIB
            before = vm.footprint()
            with vm.ram_file.open("r+b", buffering=0) as ram:
                ram.seek(32 * MIB)
                ram.write(b"x" * MIB)
            assert vm.footprint() - before == MIB
        with pytest.raises(VmError, match="has ended"):
            vm.footprint()

    run(main)


@pytest.mark.parametrize(
    ("memory", "board", "files"),
    [
        (64 * MIB, PLAIN, 1),
        (5 * 1024 * MIB, PLAIN, 1),
        (96 * MIB, Board(nodes=(32 * MIB, 64 * MIB)), 2),
        (96 * MIB, Board(nodes=equal_nodes(96 * MIB, 3)), 3),
        (64 * MIB, Board(kind="microvm"), 1),
    ],
    ids=["plain", "above-4G", "two-nodes", "equal-nodes", "microvm"],
)
def test_what_a_guest_writes_is_where_the_sections_say(
    qemu: Qemu, memory: int, board: Board, files: int
) -> None:
    """Both ends of every section are written as a guest would, and found in the file, which then holds those pages."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            vm = VirtualMachine(
                qemu, Machine(memory, board=board, accelerator="qtest", qtest=theirs.fileno())
            )
            await vm.start()
        with Qtest(ours) as qtest:
            try:
                assert len(vm.ram_files) == files
                sections = await vm.ram_sections()
                assert sum(section.length for section in sections) > memory - MIB
                ends = [(one, at) for one in sections for at in (0, one.length - 8)]
                for number, (section, at) in enumerate(ends, 1):
                    qtest.writeq(section.address + at, number)
                for number, (section, at) in enumerate(ends, 1):
                    with vm.ram_files[section.file].open("rb", buffering=0) as ram:
                        ram.seek(section.offset + at)
                        assert ram.read(8) == number.to_bytes(8, "little")
                assert vm.footprint() == sum(length for path in vm.ram_files for _, length in held(path))
                if files > 1:
                    with pytest.raises(VmError, match="use ram_files"):
                        _ = vm.ram_file
            finally:
                await vm.close()

    run(main)


def test_a_machine_that_reboots_outlives_its_reset(qemu: Qemu) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, Machine(64 * MIB, board=Board(reboots=True))) as vm:
            with vm.monitor.listen("RESET") as reset:
                await vm.execute("system_reset")
                await asyncio.wait_for(reset.get(), WAIT_SECONDS)
            assert await vm.query_status() == "running"
        async with VirtualMachine(qemu, Machine(64 * MIB)) as vm:
            with contextlib.suppress(VmError):
                await vm.execute("system_reset")
            assert await vm.wait(seconds=WAIT_SECONDS) == 0

    run(main)


def test_deny_list_and_refusals(qemu: Qemu) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, PAUSED) as vm:
            for command in monitor_module.DENIED_COMMANDS:
                with pytest.raises(CommandDeniedError):
                    await vm.execute(command, {"path": "/machine"})
            with pytest.raises(CommandFailedError, match="no-such-command") as caught:
                await vm.execute("no-such-command")
            assert caught.value.error_class == "CommandNotFound"
            assert await vm.query_status() == "prelaunch"

    run(main)


def test_early_end_carries_what_qemu_wrote(qemu: Qemu) -> None:
    async def main() -> None:
        before = descriptors()
        vm = VirtualMachine(qemu, Machine(64 * MIB, extra=("-device", "nonsense")))
        with pytest.raises(QemuExitedError, match="'nonsense' is not a valid device") as caught:
            await vm.start()
        assert caught.value.status == 1
        assert any("nonsense" in line for line in caught.value.last_lines)
        assert vm.last_lines() == list(caught.value.last_lines)
        assert descriptors() == before

    run(main)


def test_program_that_does_not_start() -> None:
    async def main() -> None:
        before = descriptors()
        with pytest.raises(VmError, match="does not start"):
            await VirtualMachine(Qemu(("/nowhere/qemu",)), PAUSED).start()
        assert descriptors() == before

    run(main)


def test_silent_program_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_module, "TERMINATE_SECONDS", WAIT_SECONDS)
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)

    async def main() -> None:
        vm = VirtualMachine(Qemu((str(silent),)), PAUSED)
        with pytest.raises(DeadlineError, match=r"did not come up in 0\.5 s"):
            await vm.start(seconds=0.5)
        assert vm.returncode == -signal.SIGTERM
        assert not exists(vm.pid)

    run(main)


def test_killed_qemu_is_noticed(qemu: Qemu) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, PAUSED) as vm:
            os.kill(vm.pid, signal.SIGKILL)
            assert await vm.wait(seconds=WAIT_SECONDS) == -signal.SIGKILL
            for _ in range(2):
                with pytest.raises(QemuExitedError, match="signal 9"):
                    await vm.query_status()
            with pytest.raises(MonitorClosedError):
                await vm.monitor.execute("query-status")

    run(main)


def test_blocked_qemu_is_killed(qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_module, "QUIT_SECONDS", 0.3)
    monkeypatch.setattr(vm_module, "TERMINATE_SECONDS", 0.3)

    async def main() -> None:
        async with VirtualMachine(qemu, PAUSED) as vm:
            os.kill(vm.pid, signal.SIGSTOP)
            with pytest.raises(DeadlineError, match="did not answer query-status"):
                await vm.execute("query-status", seconds=0.3)
        assert vm.returncode == -signal.SIGKILL
        assert not exists(vm.pid)

    run(main)


def test_late_answer_does_not_end_the_session(qemu: Qemu) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, PAUSED) as vm:
            os.kill(vm.pid, signal.SIGSTOP)
            with pytest.raises(DeadlineError):
                await vm.execute("query-name", seconds=0.2)
            os.kill(vm.pid, signal.SIGCONT)
            assert await vm.query_status() == "prelaunch"

    run(main)


def test_channels_without_a_path(qemu: Qemu) -> None:
    """The agent's port on one end of a socket pair: the guest is not there yet, the chardev is open."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                vm = VirtualMachine(qemu, Machine(64 * MIB, paused=True, agent=theirs.fileno()))
                await vm.start()
            try:
                chardevs = await vm.execute("query-chardev")
                assert isinstance(chardevs, list)
                opened = {entry["label"]: entry["frontend-open"] for entry in chardevs}
                assert opened == {"agent": False, "qmp": True}
            finally:
                await vm.close()
            assert ours.recv(1) == b""

    run(main)


@pytest.mark.parametrize(
    ("machine", "found"),
    [
        (Machine(64 * MIB, paused=True, balloon=BuiltInBalloon()), []),
        (
            Machine(64 * MIB, paused=True, extra=("-object", "memory-backend-ram,id=x,size=1M")),
            ["memory-anonymous"],
        ),
    ],
)
def test_inspection_of_a_running_qemu(qemu: Qemu, machine: Machine, found: list[str]) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, machine) as vm:
            assert [finding.rule for finding in await inspect_running(vm)] == found

    run(main)


# A shell starts its background jobs with SIGINT ignored, and these tests may be part of one.
PARENT = """
import asyncio, signal, sys
from qmp_glue.commandline import Machine
from qmp_glue.find import Qemu
from qmp_glue.vm import VirtualMachine

async def main():
    async with VirtualMachine(Qemu(tuple(sys.argv[2:]), dict([sys.argv[1].split("=", 1)])), Machine(64 << 20, paused=True)) as vm:
        print(vm.pid, flush=True)
        await asyncio.Event().wait()

signal.signal(signal.SIGINT, signal.default_int_handler)
asyncio.run(main())
"""


def start_parent(qemu: Qemu) -> tuple[subprocess.Popen[str], int]:
    """A Python process with a QEMU of its own; returns it and a pidfd of that QEMU."""
    setting = "=".join(next(iter(qemu.env.items()), ("UNUSED", "")))
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, setting, *qemu.argv], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, os.pidfd_open(int(process.stdout.readline()))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_qemu_does_not_outlive_its_parent(qemu: Qemu, end: signal.Signals) -> None:
    process, pidfd = start_parent(qemu)
    try:
        assert not select.select([pidfd], [], [], 0)[0]
        process.send_signal(end)
        assert wait_for_end(pidfd)
        assert process.wait(WAIT_SECONDS) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        process.kill()
        process.communicate()


def test_started_twice_or_never(qemu: Qemu) -> None:
    async def main() -> None:
        vm = VirtualMachine(qemu, PAUSED)
        with pytest.raises(VmError, match="not been started"):
            await vm.query_status()
        assert vm.returncode is None
        async with vm:
            with pytest.raises(VmError, match="started before"):
                await vm.start()
            assert await vm.query_status() == "prelaunch"
        with pytest.raises(VmError, match="leave it None"):
            VirtualMachine(qemu, Machine(64 * MIB, qmp=3))

    run(main)


def test_events_are_waited_for_with_a_deadline(qemu: Qemu) -> None:
    async def main() -> None:
        async with VirtualMachine(qemu, PAUSED) as vm:
            began = time.monotonic()
            with pytest.raises(DeadlineError, match="no event SHUTDOWN"):
                await vm.monitor.wait_event("SHUTDOWN", seconds=0.2)
            assert time.monotonic() - began >= 0.2
            with vm.monitor.listen("STOP", "RESUME") as listener:
                await vm.cont()
                await vm.stop()
                names = [(await asyncio.wait_for(listener.get(), WAIT_SECONDS))["event"] for _ in range(2)]
            assert names == ["RESUME", "STOP"]

    run(main)
