"""Real guests of every suite's kernel: they boot, the agent answers, memory is held, verified and given back.

No balloon device takes part: what a guest does with memory is measured by its own /proc/meminfo.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NoReturn

import pytest

from guest_images.agent_client import AgentClient, FillKind
from guest_images.build import GuestImage, build_guest
from guest_images.errors import AgentGoneError, AgentRefusedError
from guest_images.initramfs import kernel_command_line
from qmp_glue.commandline import Machine
from qmp_glue.debian import SUITES, DebianError
from qmp_glue.errors import QemuNotFoundError
from qmp_glue.find import Qemu, find_qemu
from qmp_glue.vm import VirtualMachine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

MIB = 1 << 20
GUEST_MEMORY = 512 * MIB
FILL = 128 * MIB
# What a guest may keep beside a fill's own pages: page tables, per-CPU lists (Linux 6.7 and later tunes them upwards).
SLACK = 48 * MIB
DRAIN_SECONDS = 60.0
SEEN_SECONDS = 120.0
BOOT_DEADLINE_S = 120.0
KINDS: tuple[FillKind, ...] = ("anonymous", "tmpfs")


def missing(reason: str) -> NoReturn:
    """Skip on a user's machine, fail in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must be able to run this: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def qemu() -> Qemu:
    try:
        return find_qemu(fetch=True)
    except (QemuNotFoundError, DebianError) as error:
        missing(str(error))


def guest(suite: str) -> GuestImage:
    if shutil.which("apt-get") is None:
        missing("apt-get is not there to fetch a guest kernel with")
    try:
        return build_guest(suite)
    except DebianError as error:
        missing(str(error))


@asynccontextmanager
async def booted(
    qemu: Qemu, image: GuestImage, console: Path, *words: str
) -> AsyncIterator[tuple[VirtualMachine, AgentClient]]:
    """Boot a guest and wait for its agent; what its console said is part of any failure."""
    ours, theirs = socket.socketpair()
    machine = Machine(
        memory_bytes=GUEST_MEMORY,
        kernel=image.kernel,
        initrd=image.initrd,
        append=kernel_command_line(*words),
        console=console,
        agent=theirs.fileno(),
    )
    with theirs:
        vm = VirtualMachine(qemu, machine)
        await vm.start()
    try:
        async with AgentClient(ours) as client:
            await client.hello(deadline=BOOT_DEADLINE_S)
            yield vm, client
    except BaseException as error:
        error.add_note(f"the guest's console:\n{vm.console_text()}")
        raise
    finally:
        await vm.close()


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_a_guest_boots_holds_memory_and_gives_it_back(suite: str, qemu: Qemu, tmp_path: Path) -> None:
    image = guest(suite)

    async def main() -> None:
        async with booted(qemu, image, tmp_path / "console") as (vm, client):
            assert (await client.ping()).kernel == image.kernel_version
            assert "virtio_balloon" in await client.read("/proc/modules")
            assert "failed:" not in vm.console_text()
            for kind in KINDS:
                await holds_and_frees(client, kind)
            await client.poweroff()
            assert await vm.wait(seconds=60) == 0

    asyncio.run(main())


async def holds_and_frees(client: AgentClient, kind: FillKind) -> None:
    before = (await client.meminfo())["MemFree"]
    filled = await client.fill(kind, FILL, seed=3)
    during = (await client.meminfo())["MemFree"]
    assert before - during > FILL - SLACK
    checked = await client.checksum(filled.handle)
    assert (checked.bytes, checked.mismatched_pages) == (FILL, 0)
    await client.free(filled.handle)
    await comes_back(client, before - SLACK)


async def comes_back(client: AgentClient, wanted: int) -> None:
    """Poll until MemFree is above wanted: pages in per-CPU lists count as used, and drain some MiB a second."""
    end = time.monotonic() + DRAIN_SECONDS
    while (free := (await client.meminfo())["MemFree"]) <= wanted:
        assert time.monotonic() < end, f"MemFree is {free}, more than {wanted} should be free"
        await asyncio.sleep(0.2)


def test_a_guest_out_of_memory_keeps_its_agent(qemu: Qemu, tmp_path: Path) -> None:
    image = guest("trixie")

    async def main() -> None:
        async with booted(qemu, image, tmp_path / "console") as (_, client):
            before = await client.meminfo()
            # More than is free, but no more than there is: that much Linux refuses at once (vm.overcommit_memory=0).
            size = before["MemTotal"] - MIB
            for kind in KINDS:
                with pytest.raises(AgentRefusedError, match="OOM killer"):
                    await client.fill(kind, size)
            await comes_back(client, before["MemFree"] - SLACK)
            assert "Out of memory" in await client.dmesg()

    asyncio.run(main())


def test_samples_are_answered_while_a_fill_runs(qemu: Qemu, tmp_path: Path) -> None:
    image = guest("bookworm")

    async def main() -> None:
        async with booted(qemu, image, tmp_path / "console") as (_, client):
            before = (await client.meminfo())["MemFree"]
            end = time.monotonic() + SEEN_SECONDS
            seen: list[int] = []
            # A fill takes half a second, in which this process may not run at all: filled again until it was looked at.
            while not any(before - FILL + SLACK < free < before - SLACK for free in seen):
                assert time.monotonic() < end, f"{before} bytes were free, and then {sorted(set(seen))}"
                filling = asyncio.create_task(client.fill("anonymous", FILL))
                while not filling.done():
                    seen.append((await client.meminfo())["MemFree"])
                await client.free((await filling).handle)
                await comes_back(client, before - SLACK)

    asyncio.run(main())


def test_a_panic_ends_qemu_and_every_call(qemu: Qemu, tmp_path: Path) -> None:
    image = guest("trixie")

    async def main() -> None:
        async with booted(qemu, image, tmp_path / "console") as (vm, client):
            with pytest.raises(AgentGoneError):
                await client.write("/proc/sysrq-trigger", "c")
            assert await vm.wait(seconds=60) == 0
            assert "Kernel panic" in vm.console_text()

    asyncio.run(main())


def test_a_host_may_come_late_and_come_again(qemu: Qemu, tmp_path: Path) -> None:
    image = guest("trixie")
    port = tmp_path / "agent"
    machine = Machine(
        memory_bytes=GUEST_MEMORY,
        kernel=image.kernel,
        initrd=image.initrd,
        append=kernel_command_line(),
        console=tmp_path / "console",
        agent=port,
    )

    async def main() -> None:
        async with VirtualMachine(qemu, machine) as vm:
            async with asyncio.timeout(BOOT_DEADLINE_S):
                while "starting the agent" not in vm.console_text():
                    await asyncio.sleep(0.05)
            async with AgentClient(port) as first:
                await first.hello(deadline=BOOT_DEADLINE_S)
                handle = (await first.fill("anonymous", MIB)).handle
            async with AgentClient(port) as second:
                await second.hello()
                assert (await second.checksum(handle)).mismatched_pages == 0

    asyncio.run(main())
