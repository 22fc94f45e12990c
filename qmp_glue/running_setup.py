"""What a running machine is made of, read over QMP for inspect.py: only queries, and none that crashes QEMU.

Not to be had this way, and so left to the command line's reader: sizes (QEMU does not start when they differ) and
-overcommit mem-lock, which no query tells.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from qmp_glue.errors import CommandFailedError
from qmp_glue.machine_setup import Backend, Setup

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

__all__ = ["Executes", "children", "entries", "property_of", "running_setup"]

# qapi/migration.json, MigrationStatus: all others mean that guest memory is being read, or awaited.
_AT_REST = frozenset({"", "none", "cancelled", "completed", "failed"})
_CHILD = re.compile(r"child<(.*)>")


class Executes(Protocol):
    """What can ask a QEMU: a Monitor or a VirtualMachine."""

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Awaitable[object]:
        """Send a command and return its answer."""


async def running_setup(qemu: Executes) -> Setup:
    """Ask for what the rules need. Raises what execute() raises."""
    objects = dict(await children(qemu, "/objects"))
    peripherals = [
        kind
        for folder in ("/machine/peripheral", "/machine/peripheral-anon")
        for _, kind in await children(qemu, folder)
    ]
    network = await qemu.execute("human-monitor-command", {"command-line": "info network"})
    nodes = entries(await qemu.execute("query-named-block-nodes", {"flat": True}))
    return Setup(
        ram=tuple(await _backends(qemu, objects)),
        devices=tuple(peripherals),
        objects=tuple(objects.values()),
        confidential=str(await property_of(qemu, "/machine", "confidential-guest-support") or ""),
        balloons=await _count_balloons(qemu),
        vdpa_netdev="type=vhost-vdpa" in str(network),
        block_drivers=tuple(str(node.get("drv", "")) for node in nodes),
        incoming="another QEMU" if await _status(qemu, "query-status") == "inmigrate" else "",
        migration=await _migration(qemu),
        capabilities=await _capabilities(qemu),
    )


async def _status(qemu: Executes, query: str) -> str:
    answer = await qemu.execute(query)
    return str(answer.get("status", "")) if isinstance(answer, dict) else ""


async def _migration(qemu: Executes) -> str:
    status = await _status(qemu, "query-migrate")
    return "" if status in _AT_REST else status


async def _capabilities(qemu: Executes) -> frozenset[str]:
    """Name what is on, as -global migration.NAME has it: x-colo is the one with an x- in QMP (11.1)."""
    answer = entries(await qemu.execute("query-migrate-capabilities"))
    return frozenset(str(entry["capability"]).removeprefix("x-") for entry in answer if entry.get("state"))


async def _count_balloons(qemu: Executes) -> int:
    """Count what is a balloon to the guest, whoever serves it. QEMU calls having no virtio device at all an error."""
    try:
        answer = await qemu.execute("x-query-virtio")
    except CommandFailedError:
        return 0
    return sum(entry.get("name") == "virtio-balloon" for entry in entries(answer))


async def _backends(qemu: Executes, objects: Mapping[str, str]) -> list[Backend]:
    """List guest RAM's backends; that of a plain -m has the machine's own name for it, such as pc.ram."""
    found = []
    for entry in entries(await qemu.execute("query-memdev")):
        name = str(entry.get("id", ""))
        kind, path = objects.get(name, ""), f"/objects/{name}"
        hugetlb = kind == "memory-backend-memfd" and await property_of(qemu, path, "hugetlb")
        mem_path = await property_of(qemu, path, "mem-path") if kind == "memory-backend-file" else ""
        found.append(
            Backend(kind, name, bool(entry["share"]), hugetlb=bool(hugetlb), path=str(mem_path or ""))
        )
    return found


async def property_of(qemu: Executes, path: str, name: str) -> object:
    """Return a QOM property, or None where this object has none of that name."""
    try:
        return await qemu.execute("qom-get", {"path": path, "property": name})
    except CommandFailedError:
        return None


async def children(qemu: Executes, path: str) -> list[tuple[str, str]]:
    """Return (name, type) of an object's children: QEMU writes their types as child<TYPE>."""
    answer = await qemu.execute("qom-list", {"path": path})
    matched = ((str(entry["name"]), _CHILD.fullmatch(str(entry["type"]))) for entry in entries(answer))
    return [(name, kind[1]) for name, kind in matched if kind is not None]


def entries(answer: object) -> list[dict[str, object]]:
    """Narrow an answer that QEMU's schema defines as an array of objects."""
    return [entry for entry in answer if isinstance(entry, dict)] if isinstance(answer, list) else []
