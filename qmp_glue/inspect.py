"""What in somebody's QEMU would make giving memory back unsafe or useless, said before it hurts.

Two looks with the same rules: at a command line before it runs, and at a running QEMU over QMP; machine_setup.py and
running_setup.py read them. Each finding names its fix, nothing is changed. QEMU's own balloon asks whether discarding
is inhibited (ram_block_discard_is_disabled(), incoming postcopy, background snapshot), which a process outside cannot:
the rules marked unsafe are QEMU's reasons, and ours. attach.py and the command check use them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qmp_glue.machine_setup import Backend, Setup, setup_of
from qmp_glue.migration_rules import migration_rule
from qmp_glue.running_setup import Executes, running_setup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Executes", "Finding", "filesystem_type", "inspect_arguments", "inspect_running", "judge"]

_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "hugetlbfs", "ramfs"})
# Objects that encrypt or measure guest memory: the host cannot take pages out from under them (target/i386/sev.c,
# accel/kvm/kvm-all.c for guest_memfd). confidential-guest-support= of the machine names those of other kinds.
_CONFIDENTIAL = re.compile(r"(sev|tdx)(-snp)?-guest|s390-pv-guest|pef-guest|rme-guest")
# Those of libblkio that map guest memory, which may pin it (block/blkio.c, may-pin-mem-regions).
_PINNING_BLKIO = re.compile(r"virtio-blk-(vfio-pci|vhost-vdpa|vhost-user)")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``rule`` is its stable name, ``message`` says what and how to put it right.

    ``effect`` tells why it matters. unsafe: what is given back may corrupt the guest or end it, so that a device may be
    there only while it is inhibited; useless: nothing comes back to the host; fatal: QEMU does not start, or aborts.
    """

    severity: Literal["error", "warning"]
    rule: str
    message: str
    effect: Literal["unsafe", "useless", "fatal"]


def inspect_arguments(
    argv: Sequence[str], *, filesystem: Callable[[str], str] | None = None
) -> list[Finding]:
    """Judge a QEMU command line, given with or without the program's name. ``filesystem`` tells the type under a path."""
    return judge(setup_of(argv), filesystem=filesystem or filesystem_type)


async def inspect_running(
    qemu: Executes, *, adding: int = 0, filesystem: Callable[[str], str] | None = None
) -> list[Finding]:
    """Judge a running QEMU, to which so many balloons are about to be added. Raises what its execute() raises."""
    return judge(await running_setup(qemu), adding=adding, filesystem=filesystem or filesystem_type)


def judge(setup: Setup, *, adding: int = 0, filesystem: Callable[[str], str]) -> list[Finding]:
    """Apply all rules."""
    return [
        *_memory_findings(setup, filesystem),
        *_pinning_findings(setup),
        *_migration_findings(setup),
        *_balloon_findings(setup, adding),
    ]


def _memory_findings(setup: Setup, filesystem: Callable[[str], str]) -> Iterator[Finding]:
    if not setup.ram:
        hint = (
            f"add memory-backend={setup.unused[0]} to -machine"
            if setup.unused
            else "add -object memory-backend-memfd,id=mem,size=SIZE,share=on and -machine memory-backend=mem"
        )
        message = f"guest RAM is anonymous memory of QEMU alone: {hint}"
        yield Finding("error", "memory-anonymous", message, "useless")
    for backend in setup.ram:
        yield from _backend_findings(backend, filesystem)
    if None not in (setup.memory_bytes, setup.backend_bytes) and setup.memory_bytes != setup.backend_bytes:
        message = (
            f"memory backends hold {setup.backend_bytes} bytes, -m asks for {setup.memory_bytes}: "
            "give both the same size"
        )
        yield Finding("error", "memory-size", message, "fatal")
    if setup.memory_locked:
        message = (
            "-overcommit mem-lock is to keep all guest memory in place: the device takes pages out of it all the "
            "same, and they are locked again one by one; leave out mem-lock or the balloon"
        )
        yield Finding("warning", "mem-lock", message, "useless")


