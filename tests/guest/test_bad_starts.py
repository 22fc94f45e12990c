"""Starts that cannot go well: each ends soon, with one clear message that names cause and fix, and leaves nothing running.

Real QEMU, real device, real kernels; what is wrong is made wrong on purpose.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from balloonlab.device import DeviceProcess
from balloonlab.errors import UsageError
from balloonlab.rig import Rig
from guest_images.initramfs import kernel_command_line
from guest_images.kernel import Kernel, debian_kernel
from qmp_glue.commandline import Machine, VhostUserBalloon
from qmp_glue.errors import QemuExitedError
from qmp_glue.find import DEVICE
from qmp_glue.vm import VirtualMachine
from tests.guest.guests import MIB, setup_for
from tests.guest.processes import DEADLINE_SECONDS, Process, Program, family, started, wait_until

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

SUITE = "bookworm-backports"
DEMO = [sys.executable, "-m", "balloonlab.cli", "demo", "--memory", "256M", "--fill", "64M"]
MEMORY = 256 * MIB
# A boot, a look at what is there, an end: no deadline of the lab's may have to pass first.
ENDS_SECONDS = 90.0


def ended(tmp_path: Path, *options: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a demo to its end. Returns its status and what it said of the error."""
    with started([*DEMO, "--out", str(tmp_path / "run"), *options], tmp_path, env=env) as program:
        return program.wait(ENDS_SECONDS), program.errors()


