"""The driver's side of a virtqueue, and the guest memory that it lies in.

Half of the device's fake peer: frontend.py speaks vhost-user, this speaks virtio. For tests, benches and modelled guests;
the device never imports it. A driver that lies is as easy as one that does not: the parts of a ring are public.
"""

from __future__ import annotations

import os
import select
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from hostdev import fds
from hostdev.wire import vhost_user as wire
from hostdev.wire.virtqueue import (
    DESCRIPTOR,
    DESCRIPTOR_INDIRECT,
    DESCRIPTOR_NEXT,
    DESCRIPTOR_SIZE,
    DESCRIPTOR_WRITE,
    RING_HEADER_SIZE,
    USED_ELEMENT,
    USED_ELEMENT_SIZE,
    Descriptor,
    descriptor_table_bytes,
)

# Seconds that any answer may take before it counts as missing: generous, for loaded CI machines.
DEADLINE = 30.0

# Where QEMU's address space begins in this model: only the difference to guest addresses matters.
USER_BASE = 0x7F00_0000_0000

_INDEX = struct.Struct("<H")


class FrontendError(Exception):
    """The back end did not answer in time, closed, or answered out of order."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """One entry of a chain: guest physical address, bytes, direction."""

    address: int
    length: int
    writable: bool = False


class GuestMemory:
    """Guest RAM: a shared memfd, as one region at guest address 0 or as the regions given."""

    def __init__(self, size: int, regions: Sequence[wire.MemoryRegion] = ()) -> None:
        """size: bytes of the file. regions: as SET_MEM_TABLE has them; by default one that is all of it."""
        self.size = size
        self.fd = fds.Fd(os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.ftruncate(self.fd.fileno(), size)
        self.regions = tuple(regions) or (wire.MemoryRegion(0, size, USER_BASE, 0),)

    def offset(self, address: int) -> int:
        """Offset in the file of a guest physical address. Raises ValueError for a hole."""
        for region in self.regions:
            if region.guest_address <= address < region.guest_address + region.size:
                return address - region.guest_address + region.mmap_offset
        raise ValueError(f"{address:#x} is not in guest memory")

    def user_address(self, address: int) -> int:
        """The front end's address of a guest physical address. Raises ValueError for a hole."""
        for region in self.regions:
            if region.guest_address <= address < region.guest_address + region.size:
                return address - region.guest_address + region.user_address
        raise ValueError(f"{address:#x} is not in guest memory")

    def write(self, address: int, data: bytes) -> None:
        """Write to guest memory, making pages resident."""
        os.pwrite(self.fd.fileno(), data, self.offset(address))

    def read(self, address: int, length: int) -> bytes:
        """Read guest memory without making anything resident."""
        return os.pread(self.fd.fileno(), length, self.offset(address))

    def footprint(self) -> int:
        """Bytes that the file holds."""
        return os.fstat(self.fd.fileno()).st_blocks * 512

    def close(self) -> None:
        """Give the memory up."""
        self.fd.close()


