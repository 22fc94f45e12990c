"""A device in this process between a hostile driver and five small regions; each release is witnessed. Not a test."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from hostdev.driver import USER_BASE, GuestMemory
from hostdev.memory import Region
from hostdev.wire.vhost_user import MemoryRegion
from tests.hostile_driver import RINGS_AT, RINGS_SIZE, SIZE, HostileDriver
from tests.in_process import MIB, PAGE, InProcess, RecordingDiscarder

# The rings'; two regions that touch, one of an odd size; one above 4 GiB. In the file, in another order.
REGIONS = (
    MemoryRegion(RINGS_AT, RINGS_SIZE, USER_BASE, 5 * MIB),
    MemoryRegion(4 * MIB, MIB, USER_BASE + 64 * MIB, 0),
    MemoryRegion(5 * MIB, MIB + PAGE, USER_BASE + 32 * MIB, 2 * MIB + PAGE),
    MemoryRegion(8 * MIB + PAGE, 16 * PAGE, USER_BASE + 96 * MIB, 8 * MIB),
    MemoryRegion(1 << 32, 64 * PAGE, USER_BASE + 128 * MIB, MIB),
)
FILE = 9 * MIB
NAMEABLE = REGIONS[1:]


@dataclass(frozen=True, slots=True)
class Given:
    """Pages that were given back in one call, and every ring's used index at that moment."""

    pages: frozenset[int]
    used: tuple[int, ...]


class _Witness(RecordingDiscarder):
    """Writes down each release with what the driver sees at that moment."""

    guest: HostileGuest

    def release(self, region: Region, offset: int, length: int) -> None:
        start = region.guest_address + offset
        assert start % PAGE == length % PAGE == 0
        assert 0 <= offset < offset + length <= region.size
        pages = frozenset(range(start // PAGE, (start + length) // PAGE))
        used = tuple(ring.used_index for ring in self.guest.rings)
        self.guest.given.append(Given(pages, used))
        super().release(region, offset, length)


class HostileGuest(InProcess):
    """The device; ``driver`` writes what comes to it by chance."""

    def __init__(self, chance: Random) -> None:
        super().__init__(GuestMemory(FILE, REGIONS), ring_size=SIZE, rings_at=RINGS_AT)
        self.driver = HostileDriver(self, chance, NAMEABLE)
        self.given: list[Given] = []
        self.discarder.__class__ = _Witness
        self.discarder.guest = self  # type: ignore[attr-defined]
        self.start()

    def __enter__(self) -> HostileGuest:
        return self
