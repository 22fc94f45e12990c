"""What in somebody's QEMU would make giving memory back unsafe or useless, said before it hurts.

Two looks with the same rules: at a command line before it runs, and at a running QEMU over QMP; machine_setup.py reads
both. Each finding names its fix, nothing is changed. The device's users call it on their own command lines; doctor
prints it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qmp_glue.machine_setup import Backend, Executes, Setup, running_setup, setup_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Executes", "Finding", "filesystem_type", "inspect_arguments", "inspect_running", "judge"]

_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "hugetlbfs", "ramfs"})
# Objects that encrypt or measure guest memory: the host cannot take pages out from under them.
_CONFIDENTIAL = re.compile(r"(sev|tdx)(-snp)?-guest")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``rule`` is its stable name, ``message`` says what and how to put it right."""

    severity: Literal["error", "warning"]
    rule: str
    message: str


def inspect_arguments(
    argv: Sequence[str], *, filesystem: Callable[[str], str] | None = None
) -> list[Finding]:
    """Judge a QEMU command line, given with or without the program's name. ``filesystem`` tells the type under a path."""
    return judge(setup_of(argv), filesystem=filesystem or filesystem_type)


async def inspect_running(qemu: Executes, *, filesystem: Callable[[str], str] | None = None) -> list[Finding]:
    """Judge a running QEMU. Raises what its execute() raises."""
    return judge(await running_setup(qemu), filesystem=filesystem or filesystem_type)


def judge(setup: Setup, *, filesystem: Callable[[str], str]) -> list[Finding]:
    """Apply all rules."""
    return [*_memory_findings(setup, filesystem), *_device_findings(setup)]


def _memory_findings(setup: Setup, filesystem: Callable[[str], str]) -> Iterator[Finding]:
    if not setup.ram:
        hint = (
            f"add memory-backend={setup.unused[0]} to -machine"
            if setup.unused
            else (
                "add -object memory-backend-memfd,id=mem,size=SIZE,share=on and -machine memory-backend=mem"
            )
        )
        yield Finding("error", "memory-anonymous", f"guest RAM is anonymous memory of QEMU alone: {hint}")
    for backend in setup.ram:
        yield from _backend_findings(backend, filesystem)
    if None not in (setup.memory_bytes, setup.backend_bytes) and setup.memory_bytes != setup.backend_bytes:
        yield Finding(
            "error",
            "memory-size",
            f"memory backends hold {setup.backend_bytes} bytes, -m asks for {setup.memory_bytes}: give both the same size",
        )


def _backend_findings(backend: Backend, filesystem: Callable[[str], str]) -> Iterator[Finding]:
    name = f"memory backend {backend.name!r}"
    if backend.kind == "memory-backend-ram":
        message = (
            f"{name} is anonymous memory, which no other process can map: make it a memory-backend-memfd"
        )
        yield Finding("error", "memory-anonymous", message)
    elif not backend.shared:
        yield Finding("error", "memory-unshared", f"{name} is not shared: add share=on")
    kind = filesystem(backend.path) if backend.path else "tmpfs"
    if kind not in _MEMORY_FILE_SYSTEMS:
        message = (
            f"{name} is a file on {kind}: a hole frees disk, not memory; use memory-backend-memfd or /dev/shm"
        )
        yield Finding("error", "memory-on-disk", message)
    if backend.hugetlb or kind == "hugetlbfs":
        message = (
            f"{name} is of huge pages: one that is given back may be taken by another process, and the guest's next "
            "touch then kills QEMU; leave out hugetlb and use transparent huge pages"
        )
        yield Finding("error", "memory-hugetlb", message)


def _device_findings(setup: Setup) -> Iterator[Finding]:
    for device in setup.devices:
        if device.startswith("vfio-"):
            message = (
                f"{device} lets hardware write into pages that were given back: remove it or the balloon"
            )
            yield Finding("error", "vfio", message)
    if setup.vdpa_netdev or any(device.startswith("vhost-vdpa") for device in setup.devices):
        message = "vhost-vdpa pins guest memory for hardware: use a vhost or vhost-user device instead"
        yield Finding("error", "vdpa", message)
    for kind in filter(_CONFIDENTIAL.fullmatch, setup.objects):
        message = (
            f"{kind} encrypts guest memory, which the host then cannot take back: remove it or the balloon"
        )
        yield Finding("error", "confidential", message)
    if setup.balloons > 1:
        message = f"there are {setup.balloons} balloons, and a guest's driver serves one: remove all but one"
        yield Finding("error", "two-balloons", message)
    for name in setup.reconnecting:
        message = (
            f"chardev {name!r} reconnects, and QEMU aborts when the device's does: remove reconnect from it"
        )
        yield Finding("error", "reconnect", message)


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
