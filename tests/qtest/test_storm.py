"""A storm of hostile chains and ring states against a real QEMU and our device, the same each time.

What it must leave alone is full of a pattern: all of memory but the rings, what is put there for them, and an arena at
the end of RAM, which is all of memory that the storm ever names. Nothing else is named by accident either. Numbers are
read as whole ones, for each readable buffer has a multiple of 4 bytes. The arena is full of ones until it is given back:
read as a descriptor that has flags which do not go together; read as a number, at any byte of its edges, it is outside
of RAM, in the arena, or page 0, which is left out.
"""

from __future__ import annotations

import random
from collections import Counter

from hostdev.wire.balloon import PFN_STRUCT, Feature, Role
from hostdev.wire.virtqueue import (
    DESCRIPTOR_INDIRECT,
    DESCRIPTOR_NEXT,
    DESCRIPTOR_SIZE,
    DESCRIPTOR_WRITE,
    Descriptor,
)
from tests.qtest.bench import FEATURES, LIST, MIB, PAGE, PATTERN, RAM_BYTES, RING_BYTES, RINGS_AT, Bench
from tests.qtest.hostile import (
    BROKEN,
    INTERRUPTS,
    LAST_ADDRESS,
    MAX_LENGTH,
    PCI_HOLE,
    ROM_AT,
    ROM_END,
    TABLE,
    Witness,
    pfns,
    put_table,
    started,
)

SEED = 20260311
CHAINS, MAX_BATCH, MAX_LINKS = 2000, 8, 6
ARENA = RAM_BYTES - 16 * MIB
NUMBERS_AT, NUMBERS = LIST + PAGE, 2048
TABLE_ENTRIES = 8
RINGS_END = RINGS_AT + RING_BYTES * len(Role)
GUARDED = ((PAGE, ROM_END), (RINGS_END, LIST), (TABLE + PAGE, ARENA))
SIZES = (1, 2, 16, 128)
FEATURE_CHOICES = (FEATURES, FEATURES, FEATURES & ~Feature.RING_INDIRECT_DESC)
# As many rings may stand still until the driver begins anew.
MAX_BROKEN = 2


