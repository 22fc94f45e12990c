"""PCI functions of a q35 machine over qtest: config space, BARs, the capability list.

What firmware would have done and no firmware does here: BARs get addresses, decoding is switched on. Bus 0, and what is
behind one root port; no interrupts to route. virtio_pci.py is its user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmp_glue.errors import VirtioError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmp_glue.qtest import Qtest

__all__ = ["SLOTS", "PciFunction", "eject", "open_root_port"]

# PCI 3.0, 3.2.2.3.2: configuration mechanism #1.
CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
CONFIG_ENABLE = 1 << 31
SLOTS = 32
# PCI 3.0, 6.1.
REGISTER_VENDOR, REGISTER_COMMAND, REGISTER_BAR, REGISTER_CAPABILITIES = 0x00, 0x04, 0x10, 0x34
COMMAND_IO, COMMAND_MEMORY, COMMAND_MASTER = 1, 2, 4
BARS = 6
BAR_IO, BAR_64BIT = 1, 4
# In q35's 32-bit hole: above any RAM that a machine without a guest needs, below the IOAPIC at 0xfec00000.
MEMORY_WINDOW = 0xE000_0000
# Above the I/O ports that q35's chipset claims.
IO_WINDOW = 0xC000
# PCI-to-PCI Bridge 1.2, 3.2.5: bus numbers, and the windows of ports and of memory that are passed on.
REGISTER_BUSES, REGISTER_IO_WINDOW, REGISTER_MEMORY_WINDOW = 0x18, 0x1C, 0x20
ROOT_PORT = 0x000C_1B36  # QEMU's pcie-root-port: device and vendor ID
# QEMU, docs/specs/acpi_pci_hotplug.rst; where q35 has it: include/hw/acpi/ich9.h, ACPI_PCIHP_ADDR_ICH9.
HOTPLUG_PORT = 0xCC0
HOTPLUG_EJECT, HOTPLUG_BUS = 0x08, 0x10
# A list longer than fits into 256 bytes of config space, 4 bytes each, runs in a circle.
MAX_CAPABILITIES = 48


class PciFunction:
    """Function 0 of a slot. ``bars`` holds the addresses by number once map_bars() was called."""

    def __init__(self, qtest: Qtest, slot: int, bus: int = 0) -> None:
        self.qtest = qtest
        self.slot = slot
        self._where = CONFIG_ENABLE | bus << 16 | slot << 11
        self.bars: dict[int, int] = {}

    def read(self, register: int) -> int:
        """Read 4 aligned bytes of config space."""
        self.qtest.outl(CONFIG_ADDRESS, self._where | register)
        return self.qtest.inl(CONFIG_DATA)

    def write(self, register: int, value: int) -> None:
        """Write 4 aligned bytes of config space."""
        self.qtest.outl(CONFIG_ADDRESS, self._where | register)
        self.qtest.outl(CONFIG_DATA, value)

    @property
    def vendor(self) -> int:
        """The vendor ID; 0xffff in an empty slot."""
        return self.read(REGISTER_VENDOR) & 0xFFFF

    @property
    def device(self) -> int:
        """The device ID."""
        return self.read(REGISTER_VENDOR) >> 16

    def map_bars(self) -> None:
        """Give each BAR the next aligned address of its window, then decode and allow DMA."""
        memory, ports = MEMORY_WINDOW, IO_WINDOW
        index = 0
        while index < BARS:
            kind, size = self._size_bar(index)
            if size and kind & BAR_IO:
                self.bars[index] = (ports + size - 1) & -size
                ports = self.bars[index] + size
            elif size:
                self.bars[index] = (memory + size - 1) & -size
                memory = self.bars[index] + size
            self.write(REGISTER_BAR + 4 * index, self.bars.get(index, 0))
            index += 1
            if not kind & BAR_IO and kind & BAR_64BIT:
                self.write(REGISTER_BAR + 4 * index, 0)
                index += 1
        self.write(REGISTER_COMMAND, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER)

    def _size_bar(self, index: int) -> tuple[int, int]:
        """Return a BAR's low bits and its size in bytes: what it keeps of all ones (PCI 3.0, 6.2.5.1)."""
        register = REGISTER_BAR + 4 * index
        self.write(register, 0xFFFF_FFFF)
        kept = self.read(register)
        if kept & BAR_IO:
            return kept, -(kept & ~0x3) & 0xFFFF
        return kept, -(kept & ~0xF) & 0xFFFF_FFFF

    def capabilities(self) -> Iterator[int]:
        """Yield where in config space each capability begins. Raises VirtioError for a list without an end."""
        at = self.read(REGISTER_CAPABILITIES) & 0xFC
        for _ in range(MAX_CAPABILITIES):
            if not at:
                return
            yield at
            at = self.read(at) >> 8 & 0xFC
        raise VirtioError(f"the capability list of slot {self.slot} has no end: is the device reset?")

    def read_bytes(self, register: int, length: int) -> bytes:
        """Read a piece of config space that begins on 4 bytes."""
        words = (self.read(register + step).to_bytes(4, "little") for step in range(0, length, 4))
        return b"".join(words)[:length]


def open_root_port(qtest: Qtest, bus: int) -> None:
    """Make what is behind the first root port bus ``bus``, and pass on to it what map_bars() uses. Raises VirtioError."""
    for slot in range(SLOTS):
        port = PciFunction(qtest, slot)
        if port.read(REGISTER_VENDOR) == ROOT_PORT:
            port.write(REGISTER_BUSES, bus << 16 | bus << 8)
            port.write(REGISTER_IO_WINDOW, (IO_WINDOW >> 8) * 0x101)
            port.write(REGISTER_MEMORY_WINDOW, (MEMORY_WINDOW >> 16) * 0x1_0001)
            port.write(REGISTER_COMMAND, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER)
            return
    raise VirtioError("no root port on bus 0: give the board one")


def eject(qtest: Qtest, slot: int = 0) -> None:
    """Let go of what is in a slot behind the first root port, as the guest's ACPI does when device_del has asked for it."""
    qtest.outl(HOTPLUG_PORT + HOTPLUG_BUS, 0)
    qtest.outl(HOTPLUG_PORT + HOTPLUG_EJECT, 1 << slot)
