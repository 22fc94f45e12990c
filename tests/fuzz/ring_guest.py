"""A device at work on the ground, driven step by step, with a witness beside it. Used by the targets about rings.

What a guest does is written in memory with struct, and not by hostdev.driver, which takes ten times as long.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

from hostdev.balloon import SLICE_CALLS, Balloon
from hostdev.discard import Discarder
from hostdev.driver import USER_BASE
from hostdev.errors import RingError
from hostdev.giver import SLICE_BYTES
from hostdev.journal import Journal
from hostdev.memory import MemoryTable, Region
from hostdev.metrics import Metrics
from hostdev.rings import Step
from hostdev.virtqueue import RingLayout
from hostdev.wire.balloon import CONFIG, DEFAULT_FEATURES, QUEUE_COUNT, Config, Feature
from tests.fuzz.ground import DATA, DATA_END, PAGE, RING_SIZE, ground
from tests.fuzz.source import Source
from tests.fuzz.witness import Witness, ring_address

# Steps until a ring must be idle: 16 chains and one statistics buffer, each of all 1184 pages, 256 a step.
MAX_STEPS = 17 * 6

# Where buffers begin: in the rings themselves, in data, at the edges of regions, in holes, at the end of all addresses.
_PLACES = (
    DATA,
    DATA + 0x4000,
    DATA_END - PAGE,
    0,
    0x1000,
    0x2000,
    0x80000,
    0xFF000,
    0x100000,
    0x4FF000,
    0x500000,
    0x53F000,
    0x540000,
    4 << 30,
    (4 << 30) + 0xF000,
    (1 << 64) - PAGE,
)
_OFFSETS = (0, 0, 0, 0, 1, 8, PAGE - 1, PAGE - 4)
_LENGTHS = (
    PAGE,
    2 * PAGE,
    16 * PAGE,
    64 * PAGE,
    0,
    1,
    3,
    4,
    10,
    16,
    PAGE - 1,
    PAGE + 1,
    1 << 20,
    (1 << 32) - 1,
)


class WitnessJournal(Journal):
    """Tells the witness when a chain is popped."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness

    def take_up(self, index: int, position: int) -> int:
        return self._witness.take_up(index, position)


class WitnessDiscarder(Discarder):
    """Gives back for real, before the witness's eyes."""

    def __init__(self, witness: Witness) -> None:
        super().__init__()
        self._witness = witness

    def adopt(self, regions: tuple[Region, ...]) -> None:
        """What is behind the ground does not change: found out once, for it takes a tenth of the time of an input."""
        known = _adopted()
        self._backings = {region: known._backings[region] for region in regions}
        self._choices = {region: known._choices[region] for region in regions}

    def release(self, region: Region, offset: int, length: int) -> None:
        self._witness.released(region, offset, length)
        super().release(region, offset, length)


@functools.cache
def _adopted() -> Discarder:
    discarder = Discarder()
    discarder.adopt(ground().regions)
    return discarder


