"""A guest of several regions whose driver writes anything into its rings: chance, the device, and what is expected.

The rings, indirect tables and lists lie in a region of their own, above all that a frame number can name, so that no chain
takes the ground from under another. Not a test; used by the tests of the invariants.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from hostdev.driver import USER_BASE, GuestMemory
from hostdev.memory import Region
from hostdev.wire.balloon import Role
from hostdev.wire.vhost_user import MemoryRegion
from hostdev.wire.virtqueue import DESCRIPTOR, Descriptor
from tests.in_process import MIB, PAGE, InProcess, RecordingDiscarder
from tests.oracle_pages import given_back
from tests.oracle_rings import INDIRECT, NEXT, WRITE, Outcome, judge

SIZE = 8
RINGS_AT = 1 << 45
TABLE, LIST, END = RINGS_AT + 0x150000, RINGS_AT + 0x180000, RINGS_AT + 2 * MIB
NESTED = 16
# Two regions that touch, one of an odd size, one above 4 GiB; in the file, in another order.
REGIONS = (
    MemoryRegion(RINGS_AT, 2 * MIB, USER_BASE, 5 * MIB),
    MemoryRegion(4 * MIB, MIB, USER_BASE + 64 * MIB, 0),
    MemoryRegion(5 * MIB, MIB + PAGE, USER_BASE + 32 * MIB, 2 * MIB + PAGE),
    MemoryRegion(8 * MIB + PAGE, 16 * PAGE, USER_BASE + 96 * MIB, 8 * MIB),
    MemoryRegion(1 << 32, 64 * PAGE, USER_BASE + 128 * MIB, MIB),
)
FILE = 9 * MIB
NAMEABLE = REGIONS[1:]


# What a driver may write. Drawn by a seeded generator and not by strategies: an example is some thousand choices.


@dataclass(frozen=True, slots=True)
class RingContent:
    """What a driver offers on one ring: the descriptor table, and heads in the order of the available ring."""

    table: tuple[Descriptor, ...]
    heads: tuple[int, ...]


NOTHING = RingContent((Descriptor(0, 0, 0, 0),) * SIZE, ())
_FLAGS = (
    0,
    0,
    0,
    WRITE,
    WRITE,
    WRITE,
    WRITE | NEXT,
    WRITE | NEXT,
    NEXT,
    INDIRECT,
    INDIRECT | WRITE,
    INDIRECT | NEXT,
)
_LISTED = (LIST, LIST, LIST, LIST + 4, LIST + 16, LIST + 1, LIST + 3, LIST + PAGE, 3 * MIB)
_LIST_LENGTHS = (4, 8, 32, 32, 64, 64, 0, 1, 3, 5, 1 << 20, 2**32 - 1)
_TABLE_LENGTHS = (16, 32, 32, 64, 64, 0, 24, 16 * 1025)
_LENGTHS = (0, PAGE, PAGE, 2 * PAGE, 5 * PAGE, 1, 2048, PAGE - 1, PAGE + 1, MIB, 2**32 - 1)


def address(chance: Random) -> int:
    """Around the beginning of a region mostly, around its end, in between, or far away; mostly of a page."""
    if chance.randrange(8) == 0:
        return chance.choice((2 * MIB, 2**64 - PAGE, 2**64 - 1, 1 << 40))
    region = chance.choice(NAMEABLE)
    pages = chance.choice(
        (chance.randint(-1, 12), chance.randrange(region.size // PAGE), region.size // PAGE - 1)
    )
    return region.guest_address + pages * PAGE + chance.choice((0, 0, 0, 1, -1, 2048))


def frame(chance: Random) -> int:
    """A page frame number."""
    return chance.choice((address(chance) >> 12, chance.randrange(1 << 32))) & 0xFFFFFFFF


def descriptor(chance: Random, size: int) -> Descriptor:
    """One entry of a table of this size: now and then its next is outside, as its address may be."""
    flags, following = chance.choice(_FLAGS), chance.randrange(size + (chance.randrange(8) == 0))
    if flags & INDIRECT:
        at = chance.choice((TABLE, TABLE, TABLE + 16 * chance.randrange(NESTED), END - 16))
        return Descriptor(at, chance.choice(_TABLE_LENGTHS), flags, following)
    if flags & WRITE:
        return Descriptor(address(chance), chance.choice(_LENGTHS), flags, following)
    return Descriptor(chance.choice(_LISTED), chance.choice(_LIST_LENGTHS), flags, following)


def content(chance: Random) -> RingContent:
    """All descriptors, and mostly heads that may be offered; one in some rings twice, or outside."""
    heads = chance.sample(range(SIZE), SIZE)
    if chance.randrange(4) == 0:
        heads = [chance.randrange(SIZE + 1) for _ in range(SIZE)]
    return RingContent(tuple(descriptor(chance, SIZE) for _ in range(SIZE)), tuple(heads))


# The device


@dataclass(frozen=True, slots=True)
class Given:
    """Pages that were given back in one call, and every ring's used index at that moment."""

    pages: frozenset[int]
    used: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Expected:
    """What becomes of a ring: of each chain that is taken its head, outcome and pages; and whether the ring breaks then."""

    heads: list[int] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    pages: list[set[int]] = field(default_factory=list)
    breaks: bool = False


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
    """The device, and a driver that writes what it is told to."""

    def __init__(self) -> None:
        super().__init__(GuestMemory(FILE, REGIONS), ring_size=SIZE, rings_at=RINGS_AT)
        self.given: list[Given] = []
        self.discarder.__class__ = _Witness
        self.discarder.guest = self  # type: ignore[attr-defined]
        self.start()

    def write(self, contents: Sequence[RingContent], chance: Random) -> None:
        """Write indirect tables, a list of frame numbers and what the rings have; all of it is offered."""
        nested = [descriptor(chance, 4) for _ in range(NESTED)]
        frames = [frame(chance) for _ in range(20)]
        self.memory.write(TABLE, b"".join(map(DESCRIPTOR.encode, nested)))
        self.memory.write(LIST, struct.pack(f"<{len(frames)}I", *frames))
        for ring, content in zip(self.rings, contents, strict=True):
            self.memory.write(ring.descriptors, b"".join(map(DESCRIPTOR.encode, content.table)))
            for head in content.heads:
                ring.publish(head)

    def read(self, address: int, length: int) -> bytes | None:
        """Guest memory, which is the rings' region as far as it is read: None where it is not."""
        return self.memory.read(address, length) if RINGS_AT <= address <= END - length else None

    def expected(self, role: Role | None, content: RingContent) -> Expected:
        """What is to become of a ring that begins at index 0."""
        expected = Expected()
        for head in content.heads:
            if head >= SIZE or (role is Role.STATISTICS and self._is_held(head, expected)):
                return Expected(expected.heads, expected.outcomes, expected.pages, breaks=True)
            outcome = judge(content.table, head, self.read)
            pages = None if isinstance(outcome, str) else given_back(role, outcome, self.read, NAMEABLE)
            expected.heads.append(head)
            expected.outcomes.append("outside" if pages is None and not isinstance(outcome, str) else outcome)
            expected.pages.append(pages or set())
        return expected

    @staticmethod
    def _is_held(head: int, before: Expected) -> bool:
        """True if the device holds this head: the one before, if it was accepted."""
        return before.heads[-1:] == [head] and not isinstance(before.outcomes[-1], str)

    def __enter__(self) -> HostileGuest:
        return self

    def used(self, role: int) -> list[int]:
        """Take the heads that were returned on a ring."""
        used = self.rings[role].take_used()
        assert all(length == 0 for _head, length in used)
        return [head for head, _length in used]
