"""A driver that writes anything into its rings, and what is to become of that. Not a test; used by several.

The rings, indirect tables and lists lie in a region of their own, above all that a frame number can name, so that no chain
takes the ground from under another. What is written is drawn by a seeded generator: an example is some thousand choices.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from random import Random

from hostdev.frontend import Frontend
from hostdev.wire.balloon import Role
from hostdev.wire.vhost_user import MemoryRegion
from hostdev.wire.virtqueue import DESCRIPTOR, Descriptor
from tests.in_process import MIB, PAGE
from tests.oracle_pages import given_back
from tests.oracle_rings import INDIRECT, NEXT, WRITE, Outcome, judge

SIZE = 8
RINGS_AT = 1 << 45
RINGS_SIZE = 2 * MIB
TABLE, LIST, END = RINGS_AT + 0x150000, RINGS_AT + 0x180000, RINGS_AT + RINGS_SIZE
# Descriptors at TABLE, and frame numbers at LIST.
NESTED, FRAMES = 16, 20
# In no region, whatever the regions are.
NOWHERE = 1 << 40


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
_LISTED = (LIST, LIST, LIST, LIST + 4, LIST + 16, LIST + 1, LIST + 3, LIST + PAGE, NOWHERE)
_LIST_LENGTHS = (4, 8, 32, 32, 64, 64, 0, 1, 3, 5, 1 << 20, 2**32 - 1)
_TABLE_LENGTHS = (16, 32, 32, 64, 64, 0, 24, 16 * 1025)
_LENGTHS = (0, PAGE, PAGE, 2 * PAGE, 5 * PAGE, 1, 2048, PAGE - 1, PAGE + 1)
_LONG = (MIB, MIB + 1, 2**32 - 1)


@dataclass(frozen=True, slots=True)
class Expected:
    """What becomes of a ring: of each chain that is taken its head, outcome and pages; and whether the ring breaks then."""

    heads: list[int] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    pages: list[set[int]] = field(default_factory=list)
    breaks: bool = False


@dataclass
class HostileDriver:
    """nameable: the regions that chains name. rarely: one length in so many is of a whole region and more."""

    front: Frontend
    chance: Random
    nameable: Sequence[MemoryRegion]
    rarely: int = 10

    def address(self) -> int:
        """Around the beginning of a region mostly, around its end, in between, or far away; mostly of a page."""
        chance = self.chance
        if chance.randrange(8) == 0:
            return chance.choice(
                (NOWHERE, 2**64 - PAGE, 2**64 - 1, self.nameable[-1].guest_address - 2 * PAGE)
            )
        region = chance.choice(self.nameable)
        last = region.size // PAGE - 1
        pages = chance.choice((chance.randint(-1, 12), chance.randint(0, last), last))
        return region.guest_address + pages * PAGE + chance.choice((0, 0, 0, 1, -1, 2048))

    def _frame(self) -> int:
        return self.chance.choice((self.address() >> 12, self.chance.randrange(1 << 32))) & 0xFFFFFFFF

    def _length(self) -> int:
        return self.chance.choice(_LONG if self.chance.randrange(self.rarely) == 0 else _LENGTHS)

    def descriptor(self, size: int) -> Descriptor:
        """One entry of a table of this size: now and then its next is outside, as its address may be."""
        chance = self.chance
        flags, following = chance.choice(_FLAGS), chance.randrange(size + (chance.randrange(8) == 0))
        if flags & INDIRECT:
            at = chance.choice((TABLE, TABLE, TABLE + 16 * chance.randrange(NESTED), END - 16))
            return Descriptor(at, chance.choice(_TABLE_LENGTHS), flags, following)
        if flags & WRITE:
            return Descriptor(self.address() & 2**64 - 1, self._length(), flags, following)
        return Descriptor(chance.choice(_LISTED), chance.choice(_LIST_LENGTHS), flags, following)

    def content(self, heads: Collection[int] = ()) -> RingContent:
        """All descriptors, and these heads in any order; or any, one in some rings twice, or outside."""
        chosen = self.chance.sample([*(heads or range(SIZE))], len(heads or range(SIZE)))
        if not heads and self.chance.randrange(4) == 0:
            chosen = [self.chance.randrange(SIZE + 1) for _ in range(SIZE)]
        return RingContent(tuple(self.descriptor(SIZE) for _ in range(SIZE)), tuple(chosen))

    def write(self, contents: Sequence[RingContent]) -> None:
        """Write indirect tables, a list of frame numbers and what the rings have; all of it is offered, without a kick."""
        self.write_tables()
        self.write_list()
        for ring, content in zip(self.front.rings, contents, strict=True):
            self.front.memory.write(ring.descriptors, b"".join(map(DESCRIPTOR.encode, content.table)))
            for head in content.heads:
                ring.publish(head)

    def write_tables(self) -> None:
        """Write indirect tables."""
        nested = [self.descriptor(4) for _ in range(NESTED)]
        self.front.memory.write(TABLE, b"".join(map(DESCRIPTOR.encode, nested)))

    def write_list(self) -> None:
        """Write a list of frame numbers."""
        frames = [self._frame() for _ in range(FRAMES)]
        self.front.memory.write(LIST, struct.pack(f"<{FRAMES}I", *frames))

    def read(self, address: int, length: int) -> bytes | None:
        """Guest memory as far as it is read, which is the rings' region: None where it is not."""
        return self.front.memory.read(address, length) if RINGS_AT <= address <= END - length else None

    def expected(self, role: Role | None, content: RingContent) -> Expected:
        """What is to become of a ring that this is offered on."""
        expected = Expected()
        for head in content.heads:
            if head >= SIZE or (role is Role.STATISTICS and _is_held(head, expected)):
                return Expected(expected.heads, expected.outcomes, expected.pages, breaks=True)
            outcome = judge(content.table, head, self.read)
            pages = None if isinstance(outcome, str) else given_back(role, outcome, self.read, self.nameable)
            expected.heads.append(head)
            expected.outcomes.append("outside" if pages is None and not isinstance(outcome, str) else outcome)
            expected.pages.append(pages or set())
        return expected

    def used(self, role: int) -> list[int]:
        """Take the heads that were returned on a ring."""
        used = self.front.rings[role].take_used()
        assert all(length == 0 for _head, length in used)
        return [head for head, _length in used]


def _is_held(head: int, before: Expected) -> bool:
    """True if the device holds this head: the one before, if it was accepted."""
    return before.heads[-1:] == [head] and not isinstance(before.outcomes[-1], str)