class Storm:
    """Chains drawn at random, by a driver that now and then begins anew.

    ``offered``: how many, by role. ``broken``: how often a ring stopped.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._random = random.Random(SEED)
        self._numbers = self._draw_numbers()
        self.offered: Counter[Role] = Counter()
        self.broken = 0

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def blow(self) -> None:
        """Offer all of them."""
        self._begin()
        while self.offered.total() < CHAINS:
            self._batch()
            stopped = [role for role, state in started(self._bench).items() if not state]
            if self._chance(0.03):
                self._bench.qmp("stop")
                self._bench.qmp("cont")
            if len(stopped) > MAX_BROKEN or self._chance(0.05):
                self._begin()

    def _begin(self) -> None:
        """Do what a driver does first. The arena is resident again, for there to be something to give back."""
        self._bench.device.reset()
        self._bench.rings.clear()
        self._bench.drive(self._random.choice(FEATURE_CHOICES), size=self._random.choice(SIZES))
        self._bench.qtest.memset(ARENA, RAM_BYTES - ARENA, 0xFF)
        self._bench.qtest.write(NUMBERS_AT, self._numbers)

    def _batch(self) -> None:
        """Offer some chains on one ring, and wait until each is returned or the ring has stopped."""
        role = self._random.choice([role for role, state in started(self._bench).items() if state])
        ring = self._bench.rings[role]
        for _ in range(self._random.randint(1, min(ring.size, MAX_BATCH))):
            head = self._random.randrange(ring.size)
            for number, descriptor in self._chain(head, ring.size).items():
                ring.write_descriptor(number, descriptor)
            ring.publish(self._random.randrange(1 << 16) if self._chance(0.005) else head)
            self.offered[role] += 1
        if self._chance(0.02):
            ring.set_available_index(self._random.randrange(1 << 16))
        ring.notify()
        self._settle(ring.index, ring.next_available)

    def _settle(self, number: int, index: int) -> None:
        def is_settled() -> bool:
            state = self._bench.command("query-rings")[number]
            return not state["started"] or state["next-available"] == index

        self._bench.wait_until(is_settled, f"ring {number} is neither through nor broken")
        self.broken += not started(self._bench)[Role(number)]

    # What is offered

    def _chain(self, head: int, size: int) -> dict[int, Descriptor]:
        """Descriptors by where they go: of a chain as it should be, or of any."""
        numbers = [(head + step) % size for step in range(self._random.randint(1, min(size, MAX_LINKS)))]
        entries = [self._entry(size) for _ in numbers]
        if self._chance(0.6):
            entries.sort(key=lambda entry: entry.flags & DESCRIPTOR_WRITE)
            entries = [
                Descriptor(entry.address, entry.length, entry.flags | DESCRIPTOR_NEXT, following)
                for entry, following in zip(entries, [*numbers[1:], 0], strict=True)
            ]
            last = entries.pop()
            entries.append(Descriptor(last.address, last.length, last.flags & ~DESCRIPTOR_NEXT, 0))
        return dict(zip(numbers, entries, strict=True))

    def _entry(self, count: int) -> Descriptor:
        """One descriptor for a table of so many."""
        flags = self._random.choice((DESCRIPTOR_WRITE, DESCRIPTOR_WRITE, 0, DESCRIPTOR_NEXT))
        if self._chance(0.03):
            flags = self._random.randrange(1 << 16)
        elif self._chance(0.1):
            flags = DESCRIPTOR_INDIRECT
        following = self._random.choice((self._random.randrange(count), count, 0xFFFF))
        if flags & DESCRIPTOR_INDIRECT:
            place = self._table()
        else:
            place = self._writable() if flags & DESCRIPTOR_WRITE else self._readable()
        return Descriptor(*place, flags, following)

    def _table(self) -> tuple[int, int]:
        """An indirect table. A part of one that is drawn inside it may overwrite it: what is there is as good."""
        if self._chance(0.2):
            return self._address(), DESCRIPTOR_SIZE * self._random.randrange(2 * TABLE_ENTRIES)
        entries = self._chain(0, TABLE_ENTRIES)
        put_table(self._bench, TABLE, list(entries.values()))
        return TABLE, DESCRIPTOR_SIZE * len(entries) - self._chance(0.1)

    def _writable(self) -> tuple[int, int]:
        """A range to be reported: in the arena, across its end, in no memory, in the rings."""
        if self._chance(0.1):
            start = self._random.randrange(ROM_AT, ROM_END)
            return start, self._random.randrange(ROM_END - start)
        if self._chance(0.03):
            start = self._random.randrange(RINGS_AT, RINGS_END)
            return start, min(self._length(), RINGS_END - start)
        return self._address(), self._length()

    def _readable(self) -> tuple[int, int]:
        """A piece of the list of numbers, or of something that is none."""
        if self._chance(0.2):
            return self._address(), self._length() & ~3
        start = self._random.randrange(NUMBERS)
        size = PFN_STRUCT.size
        return NUMBERS_AT + size * start, size * self._random.randrange(NUMBERS - start)

    def _address(self) -> int:
        """In the arena or where no memory is."""
        return self._random.choice(
            (
                self._random.randrange(ARENA, RAM_BYTES),
                self._random.randrange(ARENA, RAM_BYTES, PAGE),
                self._random.randrange(RAM_BYTES - PAGE, RAM_BYTES + PAGE),
                self._random.choice((PCI_HOLE, INTERRUPTS, 1 << 32, 1 << 63, LAST_ADDRESS)),
                LAST_ADDRESS - self._random.randrange(4 * PAGE),
            )
        )

    def _length(self) -> int:
        return self._random.choice((0, 1, PAGE, self._random.randrange(1 << 20), 2 * MIB, MAX_LENGTH))

    def _draw_numbers(self) -> bytes:
        outside = (MAX_LENGTH, ROM_AT // PAGE, ROM_END // PAGE - 1, PCI_HOLE // PAGE, RAM_BYTES // PAGE)
        inside = range(ARENA // PAGE, RAM_BYTES // PAGE)
        return pfns(*(self._random.choice(outside if self._chance(0.1) else inside) for _ in range(NUMBERS)))


def guard(bench: Bench) -> None:
    """Put the pattern wherever the storm must not reach; in the file, for the guest does not see what is under its ROMs."""
    with bench.vm.ram_file.open("r+b", buffering=0) as ram:
        for start, end in GUARDED:
            for at in range(start, end, MIB):
                ram.seek(at)
                ram.write(bytes([PATTERN]) * min(MIB, end - at))


def guarded(bench: Bench) -> bool:
    return all(bench.holds(at, min(MIB, end - at)) for start, end in GUARDED for at in range(start, end, MIB))


def test_a_storm(ours: Bench) -> None:
    witness = Witness(ours)
    released = ours.command("query-status")["released"]
    guard(ours)
    storm = Storm(ours)
    storm.blow()
    assert guarded(ours)
    # What was meant to happen has: else this shows nothing.
    assert set(storm.offered) == set(Role)
    assert storm.broken > len(Role)
    assert ours.command("query-status")["released"] - released > 64 * MIB
    witness.expected = [BROKEN] * len(witness.said())
    assert len(witness.expected) >= storm.broken
    witness.check()