class Memory(Protocol):
    """Guest memory as a ring needs it: bytes at guest physical addresses."""

    def read(self, address: int, length: int) -> bytes:
        """Read guest memory."""

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory."""


class SplitRing(ABC):
    """The driver side of one split ring, laid out in guest memory from a page-aligned address on.

    How the device is notified, and how its answer is awaited, is for the transport that a subclass knows.
    """

    def __init__(self, memory: Memory, index: int, size: int, address: int) -> None:
        self.index = index
        self.size = size
        self._memory = memory
        self.descriptors = address
        self.available = address + descriptor_table_bytes(size)
        self.used = (self.available + RING_HEADER_SIZE + 2 * size + 2 + 3) & ~3
        self._tables = (self.used + RING_HEADER_SIZE + USED_ELEMENT_SIZE * size + 2 + 15) & ~15
        self.next_available = 0
        self._seen = 0
        self._unclaimed: list[tuple[int, int]] = []
        self._free = list(range(size))
        self._chains: dict[int, list[int]] = {}

    def write_descriptor(self, index: int, descriptor: Descriptor) -> None:
        """Write one entry of the descriptor table."""
        self._memory.write(self.descriptors + DESCRIPTOR_SIZE * index, DESCRIPTOR.encode(descriptor))

    def add(self, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Make a chain of buffers available, without a kick. Returns its head."""
        if indirect:
            return self._add_indirect(buffers)
        indices = [self._free.pop(0) for _ in buffers]
        for index, descriptor in zip(indices, _chain(buffers, indices), strict=True):
            self.write_descriptor(index, descriptor)
        self._chains[indices[0]] = indices
        self.publish(indices[0])
        return indices[0]

    def _add_indirect(self, buffers: Sequence[Buffer]) -> int:
        head = self._free.pop(0)
        # A table of its own for each head, behind the ring; 64 entries are more than Linux's 32.
        table = self._tables + head * 64 * DESCRIPTOR_SIZE
        entries = b"".join(DESCRIPTOR.encode(entry) for entry in _chain(buffers, range(len(buffers))))
        self._memory.write(table, entries)
        self.write_descriptor(head, Descriptor(table, len(entries), DESCRIPTOR_INDIRECT, 0))
        self._chains[head] = [head]
        self.publish(head)
        return head

    def publish(self, head: int) -> None:
        """Put a head into the available ring, whatever the descriptor table says."""
        slot = self.available + RING_HEADER_SIZE + 2 * (self.next_available % self.size)
        self._memory.write(slot, _INDEX.pack(head))
        self.next_available = (self.next_available + 1) & 0xFFFF
        self.set_available_index(self.next_available)

    def set_available_index(self, index: int) -> None:
        """Write the available index: what a lying driver does."""
        self._memory.write(self.available + 2, _INDEX.pack(index))

    @abstractmethod
    def notify(self) -> None:
        """Kick the device."""

    @abstractmethod
    def wait_call(self, seconds: float) -> bool:
        """Wait until the device may have returned something. Returns False if nothing came in time."""

    def offer(self, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Make a chain available and kick. Returns its head."""
        head = self.add(buffers, indirect=indirect)
        self.notify()
        return head

    @property
    def used_index(self) -> int:
        """The index that the device has published."""
        (index,) = _INDEX.unpack(self._memory.read(self.used + 2, 2))
        return int(index)

    def take_used(self) -> list[tuple[int, int]]:
        """Take what the device has returned and no wait_used() has taken: pairs of head and length."""
        taken, self._unclaimed = self._unclaimed, []
        while self._seen != self.used_index:
            at = self.used + RING_HEADER_SIZE + USED_ELEMENT_SIZE * (self._seen % self.size)
            element = USED_ELEMENT.decode(self._memory.read(at, USED_ELEMENT_SIZE))
            self._free += self._chains.pop(element.id, [])
            self._seen = (self._seen + 1) & 0xFFFF
            taken.append((element.id, element.length))
        return taken

    def wait_used(self, head: int, deadline: float = DEADLINE) -> int:
        """Wait, by what the device signals, until head is returned. Returns the used length. Raises FrontendError."""
        end = time.monotonic() + deadline
        while True:
            self._unclaimed = self.take_used()
            for element in self._unclaimed:
                if element[0] == head:
                    self._unclaimed.remove(element)
                    return element[1]
            if not self.wait_call(max(0.0, end - time.monotonic())):
                raise FrontendError(f"ring {self.index}: chain {head} was not returned within {deadline} s")


class DriverRing(SplitRing):
    """A ring whose device is behind two eventfds, as vhost-user has it."""

    def __init__(self, memory: GuestMemory, index: int, size: int, address: int) -> None:
        super().__init__(memory, index, size, address)
        self.kick = fds.Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self.call = fds.Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def notify(self) -> None:
        """Kick the device."""
        os.eventfd_write(self.kick.fileno(), 1)

    def wait_call(self, seconds: float) -> bool:
        """Wait for the call eventfd and reset it."""
        poll = select.poll()
        poll.register(self.call.fileno(), select.POLLIN)
        if not poll.poll(seconds * 1000):
            return False
        os.eventfd_read(self.call.fileno())
        return True

    def close(self) -> None:
        """Close the eventfds."""
        self.kick.close()
        self.call.close()


def _chain(buffers: Sequence[Buffer], indices: Sequence[int]) -> Iterator[Descriptor]:
    for position, buffer in enumerate(buffers):
        last = position == len(buffers) - 1
        flags = (DESCRIPTOR_WRITE if buffer.writable else 0) | (0 if last else DESCRIPTOR_NEXT)
        yield Descriptor(buffer.address, buffer.length, flags, 0 if last else indices[position + 1])
