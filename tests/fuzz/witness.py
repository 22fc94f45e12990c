"""Follows a device's rings by reading guest memory itself, and raises AssertionError for each promise that is broken.

- I2: what is released is whole pages, in one region, named by the chain that its ring has in hand and has not returned. At
  the chain's end that is all of the pages that it names.
- I3: each chain that was popped is returned once, in order, with length 0; only a statistics buffer may be held.
- A chain is refused, and a ring stops, exactly if the driver broke the rules; a descriptor is what memory said it is.

It stands where the device's trace and journal are, which tell each step before it is done; what they say of a chain is
compared with memory. So it is an oracle of the device, and no second device: how a job is cut up and when is not its business.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from hostdev.balloon import MAX_DEADLY, MAX_DEATHS
from hostdev.errors import HostError
from hostdev.giver import MAX_HOST_ERRORS
from hostdev.memory import Region
from hostdev.trace import Tracer
from hostdev.wire.balloon import Role
from hostdev.wire.trace import Cause
from hostdev.wire.virtqueue import Descriptor
from tests.fuzz.ground import PAGE, RING_SIZE, RING_STRIDE, ground, whole_pages

_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_MAX_INDIRECT = 1024
_MAX_PFN_BYTES = 64 << 10
_MAX_STATISTICS_BYTES = 2560
_ENTRY = struct.Struct("<QIHH")

Entry = tuple[int, int, int, int]


def ring_address(index: int) -> int:
    """Guest address of a ring: descriptors, available and used ring, a page each."""
    return index * RING_STRIDE


@dataclass
class Hand:
    """A chain in hand. pages: that it names and that are to be released for it. said: its readable bytes, None if not all are."""

    head: int
    role: Role | None
    entries: tuple[Entry, ...] = ()
    pages: set[int] = field(default_factory=set)
    said: bytes | None = b""
    released: set[int] = field(default_factory=set)
    is_withheld: bool = False
    is_faulted: bool = False


@dataclass
class Seen:
    """A started ring. position: available index of the next chain to be popped."""

    position: int
    in_hand: list[Hand] = field(default_factory=list)


class Witness(Tracer):
    """One device's. regions: of its current table. taken: the last chain that each ring had in hand."""

    def __init__(self, *, indirect: bool) -> None:
        self._indirect = indirect
        self.regions: Sequence[Region] = ()
        self.rings: dict[int, Seen] = {}
        self.taken: dict[int, Hand] = {}
        self.answers: list[int] = []
        self.releases = 0
        self.current = 0
        self._taking = False
        # What is to happen: workers have died with the next chain; the host refuses so many releases.
        self.deaths = 0
        self.refusals = 0
        # What has: chains that workers died with, and refusals in a row.
        self._deadly = 0
        self._refused = 0
        self._is_inert = False

    # What memory says

    def available(self, index: int) -> tuple[int, ...]:
        """Return index and entries of the available ring."""
        raw = ground().read(self.regions, ring_address(index) + PAGE, 4 + 2 * RING_SIZE)
        assert raw is not None
        _flags, *words = struct.unpack(f"<{2 + RING_SIZE}H", raw)
        return tuple(words)

    def is_broken(self, index: int) -> bool:
        """True if the ring cannot be followed any further."""
        seen = self.rings[index]
        available, *heads = self.available(index)
        head = heads[seen.position % RING_SIZE]
        is_lying = (available - seen.position) & 0xFFFF > RING_SIZE
        return is_lying or head >= RING_SIZE or head in [hand.head for hand in seen.in_hand]

    def walk(self, index: int, head: int) -> tuple[Entry, ...] | None:
        """Follow a chain in memory; None if it breaks the rules."""
        table = ground().read(self.regions, ring_address(index), _ENTRY.size * RING_SIZE)
        assert table is not None
        entries = _chain(table, head)
        if entries and entries[-1][2] & _INDIRECT:
            last = entries.pop()
            inside = self._indirect_table(last)
            if inside is None:
                return None
            entries += inside
        return tuple(entries) if entries and _is_lawful(entries) else None

    def _indirect_table(self, entry: Entry) -> list[Entry] | None:
        address, length, _flags, _next = entry
        if not self._indirect or not length or length % _ENTRY.size or length > _MAX_INDIRECT * _ENTRY.size:
            return None
        table = ground().read(self.regions, address, length)
        entries = None if table is None else _chain(table, 0)
        return None if entries is None or entries[-1][2] & _INDIRECT else entries

    def gather(self, entries: Sequence[Entry], limit: int) -> bytes | None:
        """Return the readable bytes of a chain up to a limit; None if one of them is in no region."""
        data = b""
        for address, length, flags, _next in entries:
            wanted = min(length, limit - len(data))
            if flags & _WRITE or wanted <= 0:
                continue
            piece = ground().read(self.regions, address, wanted)
            if piece is None:
                return None
            data += piece
        return data

    def used(self, index: int) -> list[tuple[int, int]]:
        """Return as many of the last elements of the used ring as there were answers."""
        raw = ground().read(self.regions, ring_address(index) + 2 * PAGE, 4 + 8 * RING_SIZE)
        assert raw is not None
        (end,) = struct.unpack_from("<H", raw, 2)
        places = [(end - back) % RING_SIZE for back in range(len(self.answers), 0, -1)]
        return [struct.unpack_from("<II", raw, 4 + 8 * place) for place in places]

    # What the device tells

    @property
    def has_cause(self) -> bool:
        """True if the device is to be inert by now."""
        return self._is_inert or self._deadly >= MAX_DEADLY

    def take_up(self, index: int, position: int) -> int:
        """A chain is about to be popped. Returns how many workers died with it."""
        assert position == self.rings[index].position, "another chain than the next one is popped"
        self._taking = True
        return self.deaths

    def ring(self, index: int, *, started: bool, size: int, base: int) -> None:
        """A ring starts or has stopped."""
        if started:
            assert index not in self.rings
            self.rings[index] = Seen(base)
            return
        if self._taking:
            self._taking = False
            assert self.is_broken(index), "a ring is given up that could be followed"
        seen = self.rings.pop(index)
        assert base == (seen.position - len(seen.in_hand)) & 0xFFFF, "a ring stops at another chain"

    def chain(self, index: int, role: int | None, head: int, descriptors: tuple[Descriptor, ...]) -> None:
        """A chain was popped."""
        hand = self._pop(index, None if role is None else Role(role))
        entries = tuple((each.address, each.length, each.flags, each.next) for each in descriptors)
        assert (head, entries) == (hand.head, self.walk(index, hand.head)), "a chain is not what memory says"
        hand.entries = entries
        if hand.role is Role.REPORTING:
            offered = [(at, at + length) for at, length, flags, _next in entries if flags & _WRITE]
            hand.pages = whole_pages(self.regions, offered)
        elif hand.role is not None:
            hand.said = self.gather(entries, _LIMITS[hand.role])
        if hand.role is Role.INFLATE and hand.said is not None:
            hand.pages = _named(self.regions, hand.said)

    def _pop(self, index: int, role: Role | None) -> Hand:
        assert self._taking, "a chain was popped out of turn"
        self._taking = False
        seen = self.rings[index]
        assert not self.is_broken(index), "a chain is popped of a ring that is broken"
        hand = Hand(self.available(index)[1 + seen.position % RING_SIZE], role)
        seen.position = (seen.position + 1) & 0xFFFF
        seen.in_hand.append(hand)
        self.taken[index] = hand
        return hand

    def fault(self, index: int | None, text: str) -> None:
        """A chain is refused; without a ring it is the device that is inert."""
        if index is None:
            return
        if self._taking:
            hand = self._pop(index, None)
            is_deadly, self.deaths = self.deaths >= MAX_DEATHS, 0
            self._deadly += is_deadly
            assert is_deadly or self.walk(index, hand.head) is None, (
                f"a chain is refused that is right: {text}"
            )
        else:
            hand = self.rings[index].in_hand[-1]
            assert hand.said is None, f"a buffer is refused that can be read: {text}"
        hand.is_faulted = True

    def release(self, index: int, cause: Cause, address: int, length: int, *, withheld: bool) -> None:
        """A part is about to be given back, or is kept."""
        if withheld:
            self.rings[index].in_hand[-1].is_withheld = True

    def released(self, region: Region, offset: int, length: int) -> None:
        """It is given back now."""
        assert region in self.regions, "a region that is not in the table"
        assert 0 <= offset < offset + length <= region.size, "out of the region"
        assert (region.file_offset + offset) % PAGE == length % PAGE == 0, "no whole pages"
        first = (region.guest_address + offset) // PAGE
        pages = set(range(first, first + length // PAGE))
        in_hand = self.rings[self.current].in_hand
        assert in_hand, "no chain is in hand"
        assert pages <= in_hand[-1].pages, "pages that the chain does not name"
        in_hand[-1].released |= pages
        self.releases += 1
        self._note_refusal(in_hand[-1])

    def _note_refusal(self, hand: Hand) -> None:
        """Raise HostError if the host is to refuse."""
        if not self.refusals:
            self._refused = 0
            return
        self.refusals -= 1
        self._refused += 1
        self._is_inert |= self._refused >= MAX_HOST_ERRORS
        hand.is_withheld = True
        raise HostError("the host refuses")

    def answer(self, index: int, head: int) -> None:
        """A chain is about to be returned."""
        assert self.rings[index].in_hand, "a chain is returned and was not in hand"
        hand = self.rings[index].in_hand.pop(0)
        assert head == hand.head, "chains are returned out of order"
        if not (hand.is_withheld or hand.is_faulted):
            assert hand.said is not None, "a buffer that cannot be read is taken"
            assert hand.released == hand.pages, "not all that was named is released"
        self.answers.append(head)


_LIMITS = {
    Role.INFLATE: _MAX_PFN_BYTES,
    Role.DEFLATE: _MAX_PFN_BYTES,
    Role.STATISTICS: _MAX_STATISTICS_BYTES,
    Role.FREE_PAGE_HINT: 4,
}


def _chain(table: bytes, index: int) -> list[Entry] | None:
    limit = len(table) // _ENTRY.size
    entries: list[Entry] = []
    while index < limit and len(entries) < limit:
        entry: Entry = _ENTRY.unpack_from(table, _ENTRY.size * index)
        entries.append(entry)
        flags, index = entry[2:]
        if not flags & _NEXT:
            return entries
        if flags & _INDIRECT:
            return None
    return None


def _is_lawful(entries: Sequence[Entry]) -> bool:
    """Readable before writable, and at most 2^32 bytes."""
    directions = [bool(flags & _WRITE) for _at, _length, flags, _next in entries]
    return directions == sorted(directions) and sum(length for _at, length, _f, _n in entries) <= 1 << 32


def _named(regions: Sequence[Region], said: bytes) -> set[int]:
    numbers = {number for (number,) in struct.iter_unpack("<I", said[: len(said) & ~3])}
    return numbers & pages_of(tuple((each.guest_address, each.guest_end) for each in regions))


@functools.lru_cache
def pages_of(bounds: tuple[tuple[int, int], ...]) -> frozenset[int]:
    """Return the numbers of all pages in these ranges of whole pages."""
    return frozenset(page for start, end in bounds for page in range(start // PAGE, end // PAGE))
