"""A booted guest that several tests share: asyncio underneath, plain functions on top; and hands on its balloon's driver.

One boot a suite and walk: booting costs 6 s under TCG, a report pass 2 s, so tests of one guest run in one boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import TypeVar

from balloonlab.decode import Record, read_trace
from balloonlab.rig import Rig, Setup
from guest_images.build import build_guest
from guest_images.kernel import CLOUD
from hostdev.wire.trace import Kind
from qmp_glue.board import PLAIN, Board
from qmp_glue.find import accelerator, find_qemu

Value = TypeVar("Value")

MEMORY = 1 << 30
MIB = 1 << 20
# A guest that has something to report does so within 2 s and a pass; machines that test this share their cores.
RETURN_SECONDS = 45.0
# Seconds for what per-CPU lists drain only slowly, on machines that share their cores.
DRAINED_SECONDS = 120.0
# Binding a driver resets the device, which stops and starts every ring over the socket: some milliseconds.
DRIVER_SECONDS = 20.0

DRIVER = "/sys/bus/virtio/drivers/virtio_balloon"
MODULE = "/usr/lib/modules/virtio_balloon.ko"
# What a kernel says when something is wrong with it, and not only with what it was asked to do.
COMPLAINT = re.compile(
    r"^.*(?:\bBUG\b|WARNING|Oops|Call Trace|\bstall(?:s|ed)?\b|hung task|blocked for more than|general protection"
    r"|Out of memory|memory corruption|balloon.*fail).*$",
    re.MULTILINE,
)


def setup_for(
    suite: str,
    *,
    flavour: str = CLOUD,
    memory: int = MEMORY,
    board: Board = PLAIN,
    plugged: bool = True,
    discard: str = "auto",
    features: str = "",
    trace: bool = False,
    append: str = "",
) -> Setup:
    """Describe a guest of a suite; what it needs was fetched by tests.guest.prepare."""
    return Setup(
        qemu=find_qemu(),
        image=build_guest(suite, flavour=flavour),
        memory_bytes=memory,
        board=board,
        plugged=plugged,
        accelerator=accelerator(),
        discard=discard,
        features=features,
        trace=trace,
        append=tuple(append.split()),
    )


class Booted:
    """A rig that runs on an event loop of its own, driven from synchronous tests."""

    def __init__(self, rig: Rig, runner: asyncio.Runner, folder: Path) -> None:
        self.rig = rig
        self.folder = folder
        self._runner = runner

    def wait(self, work: Awaitable[Value]) -> Value:
        """Run one piece of asynchronous work to its end."""

        async def outer() -> Value:
            return await work

        return self._runner.run(outer())

    def shell(self, line: str) -> str:
        """Run a shell line in the guest and return what it wrote; it must succeed."""
        ran = self.wait(self.rig.agent.run(line))
        assert ran.status == 0, f"{line!r} ended with status {ran.status}: {ran.stderr}"
        return ran.stdout


@contextlib.contextmanager
def booted(setup: Setup, folder: Path) -> Iterator[Booted]:
    """Boot a guest for the time of the context; whatever happens in it, nothing is left running."""
    with asyncio.Runner() as runner:
        rig = Rig(setup, folder)

        async def start() -> None:
            await rig.__aenter__()
            try:
                await rig.boot()
            except BaseException:
                await rig.__aexit__(None, None, None)
                raise

        runner.run(start())
        try:
            yield Booted(rig, runner, folder)
        finally:
            runner.run(rig.__aexit__(None, None, None))


# --- what the device gave back ---


async def released_since(guest: Booted, before: int, wanted: int) -> None:
    """Poll until the device has released wanted bytes more than before. Raises TimeoutError."""
    end = time.monotonic() + DRAINED_SECONDS
    while (released := guest.rig.device.counters().released_bytes - before) < wanted:
        if time.monotonic() > end:
            raise TimeoutError(f"{released} of {wanted} bytes released within {DRAINED_SECONDS} s")
        await asyncio.sleep(0.2)


def traced(guest: Booted, start: int = 0) -> list[Record]:
    """Return what the device has traced so far, from record number start on. Unlike its counters it is never late."""
    return list(read_trace(guest.folder / "device.trace"))[start:]


def await_named(guest: Booted, kind: Kind, start: int, wanted: int) -> None:
    """Poll until wanted bytes were given back (RELEASE) or kept (WITHHOLD) since record number start of the trace."""
    end = time.monotonic() + DRAINED_SECONDS
    while (size := sum(one.value.length for one in traced(guest, start) if one.kind is kind)) < wanted:
        assert time.monotonic() < end, f"{kind.name}: {size} of {wanted} bytes within {DRAINED_SECONDS} s"
        time.sleep(0.2)


def assert_reports(guest: Booted, size: int = 256 * MIB) -> None:
    """Have the guest fill and free memory, and wait until so much as half of it was given back. Needs a trace.

    Per-CPU lists keep the low watermark, 54 MiB in a guest of 1 GiB, Linux 6.1 for good; 6.7 and later tune them up to an
    eighth of memory, and that drains in some tens of seconds.
    """
    used = guest.wait(guest.rig.agent.fill("anonymous", size, seed=5))
    start = len(traced(guest))
    guest.wait(guest.rig.agent.free(used.handle))
    await_named(guest, Kind.RELEASE, start, size // 2)


# --- hands on the driver ---


def bound(guest: Booted) -> str | None:
    """Return the virtio device that the balloon's driver serves, such as virtio1; None if it serves none."""
    return guest.shell(f"cd {DRIVER} 2>/dev/null && ls -d virtio* || true").strip() or None


def wait_until_bound(guest: Booted) -> str:
    """Poll until the driver serves a device, and return its name."""
    end = time.monotonic() + DRIVER_SECONDS
    while (device := bound(guest)) is None:
        assert time.monotonic() < end, "the driver serves no balloon"
        time.sleep(0.1)
    return device


def unbind(guest: Booted) -> str:
    """Take the driver off its device, and return the device's name for bind()."""
    device = wait_until_bound(guest)
    guest.wait(guest.rig.agent.write(f"{DRIVER}/unbind", device))
    assert bound(guest) is None
    return device


def bind(guest: Booted, device: str) -> None:
    """Have the driver serve a device again."""
    guest.wait(guest.rig.agent.write(f"{DRIVER}/bind", device))
    assert bound(guest) == device


def reload_module(guest: Booted) -> None:
    """Unload the driver and load it anew; it finds its device by itself."""
    guest.shell(f"rmmod virtio_balloon && ! test -e {DRIVER} && insmod {MODULE}")
    wait_until_bound(guest)


def reboot(guest: Booted) -> None:
    """Reboot the guest and wait for its agent; its machine must be one that reboots."""
    guest.wait(guest.rig.reboot())
    wait_until_bound(guest)


# --- what was wrong ---


def complaints(log: str) -> list[str]:
    """Return the lines of a kernel log that tell of something wrong."""
    return COMPLAINT.findall(log)


def assert_all_well(guest: Booted) -> None:
    """Neither the guest's kernel nor the device has anything to complain about."""
    assert complaints(guest.wait(guest.rig.agent.dmesg())) == []
    counters = guest.rig.device.counters()
    for family in ("guest_errors_total", "host_errors_total", "refused_messages_total", "inert"):
        assert counters.total(family) == 0, family
