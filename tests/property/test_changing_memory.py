"""Guest memory that changes while the device reads it.

1. Whatever the device has read is another a moment later (shifting.py). Then what is given back for a chain is what it named
   when it was read first, all of it and nothing else, and each head that was read is returned once, in order.
2. A second process rewrites descriptors, indirect tables, lists and the available rings as fast as it can. Then there is no
   unexpected error, and nothing is given back but what could ever have been read; all other memory is as it was.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostdev.driver import DEADLINE, DriverRing
from hostdev.errors import RingError
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import Role
from hostdev.wire.vhost_user import Request
from hostdev.wire.virtqueue import DESCRIPTOR, Descriptor
from tests.hostile_driver import LIST, NOTHING, SIZE, TABLE
from tests.hostile_guest import NAMEABLE, REGIONS, HostileGuest
from tests.in_process import PAGE
from tests.oracle_pages import named
from tests.oracle_rings import INDIRECT, NEXT, WRITE
from tests.shifting import MOST_CHAINS, Reading, Shifting

CHANCE = st.randoms(use_true_random=True)


def step(guest: HostileGuest, role: Role, memory: Shifting) -> bool:
    """One step. False once the ring is idle or broken; a head that broke it was not taken."""
    before = len(memory.readings)
    try:
        return guest.step(role).more
    except RingError:
        if len(memory.readings) > before and not memory.readings[-1].ring:
            memory.readings.pop()
        return False


def returned(role: Role, readings: list[Reading]) -> list[int]:
    """Heads that come back: all that were taken but a statistics buffer that is held."""
    heads = [reading.head for reading in readings]
    is_held = role is Role.STATISTICS and readings and readings[-1].is_accepted
    return heads[:-1] if is_held else heads


@pytest.mark.timeout(600)  # with --full ten times as many examples
@pytest.mark.parametrize("role", Role)
@given(CHANCE)
def test_what_was_read_first_counts(role: Role, chance: Random) -> None:
    with HostileGuest(chance) as guest:
        guest.driver.write([guest.driver.content() if each is role else NOTHING for each in Role])
        memory = Shifting(guest, role)
        memory.offer()
        used: list[int] = []
        with memory.shifting():
            while step(guest, role, memory):
                assert len(memory.readings) <= MOST_CHAINS + SIZE
                used += guest.driver.used(role)
        used += guest.driver.used(role)
        assert used == returned(role, memory.readings)
        pages = [reading.pages(role) for reading in memory.readings]
        assert set().union(*(each.pages for each in guest.given)) == set().union(*pages)
        for each in guest.given:
            assert each.pages <= pages[each.used[role]]
        assert not guest.balloon.inert


# A process that rewrites


# A descriptor that is read half before and half after a write has the address of one and the length and flags of another.
# The numbers of a field differ in one byte only, or what lies between them is in no region: a half of one names no more.
STARTS = tuple(NAMEABLE[0].guest_address + number * 0x10000 for number in range(12))
SIZES = tuple(number * 0x1000 for number in range(8))
FRAMES = tuple(NAMEABLE[1].guest_address // PAGE + number for number in range(0, 200, 3))
ADDRESSES = (*STARTS, TABLE, LIST)
ROUNDS = 4000
MARK = b"\xa5"


def allowed() -> set[int]:
    """All pages that could ever be named: at any address that is written, any length that is."""
    return named(product(ADDRESSES, SIZES), REGIONS) | set(FRAMES)


def rewrite(
    guest: HostileGuest, rings: list[DriverRing], chance: Random, is_enough: Callable[[], bool]
) -> None:
    """What the second process does: a descriptor, a table entry, a head or an index after the other, until it is enough."""
    while not is_enough():
        for ring in rings:
            write_halves(guest, ring.descriptors + 16 * chance.randrange(SIZE), entry(chance, SIZE))
            write_halves(guest, TABLE + 16 * chance.randrange(4), entry(chance, 4))
            guest.memory.write(LIST + 4 * chance.randrange(64), struct.pack("<I", chance.choice(FRAMES)))
            guest.memory.write(
                ring.available + 4 + 2 * chance.randrange(SIZE), struct.pack("<H", chance.randrange(SIZE))
            )
            if chance.randrange(4) == 0:
                ring.publish(chance.randrange(SIZE))


def write_halves(guest: HostileGuest, address: int, descriptor: bytes) -> None:
    """Write the address first and the rest later, so that what is between two descriptors is met often."""
    guest.memory.write(address, descriptor[:8])
    guest.memory.write(address + 8, descriptor[8:])


@contextlib.contextmanager
def another_process(act: Callable[[Callable[[], bool]], None]) -> Iterator[Callable[[], int]]:
    """Have it done by another process, until the context is left. Gives a question: how often has it asked if it is enough?"""
    with mmap.mmap(-1, mmap.PAGESIZE) as shared, memoryview(shared).cast("Q") as words:
        parent = os.getpid()

        def is_enough() -> bool:
            words[0] += 1
            return bool(words[1]) or os.getppid() != parent  # who was killed says nothing

        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                act(is_enough)
                status = 0
            finally:
                os._exit(status)
        try:
            yield lambda: words[0]
        finally:
            words[1] = 1
            _pid, status = os.waitpid(pid, 0)
    assert status == 0


def entry(chance: Random, size: int) -> bytes:
    """A descriptor that names what may be named."""
    flags, following = chance.choice((0, WRITE, WRITE, WRITE | NEXT, NEXT, INDIRECT)), chance.randrange(size)
    if flags & INDIRECT:
        return DESCRIPTOR.encode(Descriptor(TABLE, 64, flags, following))
    if flags & WRITE:
        return DESCRIPTOR.encode(Descriptor(chance.choice(STARTS), chance.choice(SIZES), flags, following))
    return DESCRIPTOR.encode(Descriptor(LIST, 256, flags, following))


def serve(guest: HostileGuest, ring: DriverRing) -> None:
    """One step of a ring; one that broke begins again where the driver is."""
    try:
        guest.step(ring.index)
    except RingError:
        guest.request(Request.GET_VRING_BASE, wire.VringState(ring.index, 0))
        (index,) = struct.unpack("<H", guest.memory.read(ring.available + 2, 2))
        assert guest.start_ring(ring, index) == 0


def pages_of(guest: HostileGuest) -> Iterator[tuple[int, bytes]]:
    """Yield each page that could be named in some way, and what is in it."""
    for region in NAMEABLE:
        for page in range(region.guest_address // PAGE, (region.guest_address + region.size) // PAGE):
            yield page, guest.memory.read(page * PAGE, PAGE)


@pytest.mark.parametrize("seed", range(6))
def test_a_process_that_rewrites(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "hostdev")
    with HostileGuest(Random(seed)) as guest:
        rings = [guest.rings[Role.INFLATE], guest.rings[Role.REPORTING]]
        for region in NAMEABLE:
            guest.memory.write(region.guest_address, MARK * region.size)
        guest.memory.write(LIST, struct.pack("<I", FRAMES[0]) * 1024)
        for ring in rings:
            guest.memory.write(
                ring.descriptors, b"".join(entry(guest.driver.chance, SIZE) for _ in range(SIZE))
            )
        guest.memory.write(TABLE, b"".join(entry(guest.driver.chance, 4) for _ in range(4)))
        with another_process(functools.partial(rewrite, guest, rings, Random(seed))) as rounds:
            # Neither of the two may have had a CPU while the other had its rounds.
            end = time.monotonic() + DEADLINE
            while rounds() < ROUNDS or not (guest.given or time.monotonic() > end):
                for ring in rings:
                    serve(guest, ring)
        for ring in rings:
            while not guest.balloon.rings.started[ring.index].queue.is_empty:
                serve(guest, ring)
        given_back = {page for each in guest.given for page in each.pages}
        assert given_back
        assert given_back <= allowed()
        pages = dict(pages_of(guest))
        assert {page for page, data in pages.items() if data != MARK * PAGE} == given_back & pages.keys()
        assert not guest.balloon.inert
