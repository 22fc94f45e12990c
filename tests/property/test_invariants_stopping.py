"""The invariant of a ring that stops, with a real worker whose rings are all busy.

I5. After GET_VRING_BASE is answered, no byte of guest memory changes on behalf of that ring and its call descriptor is not
    written; its base names the first chain that was not returned. Once all rings are stopped, no byte changes at all.
    What its chains named is as it was: none of it is given back any more.

That nothing happens any more is looked for after a number of further messages: the worker takes a turn for each.
"""

from __future__ import annotations

import os
import select
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostdev.driver import DriverRing, GuestMemory
from hostdev.fds import Fd
from hostdev.frontend import Frontend, start_device
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import Role
from hostdev.wire.vhost_user import Request
from tests import busy
from tests.in_process import PAGE

pytestmark = pytest.mark.usefixtures("patience")

CHANCE = st.randoms(use_true_random=True)
# Turns of the worker in which nothing may happen.
TURNS = 20
RING_BYTES = 0x40000


def take_call(call: Fd) -> int:
    """Take the count of a call descriptor, 0 if there is none."""
    poll = select.poll()
    poll.register(call.fileno(), select.POLLIN)
    return os.eventfd_read(call.fileno()) if poll.poll(0) else 0


def seen(front: Frontend, ring: DriverRing) -> tuple[bytes, bytes]:
    """What a driver sees of a ring, and the pages that its chains name."""
    start = ring.descriptors
    return front.memory.read(start, RING_BYTES), front.memory.read(busy.area(ring.index), busy.FILLED * PAGE)


def work(front: Frontend, chance: Random) -> None:
    """Keep all rings busy for some messages."""
    busy.fill(front)
    for _ in range(chance.randrange(6)):
        busy.refill(front)
        for _ in range(chance.randrange(3)):
            front.read_config()
    busy.refill(front)


def stop_some(front: Frontend, chance: Random) -> list[DriverRing]:
    """Stop some rings in any order, disabled before or not. Returns them."""
    rings = chance.sample(front.rings, chance.randint(1, len(front.rings)))
    if chance.randrange(2):
        for ring in rings:
            front.request(Request.SET_VRING_ENABLE, wire.VringState(ring.index, 0), need_reply=True)
    for ring in rings:
        base = front.request(Request.GET_VRING_BASE, wire.VringState(ring.index, 0)).num
        assert base == ring.used_index
        take_call(ring.call)
    return rings


@settings(max_examples=20)
@given(CHANCE)
def test_stopped_rings_stay_as_they_are(chance: Random) -> None:
    with start_device() as device, Frontend(device.connect(), memory=GuestMemory(busy.MEMORY)) as front:
        front.start()
        work(front, chance)
        stopped = stop_some(front, chance)
        before = [seen(front, ring) for ring in stopped]
        going_on = [Role(ring.index) for ring in front.rings if ring not in stopped]
        for _ in range(TURNS):
            busy.refill(front, going_on)
            front.read_config()
        assert [seen(front, ring) for ring in stopped] == before
        assert [take_call(ring.call) for ring in stopped] == [0] * len(stopped)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_changes_once_all_are_stopped(seed: int) -> None:
    """Not a byte of memory, and not a page of the file."""
    chance = Random(seed)
    with start_device() as device, Frontend(device.connect(), memory=GuestMemory(busy.MEMORY)) as front:
        front.start()
        work(front, chance)
        front.stop()
        for ring in front.rings:
            take_call(ring.call)
        before = [seen(front, ring) for ring in front.rings], front.memory.footprint()
        for ring in front.rings:
            ring.notify()
        for _ in range(TURNS):
            front.read_config()
        assert ([seen(front, ring) for ring in front.rings], front.memory.footprint()) == before
        assert [take_call(ring.call) for ring in front.rings] == [0] * len(front.rings)
