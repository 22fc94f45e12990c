"""A virtio device on the PCI bus of a q35 machine, driven over qtest as a guest's driver would drive it.

Finds the function, gives its BARs addresses (no firmware runs), and speaks the modern transport of virtio 1.3, section
4.1: features, status, queues, notification, ISR, device config. Rings are hostdev.driver's, in guest memory through
qtest. It knows no device type and makes no decisions: a test or a bench does, and may do things out of order.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any

from construct import Construct, Int8ul, Int16ul, Int32ul, Struct

from hostdev.driver import SplitRing
from hostdev.wire.layout import Layout
from qmp_glue.errors import DeadlineError, VirtioError
from qmp_glue.pci import SLOTS, PciFunction

if TYPE_CHECKING:
    from qmp_glue.qtest import Qtest

__all__ = ["PciRing", "Status", "VirtioPciDevice"]

VENDOR_VIRTIO = 0x1AF4
VENDOR_CAPABILITY = 9
RESET_SECONDS = 30.0  # A reset waits for the device's base of every ring.
# qtest answers in 10 us, so watching a used index needs no pause; this one leaves the CPU to the device.
POLL_SECONDS = 20e-6


class Status(IntFlag):
    """device_status (virtio 1.3, 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class CapabilityType(IntEnum):
    """cfg_type of a virtio capability (4.1.4)."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4


@dataclass(frozen=True, slots=True)
class Capability:
    """struct virtio_pci_cap (4.1.4). offset and length: bytes inside the BAR."""

    vendor: int
    next: int
    size: int
    type: int
    bar: int
    id: int
    padding: int
    offset: int
    length: int


CAPABILITY = Layout(
    Struct(
        "vendor" / Int8ul,
        "next" / Int8ul,
        "size" / Int8ul,
        "type" / Int8ul,
        "bar" / Int8ul,
        "id" / Int8ul,
        "padding" / Int16ul,
        "offset" / Int32ul,
        "length" / Int32ul,
    ),
    Capability,
)
CAPABILITY_SIZE = CAPABILITY.declaration.sizeof()

# struct virtio_pci_common_cfg (4.1.4.3), its 64-bit addresses in halves: a driver accesses them so (4.1.3.1).
COMMON = Struct(
    "device_feature_select" / Int32ul,
    "device_feature" / Int32ul,
    "driver_feature_select" / Int32ul,
    "driver_feature" / Int32ul,
    "config_msix_vector" / Int16ul,
    "num_queues" / Int16ul,
    "device_status" / Int8ul,
    "config_generation" / Int8ul,
    "queue_select" / Int16ul,
    "queue_size" / Int16ul,
    "queue_msix_vector" / Int16ul,
    "queue_enable" / Int16ul,
    "queue_notify_off" / Int16ul,
    "queue_desc_low" / Int32ul,
    "queue_desc_high" / Int32ul,
    "queue_driver_low" / Int32ul,
    "queue_driver_high" / Int32ul,
    "queue_device_low" / Int32ul,
    "queue_device_high" / Int32ul,
)


def _fields(declaration: Construct[Any, Any]) -> dict[str, tuple[int, int]]:
    """Return the offset and the width in bytes of each field of a declared register block."""
    assert isinstance(declaration, Struct)
    fields = {}
    offset = 0
    for part in declaration.subcons:
        fields[str(part.name)] = offset, part.sizeof()
        offset += part.sizeof()
    return fields


_COMMON_FIELDS = _fields(COMMON)


class VirtioPciDevice:
    """One modern (or transitional) virtio device on bus 0, its BARs mapped. Raises VirtioError if it is none.

    After a reset of the whole machine it has lost its BARs: make another one.
    """

    def __init__(self, function: PciFunction) -> None:
        self.qtest = function.qtest
        self.function = function
        function.map_bars()
        self._capabilities = _read_capabilities(function)
        at, _capability = self._capabilities[CapabilityType.NOTIFY]
        # notify_off_multiplier follows the capability (4.1.4.4).
        self._notify_multiplier = function.read(at + CAPABILITY_SIZE)

    @classmethod
    def find(cls, qtest: Qtest, bus: int = 0) -> VirtioPciDevice:
        """Return the first virtio device on a bus. Raises VirtioError."""
        for slot in range(SLOTS):
            function = PciFunction(qtest, slot, bus)
            if function.vendor == VENDOR_VIRTIO:
                return cls(function)
        raise VirtioError(f"no virtio device on bus {bus}: give the machine one there")

    def _base(self, kind: CapabilityType) -> int:
        _at, capability = self._capabilities[kind]
        return self.function.bars[capability.bar] + capability.offset

    # Registers

    def read_register(self, name: str) -> int:
        """Read a field of the common configuration, such as "num_queues"."""
        offset, width = _COMMON_FIELDS[name]
        return self._access(self._base(CapabilityType.COMMON) + offset, width)

    def write_register(self, name: str, value: int) -> None:
        """Write a field of the common configuration."""
        offset, width = _COMMON_FIELDS[name]
        self._store(self._base(CapabilityType.COMMON) + offset, width, value)

    def _access(self, address: int, width: int) -> int:
        read = {1: self.qtest.readb, 2: self.qtest.readw, 4: self.qtest.readl}[width]
        return read(address)

    def _store(self, address: int, width: int, value: int) -> None:
        write = {1: self.qtest.writeb, 2: self.qtest.writew, 4: self.qtest.writel}[width]
        write(address, value)

    @property
    def config_address(self) -> int:
        """The guest physical address of the device's own config space."""
        return self._base(CapabilityType.DEVICE)

    def read_config(self, offset: int, width: int) -> int:
        """Read 1, 2 or 4 bytes of the device's own config space, in one access."""
        return self._access(self._base(CapabilityType.DEVICE) + offset, width)

    def write_config(self, offset: int, width: int, value: int) -> None:
        """Write 1, 2 or 4 bytes of the device's own config space, in one access."""
        self._store(self._base(CapabilityType.DEVICE) + offset, width, value)

    def take_isr(self) -> int:
        """Read the ISR status, which clears it: bit 0 a queue, bit 1 the config (4.1.4.5)."""
        return self.qtest.readb(self._base(CapabilityType.ISR))

    # Status and features

    @property
    def status(self) -> Status:
        """device_status as the device has it."""
        return Status(self.read_register("device_status"))

    def add_status(self, status: Status) -> None:
        """Set bits of device_status: a driver never clears one but by a reset (2.1.1)."""
        self.write_register("device_status", self.status | status)

    def reset(self) -> None:
        """Reset the device and wait until it has (4.1.4.3.2). Raises DeadlineError."""
        self.write_register("device_status", 0)
        end = time.monotonic() + RESET_SECONDS
        while self.read_register("device_status"):
            if time.monotonic() > end:
                raise DeadlineError(f"the device is not reset after {RESET_SECONDS:g} s: does it hang?")

    def device_features(self) -> int:
        """All 64 feature bits that the device offers."""
        return self._features("device")

    def driver_features(self) -> int:
        """All 64 feature bits as the device remembers the driver's choice."""
        return self._features("driver")

    def _features(self, whose: str) -> int:
        halves = []
        for select in (0, 1):
            self.write_register(f"{whose}_feature_select", select)
            halves.append(self.read_register(f"{whose}_feature"))
        return halves[0] | halves[1] << 32

    def negotiate(self, features: int) -> None:
        """Take a driver's steps up to FEATURES_OK (3.1.1). Raises VirtioError if the device refuses the choice."""
        self.add_status(Status.ACKNOWLEDGE)
        self.add_status(Status.DRIVER)
        for select in (0, 1):
            self.write_register("driver_feature_select", select)
            self.write_register("driver_feature", features >> 32 * select & 0xFFFF_FFFF)
        self.add_status(Status.FEATURES_OK)
        if not self.status & Status.FEATURES_OK:
            raise VirtioError(f"the device refuses the features {features:#x}: choose of what it offers")

    # Queues

    @property
    def queue_count(self) -> int:
        """num_queues."""
        return self.read_register("num_queues")

    def queue_size(self, index: int) -> int:
        """The size of a queue: the largest after a reset, then what was set; 0 where there is no such queue."""
        self.write_register("queue_select", index)
        return self.read_register("queue_size")

    def enable_queue(self, ring: SplitRing) -> None:
        """Tell the device where a ring lies and how long it is; it is used from DRIVER_OK on."""
        self.write_register("queue_select", ring.index)
        self.write_register("queue_size", ring.size)
        for name, address in (("desc", ring.descriptors), ("driver", ring.available), ("device", ring.used)):
            self.write_register(f"queue_{name}_low", address & 0xFFFF_FFFF)
            self.write_register(f"queue_{name}_high", address >> 32)
        self.write_register("queue_enable", 1)

    def notify_address(self, index: int) -> int:
        """Return the guest physical address that a driver writes a queue's index to (4.1.4.4.1)."""
        self.write_register("queue_select", index)
        offset = self.read_register("queue_notify_off") * self._notify_multiplier
        return self._base(CapabilityType.NOTIFY) + offset


class PciRing(SplitRing):
    """A driver's ring for a queue of a virtio device on the PCI bus, in guest memory at ``address``."""

    def __init__(self, device: VirtioPciDevice, index: int, size: int, address: int) -> None:
        super().__init__(device.qtest, index, size, address)
        self._qtest = device.qtest
        self._notify_address = device.notify_address(index)
        self._last_used = 0

    def notify(self) -> None:
        """Write the queue's index to its notification address."""
        self._qtest.writew(self._notify_address, self.index)

    def wait_call(self, seconds: float) -> bool:
        """Watch the used index: interrupts are not routed here, and the ISR status is the caller's to look at."""
        end = time.monotonic() + seconds
        while (used := self.used_index) == self._last_used:
            if time.monotonic() > end:
                return False
            time.sleep(POLL_SECONDS)
        self._last_used = used
        return True


def _read_capabilities(function: PciFunction) -> dict[int, tuple[int, Capability]]:
    """Find the first capability of each type (4.1.4.1), with where it is in config space."""
    found: dict[int, tuple[int, Capability]] = {}
    for at in function.capabilities():
        if function.read(at) & 0xFF == VENDOR_CAPABILITY:
            capability = CAPABILITY.decode(function.read_bytes(at, CAPABILITY_SIZE))
            if capability.bar in function.bars:
                found.setdefault(capability.type, (at, capability))
    missing = [kind.name for kind in CapabilityType if kind not in found]
    if missing:
        raise VirtioError(
            f"slot {function.slot} lacks the virtio capabilities {', '.join(missing)}: is it a modern device?"
        )
    return found
