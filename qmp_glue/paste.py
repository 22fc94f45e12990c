"""What people paste into their own tools to have the device: QEMU's words, and libvirt's XML.

Pure: no path is looked at, nothing is started. The machines of the lab are commandline.py's, whole ones; here is only what
a machine of somebody else needs besides: shared memory, and the device. The commands qemu-args and libvirt-xml print it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias
from xml.etree import ElementTree as ET

from qmp_glue.board import RAM_ALIGNMENT_BYTES
from qmp_glue.device_words import device_option, socket_option
from qmp_glue.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qmp_glue.device_words import Transport

__all__ = ["MACHINES", "MachineType", "libvirt_domain", "libvirt_fragments", "qemu_arguments", "size_text"]

MachineType: TypeAlias = Literal["q35", "microvm"]

# What each machine type needs to carry the device, by the transports that it has.
MACHINES: dict[MachineType, dict[Transport, str]] = {
    "q35": {"pci": "q35"},
    "microvm": {"mmio": "microvm,acpi=on,pcie=off", "pci": "microvm,acpi=on,pcie=on"},
}
CHARDEV = "balloon"
MEMORY_ID = "mem"
# Without it the guest's driver gets a device of before virtio 1.0 (hw/virtio/virtio-mmio.c).
MODERN_MMIO = ("-global", "virtio-mmio.force-legacy=false")
# libvirt's schema and its documentation of "QEMU command-line passthrough" (drvqemu).
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
_UNITS = (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10))


def qemu_arguments(
    socket_path: Path,
    *,
    memory_bytes: int | None,
    machine: MachineType = "q35",
    transport: Transport | None = None,
) -> list[str]:
    """Return the words for QEMU's command line. Without memory only the device: for a machine whose memory is shared.

    Raises MachineError for what QEMU would refuse, and for a path that cannot be pasted.
    """
    _check_path(socket_path)
    if transport is None:
        transport = next(iter(MACHINES[machine]))
    if transport not in MACHINES[machine]:
        raise MachineError(f"{machine} has no {transport}: choose {' or '.join(MACHINES[machine])}")
    words = []
    if memory_bytes is not None:
        kind = MACHINES[machine][transport]
        words = ["-machine", f"{kind},memory-backend={MEMORY_ID}", *_memory(memory_bytes)]
    words += MODERN_MMIO if transport == "mmio" else ()
    return [*words, *_device(socket_path, transport)]


def _memory(memory_bytes: int) -> list[str]:
    size = size_text(memory_bytes)
    return ["-object", f"memory-backend-memfd,id={MEMORY_ID},size={size},share=on", "-m", size]


def _device(socket_path: Path, transport: Transport) -> list[str]:
    device = device_option(CHARDEV, transport=transport)
    return ["-chardev", socket_option(CHARDEV, socket_path), "-device", device]


def size_text(size: int) -> str:
    """Write bytes as QEMU reads them back exactly: 1G, 1536M. Raises MachineError for what is no size of memory."""
    if size <= 0 or size % RAM_ALIGNMENT_BYTES:
        raise MachineError(f"memory of {size} bytes: give a positive multiple of {RAM_ALIGNMENT_BYTES} bytes")
    unit, factor = next((unit, factor) for unit, factor in _UNITS if size % factor == 0)
    return f"{size // factor}{unit}"


def libvirt_fragments(socket_path: Path) -> str:
    """Return the elements to put into a domain, at its top level; what is in <devices> goes into the domain's own."""
    elements = list(_libvirt_elements(socket_path))
    return "\n".join(_text(element) for element in elements)


def libvirt_domain(socket_path: Path, memory_bytes: int) -> str:
    """Return a minimal domain with the device: no disk, no network, to be filled in. Raises MachineError."""
    size_text(memory_bytes)
    domain = ET.Element("domain", {"type": "kvm"})
    ET.SubElement(domain, "name").text = "balloon"
    ET.SubElement(domain, "memory", {"unit": "bytes"}).text = str(memory_bytes)
    ET.SubElement(domain, "vcpu").text = "1"
    ET.SubElement(ET.SubElement(domain, "os"), "type", {"arch": "x86_64", "machine": "q35"}).text = "hvm"
    domain.extend(_libvirt_elements(socket_path))
    return _text(domain)


def _libvirt_elements(socket_path: Path) -> Iterator[ET.Element]:
    _check_path(socket_path)
    backing = ET.Element("memoryBacking")
    ET.SubElement(backing, "source", {"type": "memfd"})
    ET.SubElement(backing, "access", {"mode": "shared"})
    yield backing
    devices = ET.Element("devices")
    # libvirt adds a balloon of QEMU's own unless told not to, and a guest's driver serves one.
    ET.SubElement(devices, "memballoon", {"model": "none"})
    yield devices
    commandline = ET.Element(f"{{{QEMU_NAMESPACE}}}commandline")
    for word in _device(socket_path, "pci"):
        ET.SubElement(commandline, f"{{{QEMU_NAMESPACE}}}arg", {"value": word})
    yield commandline


def _text(element: ET.Element) -> str:
    ET.register_namespace("qemu", QEMU_NAMESPACE)
    ET.indent(element)
    return ET.tostring(element, encoding="unicode")


def _check_path(path: Path) -> None:
    """Raise MachineError for what neither a line of a shell nor XML can hold."""
    if not str(path).isprintable():
        raise MachineError(f"{str(path)!r} has characters that cannot be pasted: choose another socket path")
