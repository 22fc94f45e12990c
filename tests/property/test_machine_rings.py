"""The five rings as a state machine: a driver that offers good and bad chains, and all that may come in between.

Stops and starts of rings, regions of memory that go and come back, the rings' own among them, poison, an inhibited device, a
host that refuses, questions for statistics, rounds of hinting, and a worker that ends at any moment, or within a step. A slice is of three pieces, so
that all of it happens in the middle of chains as well. After each step:
1. Chains come back once each, in order, with length 0; the statistics buffer that came last stays until another comes or it
   is asked for. A ring's base is the number of those that came back.
2. What is given back is of the first chain that has not come back, and lies in a region that is there.
3. A chain that comes back, and was not in the way of anything that keeps memory, has had all of its pages given back.
4. The counters say how many came back, over all successions.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hostdev import balloon
from hostdev.discard import Discarder
from hostdev.driver import Buffer, DriverRing, GuestMemory
from hostdev.errors import HostError
from hostdev.virtqueue import Virtqueue
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import Config, Role
from hostdev.wire.vhost_user import Request
from hostdev.wire.virtqueue import Descriptor
from tests.hostile_driver import END, LIST, NOWHERE, RINGS_AT, TABLE
from tests.hostile_guest import FILE, NAMEABLE, REGIONS
from tests.in_process import PAGE
from tests.oracle_pages import given_back, named
from tests.oracle_rings import INDIRECT, NEXT, WRITE, judge
from tests.steps import count_step
from tests.succeeding import Succeeding

ROLES = st.sampled_from(list(Role))
PIECES = 3
SIZE = 32
CHANCE = st.randoms(use_true_random=True)
# One descriptor that cannot be used, and some that can and name nothing.
BAD = (
    Descriptor(TABLE, 16, NEXT, SIZE),
    Descriptor(TABLE, 16, INDIRECT | NEXT, 0),
    Descriptor(TABLE, 24, INDIRECT, 0),
    Descriptor(TABLE, 0, INDIRECT, 0),
    Descriptor(END - 16, 32, INDIRECT, 0),
    Descriptor(NOWHERE, PAGE, 0, 0),
    Descriptor(NOWHERE, PAGE, WRITE, 0),
    Descriptor(NOWHERE, 0, 0, 0),
    Descriptor(2**64 - 1, 2**32 - 1, WRITE, 0),
)


def frames(chance: Random) -> list[int]:
    """From the page before a region on, in it, or past its end."""
    region = chance.choice(NAMEABLE)
    first = region.guest_address // PAGE + chance.randint(-1, region.size // PAGE)
    return [first + chance.randint(1, 2) * number for number in range(chance.randrange(10))]


class Killed(BaseException):
    """The worker ends here."""


@dataclass
class Offered:
    """A chain that has not come back. pages: that it names. given: of these so far. is_whole: nothing kept any so far."""

    head: int
    is_accepted: bool
    pages: set[int]
    given: set[int] = field(default_factory=set)
    is_whole: bool = True


@dataclass
class RingModel:
    """waiting: in order, the one that is held for statistics first. returned: how many came back."""

    waiting: list[Offered] = field(default_factory=list)
    returned: int = 0
    started: bool = True
    is_held: bool = False

    @property
    def in_hand(self) -> Offered | None:
        """The first chain that the device may still have to do with."""
        rest = self.waiting[1:] if self.is_held else self.waiting
        return rest[0] if rest else None


class Rings(RuleBasedStateMachine):
    """The driver, the front end, the host, and whoever kills workers."""

    def __init__(self) -> None:
        super().__init__()
        self.slice = mock.patch.object(balloon, "SLICE_CALLS", PIECES)
        self.slice.start()
        self.guest = Succeeding(GuestMemory(FILE, REGIONS), ring_size=SIZE, rings_at=RINGS_AT)
        self.guest.start()
        self.rings = {role: RingModel() for role in Role}
        self.there = list(REGIONS)
        self.keeps = {"inhibited": False, "poisoned": False, "refused": False}
        self.was_refused = False
        self.seen = 0

    def ring(self, role: Role) -> DriverRing:
        return self.guest.rings[role]

    def read(self, address: int, length: int) -> bytes | None:
        return self.guest.memory.read(address, length) if RINGS_AT <= address <= END - length else None

    def may_offer(self, role: Role, count: int = 1) -> bool:
        return len(self.ring(role)._free) >= count

    # The driver

    @initialize(chance=CHANCE)
    def begin(self, chance: Random) -> None:
        self.offer_some(chance)

    @rule(chance=CHANCE)
    def offer_some(self, chance: Random) -> None:
        """Chains on any rings, one in four a bad one."""
        for role in chance.choices(list(Role), k=20):
            if chance.randrange(4) == 0:
                self.offer_bad(role, chance.choice(BAD))
            else:
                self.offer(role, frames(chance), indirect=chance.random() < 0.5)

    def offer(self, role: Role, frames: list[int], *, indirect: bool) -> None:
        """What the ring is for: a report of some entries, a list of frames, statistics, an id."""
        if not self.may_offer(role, 4):
            return
        buffers = self.buffers(role, frames)
        head = self.ring(role).add(buffers, indirect=indirect)
        chain = [Descriptor(each.address, each.length, WRITE if each.writable else 0, 0) for each in buffers]
        named_pages = given_back(role, chain, self.read, NAMEABLE)
        assert named_pages is not None
        self.note(role, head, named_pages)

    def buffers(self, role: Role, frames: list[int]) -> list[Buffer]:
        if role is Role.REPORTING:
            return [Buffer(frame * PAGE, PAGE, writable=True) for frame in frames[:4]] or [
                Buffer(NOWHERE, 0, writable=True)
            ]
        at = LIST + role * 0x10000 + self.ring(role)._free[0] * 0x400
        data = struct.pack(f"<{len(frames)}I", *(frame & 0xFFFFFFFF for frame in frames))
        self.guest.memory.write(at, data.ljust(4, bytes(1)))
        half = len(data) // 2
        return [Buffer(at, half), Buffer(at + half, len(data) - half)]

    def note(self, role: Role, head: int, pages: set[int], *, is_accepted: bool = True) -> None:
        self.rings[role].waiting.append(Offered(head, is_accepted, pages))

    def offer_bad(self, role: Role, bad: Descriptor) -> None:
        if not self.may_offer(role):
            return
        ring = self.ring(role)
        head = ring._free.pop(0)
        ring._chains[head] = [head]
        ring.write_descriptor(head, bad)
        ring.publish(head)
        table = [bad] * SIZE
        outcome = judge(table, head, self.read)
        pages = None if isinstance(outcome, str) else given_back(role, outcome, self.read, NAMEABLE)
        self.note(role, head, pages or set(), is_accepted=pages is not None)

    # The device

    @rule(chance=CHANCE)
    def serve_some(self, chance: Random) -> None:
        for role in chance.choices(list(Role), k=30):
            self.step(role)

    @rule(order=st.permutations(list(Role)))
    def serve_all(self, order: list[Role]) -> None:
        for role in order:
            for _ in range(SIZE):
                self.step(role)

    def step(self, role: Role) -> None:
        """One step, and what it gave back."""
        model = self.rings[role]
        in_hand = model.in_hand
        before = len(self.guest.discarder.released)
        if in_hand is not None and any(self.keeps.values()):
            in_hand.is_whole = False
        with contextlib.suppress(Killed):
            self.guest.step(role)
        given = self.guest.discarder.released[before:]
        pages = {page for start, size in given for page in range(start // PAGE, (start + size) // PAGE)}
        assert len(given) <= PIECES
        if pages:
            assert in_hand is not None
            assert pages <= in_hand.pages & self.memory()
            assert not self.keeps["inhibited"]
            assert not (self.keeps["poisoned"] and role is Role.REPORTING)
            in_hand.given |= pages
        self.take_back(role)

    def memory(self) -> set[int]:
        """Pages of the regions that are there."""
        return named(((each.guest_address, each.size) for each in self.there), self.there)

    def take_back(self, role: Role) -> None:
        """Take what came back: the first ones that wait."""
        model = self.rings[role]
        for head, length in self.ring(role).take_used():
            offered = model.waiting.pop(0)
            model.is_held = False
            assert (head, length) == (offered.head, 0)
            model.returned += 1
            if offered.is_whole and not self.guest.balloon.inert:
                assert offered.given >= offered.pages & self.memory()
        if role is Role.STATISTICS:
            taken = self.guest.balloon.rings.started.get(role)
            model.is_held = taken is not None and taken.held is not None

    # What comes in between

    @precondition(lambda self: REGIONS[0] in self.there)
    @rule(role=ROLES)
    def stop_or_start(self, role: Role) -> None:
        model, ring = self.rings[role], self.ring(role)
        if model.started:
            base = self.guest.request(Request.GET_VRING_BASE, wire.VringState(role, 0)).num
            assert base == model.returned & 0xFFFF
        else:
            assert self.guest.start_ring(ring, model.returned & 0xFFFF) == 0
        model.started, model.is_held = not model.started, False

    @rule(number=st.sampled_from([1, 2, 3, 4, 1, 2, 3, 4, 0]))
    def take_or_bring_memory(self, number: int) -> None:
        """Also the rings' own: they wait until it comes back."""
        region = REGIONS[number]
        single = wire.SingleRegion(0, region)
        if region in self.there:
            assert self.guest.status(Request.REM_MEM_REG, single) == 0
            self.there.remove(region)
        else:
            assert self.guest.status(Request.ADD_MEM_REG, single, [self.guest.memory.fd]) == 0
            self.there.append(region)
        self.abandon()

    def abandon(self) -> None:
        """Chains in hand are begun anew: where memory has gone or come, what was given of them before is another matter."""
        for model in self.rings.values():
            model.is_held = False
            for offered in model.waiting:
                offered.given.clear()

    @rule(poisoned=st.booleans())
    def poison(self, poisoned: bool) -> None:
        self.guest.write_config(Config(poison_val=int(poisoned)))
        self.keeps["poisoned"] = poisoned

    @rule(inhibited=st.booleans())
    def inhibit(self, inhibited: bool) -> None:
        self.guest.command("inhibit" if inhibited else "allow")
        self.keeps["inhibited"] = inhibited
        self.guest._journal.changed()

    @rule(refused=st.sampled_from([False, False, True]))
    def host(self, refused: bool) -> None:
        self.guest.discarder.error = HostError("no") if refused else None
        self.keeps["refused"] = refused
        self.was_refused |= refused

    @rule()
    def ask_for_statistics(self) -> None:
        self.guest.balloon.statistics.ask_now()
        self.guest.tick()
        self.take_back(Role.STATISTICS)

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def hint(self, seconds: float) -> None:
        if not self.guest.balloon.hinting.is_open and not self.guest.balloon.inert:
            self.guest.balloon.begin_hinting()
        self.guest.tick(seconds)

    @rule()
    def succeed(self) -> None:
        """Between two steps."""
        before = self.guest.visible()
        self.go_on()
        assert self.guest.visible().rings == before.rings

    def go_on(self) -> None:
        """What the one that ended had in hand is begun anew, and the buffer that it held is taken up again."""
        self.guest.succeed()
        for model in self.rings.values():
            model.is_held = False

    @rule(role=ROLES, where=st.sampled_from(["put", "release"]), after=st.booleans())
    def die(self, role: Role, where: str, after: bool) -> None:
        """In the middle of a step, before or after a chain is put back or a piece given back."""
        target: type = Virtqueue if where == "put" else Discarder
        with mock.patch.object(target, where, _deadly(getattr(target, where), after=after)):
            self.step(role)
        self.go_on()

    # What must hold

    @invariant()
    def bases_count_what_came_back(self) -> None:
        count_step("rings")
        for role, seen in zip(Role, self.guest.visible().rings, strict=True):
            model = self.rings[role]
            assert seen.started == model.started
            assert seen.base == model.returned & 0xFFFF
            assert self.ring(role).used_index == model.returned & 0xFFFF

    @invariant()
    def counters_count_once(self) -> None:
        for role, model in self.rings.items():
            assert self.guest.metrics.value("chains_total", role.name.lower()) == model.returned

    @invariant()
    def inert_only_for_a_host_that_refuses(self) -> None:
        assert self.was_refused or not self.guest.balloon.inert

    def teardown(self) -> None:
        self.guest.close()
        self.slice.stop()


def _deadly(act: Callable[..., None], *, after: bool) -> Callable[..., None]:
    """What does the same, and is the last thing that is done; or is not done any more."""

    def deadly(*arguments: object) -> None:
        if after:
            act(*arguments)
        raise Killed

    return deadly


Rings.TestCase.settings = settings(stateful_step_count=50)
# With --full ten times as many examples.
TestRings = pytest.mark.timeout(600)(Rings.TestCase)