def _backend_findings(backend: Backend, filesystem: Callable[[str], str]) -> Iterator[Finding]:
    """QEMU tells a back end of no region that is anonymous or private (hw/virtio/vhost.c, vhost_section(), 11.1)."""
    name = f"memory backend {backend.name!r}"
    if backend.kind == "memory-backend-ram":
        message = (
            f"{name} is anonymous memory, which no other process can map: make it a memory-backend-memfd"
        )
        yield Finding("error", "memory-anonymous", message, "useless")
    elif not backend.shared:
        yield Finding("error", "memory-unshared", f"{name} is not shared: add share=on", "useless")
    kind = filesystem(backend.path) if backend.path else "tmpfs"
    if kind not in _MEMORY_FILE_SYSTEMS:
        message = (
            f"{name} is a file on {kind}: a hole frees disk, not memory, and what the file held is gone; "
            "use memory-backend-memfd or /dev/shm"
        )
        yield Finding("error", "memory-on-disk", message, "unsafe")
    if backend.hugetlb or kind == "hugetlbfs":
        message = (
            f"{name} is of huge pages: one that is given back may be taken by another process, and the guest's next "
            "touch then kills QEMU; leave out hugetlb and use transparent huge pages"
        )
        yield Finding("error", "memory-hugetlb", message, "unsafe")


def _pinning_findings(setup: Setup) -> Iterator[Finding]:
    """A pinned page keeps its old content for the hardware while the guest gets a new one: the two part for good."""
    for rule, message in _pinning(setup):
        yield Finding("error", rule, message, "unsafe")


def _pinning(setup: Setup) -> Iterator[tuple[str, str]]:
    for device in setup.devices:
        if device.startswith("vfio-"):
            yield (
                "vfio",
                f"{device} lets hardware write into pages that were given back: remove it or the balloon",
            )
        elif device == "pvrdma":
            yield "rdma", f"{device} pins guest memory for the network: remove it or the balloon"
    if setup.vdpa_netdev or any(device.startswith("vhost-vdpa") for device in setup.devices):
        yield "vdpa", "vhost-vdpa pins guest memory for hardware: use a vhost or vhost-user device instead"
    if "iommufd" in setup.objects:
        yield "iommufd", "an iommufd is there to map all guest memory for hardware: remove it or the balloon"
    if setup.confidential or any(map(_CONFIDENTIAL.fullmatch, setup.objects)):
        kinds = [kind for kind in setup.objects if _CONFIDENTIAL.fullmatch(kind)] or [setup.confidential]
        message = "encrypts guest memory, which the host then cannot take back: remove it or the balloon"
        yield "confidential", f"{', '.join(kinds)} {message}"
    if "nvme" in setup.block_drivers:
        message = "the block driver nvme:// maps all guest memory for the disk: let the host's driver have it instead"
        yield "nvme", message
    for driver in sorted(filter(_PINNING_BLKIO.fullmatch, setup.block_drivers)):
        yield (
            "blkio",
            f"the block driver {driver} may pin guest memory: use the host's driver for that disk instead",
        )


def _migration_findings(setup: Setup) -> Iterator[Finding]:
    found = migration_rule(setup)
    if found is not None:
        severity, rule, message = found
        yield Finding(severity, rule, message, "unsafe")


def _balloon_findings(setup: Setup, adding: int) -> Iterator[Finding]:
    if setup.balloons + adding > 1:
        message = (
            f"there are {setup.balloons} balloons, and a guest's driver serves one: remove all but one"
            if not adding
            else "the machine has a balloon, and a guest's driver serves one: detach that one, or leave it at that"
        )
        yield Finding("error", "two-balloons", message, "useless")
    for name in setup.reconnecting:
        message = (
            f"chardev {name!r} reconnects, and QEMU aborts when the device's does: remove reconnect from it"
        )
        yield Finding("error", "reconnect", message, "fatal")


def filesystem_type(path: str) -> str:
    """Return the type of the file system that holds this path, by the longest mount point above it (proc(5))."""
    resolved = Path(path).resolve()
    best, kind = -1, "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, found, *_ = line.split()
        mount = Path(point.replace("\\040", " "))
        if resolved.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), found
    return kind