class RingGuest:
    """Guest and device. now: of the device's clock, in seconds."""

    def __init__(self, features: Feature = DEFAULT_FEATURES) -> None:
        ground().clear()
        self.now = 1000.0
        self.witness = Witness(indirect=bool(features & Feature.RING_INDIRECT_DESC))
        self.metrics = Metrics()
        self.balloon = Balloon(
            DEFAULT_FEATURES,
            WitnessDiscarder(self.witness),
            self.metrics,
            self.witness,
            WitnessJournal(self.witness),
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
        )
        self.balloon.set_features(features)
        self._indices = [0] * QUEUE_COUNT
        self.has_indices = [True] * QUEUE_COUNT
        self.set_memory(ground().regions)

    # What the front end does

    def set_memory(self, regions: Sequence[object]) -> None:
        """Have the device use these of the ground's regions."""
        chosen = [region for region in ground().regions if region in regions]
        table = MemoryTable(chosen)
        # The rings are stopped by the old table and started by the new one; both have the first region, or they wait.
        self.balloon.set_memory(table)
        self.witness.regions = chosen

    def start(self, index: int, base: int = 0) -> None:
        """Start a ring at an available index, where the guest is as well."""
        at = ring_address(index)
        layout = RingLayout(RING_SIZE, USER_BASE + at, USER_BASE + at + PAGE, USER_BASE + at + 2 * PAGE)
        self._indices[index] = base
        ground().write(at + PAGE + 2, struct.pack("<H", base))
        ground().write(at + 2 * PAGE + 2, struct.pack("<H", base))
        self.balloon.start_ring(index, layout, base)

    def stop(self, index: int) -> int | None:
        """Stop a ring: nothing of it may be done from then on (I5)."""
        base = self.balloon.stop_ring(index)
        before = self.witness.releases
        assert self.balloon.service(index) == Step(returned=False, more=False)
        assert self.witness.releases == before
        return base

    def write_config(self, actual: int, poison: int) -> None:
        """Write what a driver may."""
        self.balloon.write_config(0, CONFIG.encode(Config(0, actual, 0, poison)))

    # What the guest does

    def describe(self, index: int, slot: int, entry: tuple[int, int, int, int]) -> None:
        """Write a descriptor: address, length, flags, next."""
        ground().write(ring_address(index) + 16 * slot, struct.pack("<QIHH", *entry))

    def publish(self, index: int, head: int) -> None:
        """Make a head available."""
        at = ring_address(index) + PAGE
        place = self._indices[index]
        ground().write(at + 4 + 2 * (place % RING_SIZE), struct.pack("<H", head))
        self.lie(index, place + 1)

    def lie(self, index: int, available: int) -> None:
        """Set the available index."""
        self._indices[index] = available & 0xFFFF
        ground().write(ring_address(index) + PAGE + 2, struct.pack("<H", self._indices[index]))

    def offer(self, index: int, buffers: Sequence[tuple[int, int, bool]], head: int = 0) -> None:
        """Make a chain of buffers (address, length, writable) available, from this slot on."""
        for place, (address, length, writable) in enumerate(buffers):
            slot, following = (head + place) % RING_SIZE, (head + place + 1) % RING_SIZE
            flags = (2 if writable else 0) | (1 if place + 1 < len(buffers) else 0)
            self.describe(index, slot, (address, length, flags, following))
        self.publish(index, head)

    # What the device does

    def step(self, index: int) -> Step:
        """One step of a ring, bounded and witnessed."""
        witness = self.witness
        witness.current, witness.answers, before = index, [], witness.releases
        try:
            step = self.balloon.service(index)
        except RingError:
            assert witness.answers == []
            return Step(returned=False, more=False)
        assert witness.releases - before <= min(SLICE_CALLS, SLICE_BYTES // PAGE)
        assert step.returned == bool(witness.answers)
        assert witness.used(index) == [(head, 0) for head in witness.answers] if witness.answers else True
        return step

    def run(self, index: int) -> None:
        """Serve a ring until it is idle."""
        for _ in range(MAX_STEPS):
            if not self.step(index).more:
                return
        raise AssertionError("a ring does not become idle")

    def tick(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        ready = list(self.balloon.rings.started)
        for index in ready:
            self.witness.current = index
        self.witness.answers = []
        signalled = self.balloon.tick(ready)
        assert len(signalled) == len(self.witness.answers) <= 1

    def finish(self) -> None:
        """Serve all rings to their end, and stop them: each chain was returned, but for one that is held."""
        for index in list(self.balloon.rings.started):
            self.run(index)
        for index, ring in list(self.balloon.rings.started.items()):
            held = [] if ring.held is None else [ring.held]
            assert [hand.head for hand in self.witness.rings[index].in_hand] == held
        for index in range(QUEUE_COUNT):
            self.stop(index)
        self.balloon.set_memory(MemoryTable())
        assert self.balloon.inert == self.witness.has_cause, self.balloon.giver.why_inert


def address(source: Source) -> int:
    """Choose where a buffer begins."""
    kind = source.below(len(_PLACES) + 8)
    if kind < len(_PLACES):
        return _PLACES[kind] + source.pick(_OFFSETS)
    if kind == len(_PLACES):
        return source.number(8)
    return DATA + source.below(128) * PAGE


def length(source: Source) -> int:
    """Choose how long a buffer is, in bytes."""
    kind = source.below(len(_LENGTHS) + 2)
    if kind < len(_LENGTHS):
        return _LENGTHS[kind]
    return source.number(4) if kind == len(_LENGTHS) else source.number(2)
