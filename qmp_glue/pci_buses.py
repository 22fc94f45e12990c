"""Where a PCI device can be plugged into a running QEMU: asked over QMP, with queries only.

query-pci does not tell: it shows no bus behind a bridge before firmware or guest has numbered it. So the buses are found
in QEMU's object tree, where a bus lists what is on it and what handles plugging. Used by attach.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmp_glue.errors import AttachError
from qmp_glue.running_setup import children, entries, property_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qmp_glue.running_setup import Executes

__all__ = ["Bus", "find_buses", "free_bus"]

# A PCI Express port leads to one device; a conventional bus has 32 slots, of which a bridge's controller may take one.
_SLOTS = {"PCIE": 1, "PCI": 31}
_FOLDERS = ("/machine/peripheral", "/machine/peripheral-anon")


@dataclass(frozen=True)
class Bus:
    """A PCI bus: ``name`` is what device_add takes, ``kind`` PCI or PCIE, ``devices`` how many are on it."""

    name: str
    kind: str
    devices: int
    pluggable: bool

    @property
    def is_free(self) -> bool:
        """Whether a device can be plugged in now."""
        return self.pluggable and self.devices < _SLOTS[self.kind]


async def free_bus(qemu: Executes) -> str:
    """Return the name of a bus with room: a port of its own goes before a place on a shared bus. Raises AttachError."""
    found = [bus async for bus in find_buses(qemu)]
    free = sorted((bus for bus in found if bus.is_free), key=lambda bus: bus.kind != "PCIE")
    if not free:
        seen = ", ".join(f"{bus.name} ({bus.devices} on it)" for bus in found if bus.pluggable) or "none"
        raise AttachError(
            f"no free hot-pluggable PCI bus (hot-pluggable are: {seen}): start QEMU with "
            "-device pcie-root-port,id=port0,chassis=1, or name a bus"
        )
    return free[0].name


async def find_buses(qemu: Executes) -> AsyncIterator[Bus]:
    """Yield the buses of the board and of plugged bridges and ports."""
    for name, _ in await children(qemu, "/machine"):
        async for bus in _buses_of(qemu, f"/machine/{name}"):
            yield bus
    for folder in _FOLDERS:
        for name, _ in await children(qemu, folder):
            async for bus in _buses_of(qemu, f"{folder}/{name}"):
                yield bus


async def _buses_of(qemu: Executes, owner: str) -> AsyncIterator[Bus]:
    for name, kind in await children(qemu, owner):
        if kind in _SLOTS:
            properties = {
                str(entry["name"])
                for entry in entries(await qemu.execute("qom-list", {"path": f"{owner}/{name}"}))
            }
            devices = sum(entry.startswith("child[") for entry in properties)
            yield Bus(name, kind, devices, await _is_pluggable(qemu, owner, name, properties))


async def _is_pluggable(qemu: Executes, owner: str, name: str, properties: set[str]) -> bool:
    """Whether ACPI plugs here, or else the PCI Express port itself, where ACPI is told to leave bridges alone.

    ACPI numbers each bus that it serves (hw/acpi/pcihp.c, acpi_pcihp_is_hotpluggable_bus()). A port is named as its own
    bus's handler even where it is switched off. The controllers of conventional bridges (SHPC) are left out: they take
    no device without a slot number.
    """
    if "acpi-pcihp-bsel" in properties:
        return True
    if await property_of(qemu, f"{owner}/{name}", "hotplug-handler") != owner:
        return False
    return await property_of(qemu, owner, "hotplug") is True