# QEMU


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is no executable file: correct or unset QEMU"),
        ("#!/bin/sh\nexit 1\n", "ended with status 1 (no message): name another QEMU or unset QEMU"),
        (
            "#!/bin/sh\necho 'error while loading shared libraries' >&2\nexit 127\n",
            "ended with status 127 (error while loading shared libraries): name another QEMU or unset QEMU",
        ),
        (
            "#!/bin/sh\necho 'QEMU emulator version 10.0.0'\n",
            f"has no device {DEVICE}: name another QEMU or unset QEMU",
        ),
        ("no program at all", "does not start (Exec format error): name another QEMU or unset QEMU"),
    ],
)
def test_a_qemu_that_cannot_front_the_device(text: str | None, said: str, tmp_path: Path) -> None:
    qemu = tmp_path / "qemu"
    if text is not None:
        qemu.write_text(text)
        qemu.chmod(0o755)
    status, error = ended(tmp_path, env={"QEMU": str(qemu), "XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert (status, error) == (3, f"balloonlab: QEMU={qemu} {said}\n")


# Memory


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (
            ("-m", "128M"),
            "memory backends hold 268435456 bytes, -m asks for 134217728: give both the same size",
        ),
        (
            ("-object", f"memory-backend-memfd,id=own,size={MEMORY},share=off", "-M", "memory-backend=own"),
            "memory backend 'own' is not shared: add share=on",
        ),
        (
            ("-object", f"memory-backend-ram,id=own,size={MEMORY}", "-M", "memory-backend=own"),
            "memory backend 'own' is anonymous memory",
        ),
    ],
)
def test_memory_that_the_device_cannot_give_back_is_refused_before_qemu_starts(
    extra: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    setup = replace(setup_for(SUITE, memory=MEMORY), extra=extra)
    rig = Rig(setup, tmp_path)

    async def start() -> None:
        async with rig:
            pytest.fail("QEMU was started")

    with pytest.raises(UsageError, match=re.escape(said)):
        asyncio.run(start())
    assert rig.device.returncode is not None


def test_qemu_itself_refuses_a_backend_of_another_size(tmp_path: Path) -> None:
    """What a person sees who was not told before: QEMU's own words are passed on."""
    qemu = setup_for(SUITE).qemu
    vm = VirtualMachine(qemu, Machine(memory_bytes=MEMORY, extra=("-m", "128M")), log=tmp_path / "log")
    with pytest.raises(
        QemuExitedError, match=r"status 1; put right (?s:.*)Machine memory size does not match"
    ):
        asyncio.run(vm.start())


@pytest.mark.parametrize("backend", ["memory-backend-memfd,share=off", "memory-backend-ram"])
def test_private_memory_that_nobody_checked_is_refused_by_the_device(backend: str, tmp_path: Path) -> None:
    """QEMU starts all the same and sends no region: the device says so and lives, and so does the guest."""
    setup = setup_for(SUITE, memory=MEMORY)
    device = DeviceProcess(tmp_path, discard="auto")
    log = tmp_path / "device.log"

    async def main() -> None:
        with device.start() as connection:
            machine = Machine(
                memory_bytes=MEMORY,
                kernel=setup.image.kernel,
                initrd=setup.image.initrd,
                append=kernel_command_line(),
                balloon=VhostUserBalloon(connection.fileno()),
                console=tmp_path / "console.log",
                extra=("-object", f"{backend},id=own,size={MEMORY}", "-M", "memory-backend=own"),
            )
            async with VirtualMachine(setup.qemu, machine) as vm, asyncio.timeout(ENDS_SECONDS):
                while "refused" not in log.read_text() or "shell" not in vm.console_text():
                    await asyncio.sleep(0.05)
                assert (vm.returncode, device.returncode) == (None, None)
        await device.close()

    asyncio.run(main())
    refused = re.findall(r"WARNING: (.*)", log.read_text())
    said = "no guest memory was sent: the memory backend is not shared, add share=on"
    assert refused == [f"refused SET_VRING_KICK: {said}"]
    assert "discard method" not in log.read_text()
    assert device.returncode == 0


# Kernel and guest


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return debian_kernel(SUITE)


def test_a_kernel_without_the_balloon_driver(kernel: Kernel, tmp_path: Path) -> None:
    modules = tmp_path / "modules" / kernel.version
    assert kernel.modules_dir is not None
    left_out = shutil.ignore_patterns("virtio_balloon*")
    shutil.copytree(kernel.modules_dir, modules, ignore=left_out, copy_function=os.symlink)
    status, error = ended(tmp_path, "--kernel", str(kernel.image), "--modules", str(modules))
    assert status == 2
    assert error.count("\n") == 1
    assert "virtio_balloon" in error
    assert not (tmp_path / "run" / "console.log").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing", "cannot read the kernel image"), ("text", "neither a bzImage nor a vmlinux")],
)
def test_a_kernel_that_is_none(name: str, said: str, kernel: Kernel, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Linux")
    status, error = ended(tmp_path, "--kernel", str(tmp_path / name), "--modules", str(kernel.modules_dir))
    assert status == 2
    assert error.count("\n") == 1
    assert said in error


def test_a_guest_that_panics_is_quoted(tmp_path: Path) -> None:
    status, error = ended(tmp_path, "--append", "rdinit=/nonexistent")
    assert status == 2
    first, reason, *_ = error.splitlines()
    assert first == (
        "balloonlab: the guest panicked or powered off before its time; put right what its console names:"
    )
    assert reason.startswith("  Kernel panic - not syncing: ")
    assert "Traceback" not in error


def test_a_fill_that_the_guest_has_no_room_for(tmp_path: Path) -> None:
    status, error = ended(tmp_path, "--fill", "250M")
    assert status == 2
    assert re.fullmatch(
        r"balloonlab: the guest has \d+ MiB available, 250 MiB cannot be filled: fill less or give it more memory\n",
        error,
    )


# Ends that nobody asked for


def qemu_of(program: Program) -> Process:
    return next(process for process in family(program.pid) if "-object" in process.argv)


def keeper_of(program: Program) -> Process:
    return next(process for process in family(program.pid) if "hostdev.cli" in process.argv)


def worker_of(program: Program) -> Process:
    return [process for process in family(program.pid) if "hostdev.cli" in process.argv][1]


@pytest.mark.parametrize(
    ("victim", "said"),
    [
        (qemu_of, "balloonlab: QEMU ended with signal 9; put right what its last lines name:"),
        (keeper_of, "balloonlab: the device ended with status -9; put right what its last lines name:"),
    ],
)
def test_whoever_is_killed_is_named(victim: Callable[[Program], Process], said: str, tmp_path: Path) -> None:
    with started([*DEMO, "--out", str(tmp_path / "run")], tmp_path) as program:
        program.wait_for("\nboot ")
        processes = family(program.pid)
        os.kill(victim(program).pid, signal.SIGKILL)
        assert program.wait(ENDS_SECONDS) == 2
        wait_until(
            lambda: not any(process.alive for process in processes), "the end of all", DEADLINE_SECONDS
        )
        error = program.errors()
    assert error.splitlines()[0] == said
    assert "Traceback" not in error
    assert "never retrieved" not in error
    assert (tmp_path / "run" / "timeline.csv").stat().st_size > 0
