"""From a scenario's guest to what can boot, in each arm; and whether the guest that came up has the knobs asked for.

prepare() finds QEMU and builds the guest, which may download and takes its time: once, before any run, outside of asyncio.
Which balloon a run has is for_arm()'s. Used by command.py and runner.py; it starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from balloonlab.errors import GuestSetupError, UsageError
from balloonlab.measure.scenario import Arm, DeviceSpec, GuestSpec
from balloonlab.printable import printable
from balloonlab.rig import Setup
from balloonlab.setup import MIN_MEMORY
from balloonlab.sizes import human
from guest_images.agent_client import AgentClient
from guest_images.build import GuestImage, find_guest
from guest_images.errors import AgentRefusedError
from guest_images.modules import BALLOON, MMIO, PCI
from qmp_glue.board import Board
from qmp_glue.find import accelerator, find_qemu

# Since when mm/page_reporting.c has each parameter, and a suite whose kernel has it.
KNOBS = {
    "page_reporting_order": "Linux 5.14 and later have it",
    "page_reporting_delay_ms": "Linux 7.3 and later have it, such as that of trixie-backports",
}
# While Linux unpacks an initramfs, the archive and what comes out of it are in memory, and its root file system takes
# half of memory at most (mm/shmem.c, shmem_default_max_blocks, 6.12).
COPIES = 2
# What a guest says of itself is shown so far: a release is 64 characters at most (uname(2)), a parameter's value 20.
KERNEL_CHARACTERS = 64
VALUE_CHARACTERS = 40


def prepare(spec: GuestSpec, device: DeviceSpec, *, progress: Callable[[str], None]) -> Setup:
    """Make everything ready for the arm with our device; for_arm() makes the others of it.

    progress: told in a line what takes long. Raises UsageError for a guest without room for its files, or a machine that
    its kernel does not know; QemuNotFoundError, DebianError, ImageError.
    """
    qemu = find_qemu(progress=progress)
    image = find_guest(
        spec.kernel,
        flavour=spec.flavour,
        modules=None if spec.modules is None else Path(spec.modules),
        # A kernel without the balloon's driver is a result, not a mistake. Of two buses a machine has one.
        optional=(BALLOON, PCI, MMIO),
        files=spec.files,
        progress=progress,
    )
    _check_bus(spec, image)
    _check_room(spec, image)
    return Setup(
        qemu=qemu,
        image=image,
        memory_bytes=spec.memory,
        board=Board(kind=spec.machine),
        accelerator=accelerator() if spec.accelerator == "auto" else spec.accelerator,
        cpus=spec.cpus,
        discard=device.discard,
        features=device.features,
        trace=True,  # latencies and refaults are read off it
        append=(*spec.command_line.split(), *knob_words(spec)),
    )


def for_arm(setup: Setup, arm: Arm) -> Setup:
    """Return the same guest on the same machine with an arm's balloon: ours, QEMU's own with reporting, or none."""
    match arm:
        case "ours":
            return replace(setup, balloon="vhost-user", trace=True)
        case "qemu":
            return replace(setup, balloon="built-in", trace=False)
        case "off":
            return replace(setup, balloon="none", trace=False)


def _check_bus(spec: GuestSpec, image: GuestImage) -> None:
    bus, other = (MMIO, "q35") if spec.machine == "microvm" else (PCI, "microvm")
    if bus in image.lacks:
        raise UsageError(
            f"Linux {image.kernel_version} has no {bus}, the bus of guest.machine {spec.machine}: "
            f"take {other}, or a kernel with CONFIG_{bus.upper()}"
        )


def _check_room(spec: GuestSpec, image: GuestImage) -> None:
    size = image.initrd.stat().st_size
    if spec.files and spec.memory < MIN_MEMORY + COPIES * size:
        raise UsageError(
            f"guest.memory is {human(spec.memory)}, and its files come to {human(size)}, which it holds twice while it "
            f"boots: give it {human(MIN_MEMORY + COPIES * size)}, or fewer files"
        )


# Knobs


def knobs(spec: GuestSpec) -> dict[str, int]:
    """Return the kernel's parameters that are asked for, by name."""
    asked = {name: getattr(spec, name) for name in KNOBS}
    return {name: value for name, value in asked.items() if value is not None}


def knob_words(spec: GuestSpec) -> tuple[str, ...]:
    """Return these as words of the kernel's command line."""
    return tuple(f"page_reporting.{name}={value}" for name, value in knobs(spec).items())


async def check_knobs(agent: AgentClient, spec: GuestSpec) -> None:
    """Ask a booted guest whether it took them: a kernel without one ignores the word and says nothing.

    Raises GuestSetupError, which names kernel, knob and fix; AgentError where the guest does not answer.
    """
    for name, value in knobs(spec).items():
        kernel = printable((await agent.ping()).kernel, KERNEL_CHARACTERS)
        try:
            text = await agent.read(f"/sys/module/page_reporting/parameters/{name}")
        except AgentRefusedError as error:
            raise GuestSetupError(
                f"Linux {kernel} has no {name} ({KNOBS[name]}): leave guest.{name} out, or take another kernel"
            ) from error
        if text.strip() != str(value):
            took = printable(text.strip(), VALUE_CHARACTERS)
            raise GuestSetupError(
                f"Linux {kernel} took {took} for {name}, not {value}: give guest.{name} a value that it takes"
            )
