"""PCI functions of a q35 machine over qtest: config space, BARs, the capability list.

What firmware would have done and no firmware does here: BARs get addresses, decoding is switched on. Bus 0 only, no
interrupts to route. virtio_pci.py is its user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmp_glue.errors import VirtioError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmp_glue.qtest import Qtest

__all__ = ["SLOTS", "PciFunction"]

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
# A list longer than fits into 256 bytes of config space, 4 bytes each, runs in a circle.
MAX_CAPABILITIES = 48


class PciFunction:
    """Function 0 of a slot of bus 0. ``bars`` holds the addresses by number once map_bars() was called."""

    def __init__(self, qtest: Qtest, slot: int) -> None:
        self.qtest = qtest
        self.slot = slot
        self.bars: dict[int, int] = {}

    def read(self, register: int) -> int:
        """Read 4 aligned bytes of config space."""
        self.qtest.outl(CONFIG_ADDRESS, CONFIG_ENABLE | self.slot << 11 | register)
        return self.qtest.inl(CONFIG_DATA)

    def write(self, register: int, value: int) -> None:
        """Write 4 aligned bytes of config space."""
        self.qtest.outl(CONFIG_ADDRESS, CONFIG_ENABLE | self.slot << 11 | register)
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
