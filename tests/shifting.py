"""Guest memory that is another at each look: whatever the device has read of it is overwritten at once. Not a test.

After V-Shuttle: a device that reads a byte twice, to check the one and use the other, is found out, for what it read first
is written down here.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from unittest import mock

from hostdev import virtqueue
from hostdev.memory import MemoryTable
from hostdev.wire.balloon import Role
from hostdev.wire.virtqueue import DESCRIPTOR, DESCRIPTOR_STRUCT, Descriptor
from tests.hostile_driver import LIST, SIZE, TABLE
from tests.hostile_guest import NAMEABLE, HostileGuest
from tests.oracle_pages import given_back
from tests.oracle_rings import Outcome, judge

# Chains of one ring, until the available index stands still.
MOST_CHAINS = 30
_INDEX_SLOT, _RING_SLOT = 1, 2
# Not the number of any entry.
_FAR = 1 << 15


@dataclass
class Reading:
    """A chain as it was read first: its head, the ring's descriptors in the order of reading, and what of buffers."""

    head: int
    ring: list[Descriptor] = field(default_factory=list)
    buffers: list[tuple[int, int, bytes | None]] = field(default_factory=list)

    def outcome(self) -> Outcome:
        """What is to be made of it. A chain that is followed further than the ring is long is refused, whatever for."""
        table = [
            replace(entry, next=number + 1 if entry.next < SIZE else _FAR)
            for number, entry in enumerate(self.ring)
        ]
        self._position = 0
        return judge(table, 0, self._read)

    @property
    def is_accepted(self) -> bool:
        """True if nothing is wrong with it, and all that was read of its buffers was memory."""
        return not isinstance(self.outcome(), str) and all(
            data is not None for _at, _size, data in self.buffers
        )

    def pages(self, role: Role) -> set[int]:
        """What is to be given back for it."""
        outcome = self.outcome()
        if isinstance(outcome, str):
            return set()
        return given_back(role, outcome, self._read, NAMEABLE) or set()

    def _read(self, address: int, length: int) -> bytes | None:
        """The next thing that was read. What the device did not come to, because it had refused the chain, is nothing."""
        if self._position == len(self.buffers):
            return None
        at, size, data = self.buffers[self._position]
        assert (at, size) == (address, length)
        self._position += 1
        return data


class Shifting:
    """The memory of a guest, as one ring reads it. readings: a chain each."""

    def __init__(self, guest: HostileGuest, role: Role) -> None:
        self._guest = guest
        self._driver = guest.driver
        self._chance = guest.driver.chance
        self._ring = guest.rings[role]
        self.readings: list[Reading] = []
        queue = guest.balloon.rings.started[role].queue
        self._available = queue._available
        queue._available = self  # type: ignore[assignment]

    # In place of the view of the available ring

    def __getitem__(self, slot: int) -> int:
        value = self._available[slot]
        if slot >= _RING_SLOT:
            self.readings.append(Reading(value))
            self._available[slot] = self._chance.randrange(SIZE + (self._chance.randrange(20) == 0))
        elif self._chance.randrange(3) == 0:
            self.offer()
        return value

    def release(self) -> None:
        """Let go of guest memory."""
        self._available.release()

    def offer(self) -> None:
        """Move the available index, to anywhere that a driver may have it."""
        taken = len(self.readings)
        ahead = self._chance.randint(0, SIZE) if taken < MOST_CHAINS else 0
        self._available[_INDEX_SLOT] = (taken + ahead) & 0xFFFF

    # In place of the readers of descriptors and buffers

    def unpack_from(self, table: memoryview | bytes, offset: int) -> tuple[int, ...]:
        """Read a descriptor, of the ring or of the copy of an indirect table."""
        values = struct.Struct.unpack_from(DESCRIPTOR_STRUCT, table, offset)
        if isinstance(table, memoryview):
            self.readings[-1].ring.append(Descriptor(*values))
            table[offset : offset + 16] = DESCRIPTOR.encode(self._driver.descriptor(SIZE))
        return values

    @contextlib.contextmanager
    def shifting(self) -> Iterator[None]:
        """Have it change under the device."""
        read = MemoryTable.read

        def read_once(table: MemoryTable, address: int, length: int) -> bytes | None:
            data = read(table, address, length)
            self.readings[-1].buffers.append((address, length, data))
            self._overwrite(address)
            return data

        with (
            mock.patch.object(MemoryTable, "read", read_once),
            mock.patch.object(virtqueue, "DESCRIPTOR_STRUCT", self),
        ):
            yield

    def _overwrite(self, address: int) -> None:
        """Write other tables where tables are, and another list where lists are."""
        if TABLE <= address < LIST:
            self._driver.write_tables()
        else:
            self._driver.write_list()
