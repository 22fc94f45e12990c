"""Invariants of what is given back and what is returned, whatever a driver writes into its rings.

I2. Every byte that is ever given back lies in a range that the guest named, inside one region, on whole pages, in a chain
    that was not yet returned at that moment. And all of them are: what a chain names has been given back when it is
    returned.
I3. Every head that is taken is returned exactly once, in the order in which it was offered, except the one statistics
    buffer that is held. A ring with a head that cannot be followed returns what came before it, and nothing else.

What a chain names, and what may be made of a ring, are worked out by oracle_rings.py and oracle_pages.py, which share
nothing with the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostdev.errors import RingError
from hostdev.wire.balloon import Role
from tests.hostile_driver import NOTHING, Expected
from tests.hostile_guest import HostileGuest

# A generator with a seed that the failing example shows.
CHANCE = st.randoms(use_true_random=True)


def serve(guest: HostileGuest, turns: Sequence[Role]) -> None:
    """Steps in this order, then each ring until it is idle."""
    for role in turns:
        with contextlib.suppress(RingError):
            guest.step(role)
    for role in Role:
        guest.run(role)


def returned(role: Role, expected: Expected) -> list[int]:
    """The heads that the driver gets back: all that are taken, but a statistics buffer that is held."""
    if role is Role.STATISTICS and expected.heads and not isinstance(expected.outcomes[-1], str):
        return expected.heads[:-1]
    return expected.heads


def assert_given_in_hand(guest: HostileGuest, expected: Sequence[Expected]) -> None:
    """Each release is of the first chain of its ring that was not returned at that moment."""
    for each in guest.given:
        in_hand = [
            expected[role].pages[each.used[role]]
            for role in (Role.INFLATE, Role.REPORTING)
            if each.used[role] < len(expected[role].pages)
        ]
        assert any(each.pages <= pages for pages in in_hand)


def check(roles: Collection[Role], chance: Random, steps: int = 0) -> None:
    """Offer anything on these rings, and have the device serve it, so many steps in any order first."""
    with HostileGuest(chance) as guest:
        driver = guest.driver
        contents = [driver.content() if role in roles else NOTHING for role in Role]
        driver.write(contents)
        expected = [driver.expected(role, each) for role, each in zip(Role, contents, strict=True)]
        serve(guest, chance.choices(list(Role), k=steps))
        for role in Role:
            assert driver.used(role) == returned(role, expected[role])
            assert (role not in guest.balloon.rings.started) == expected[role].breaks
        assert_given_in_hand(guest, expected)
        named = [pages for ring in expected for pages in ring.pages]
        assert set().union(*(each.pages for each in guest.given)) == set().union(*named)
        assert not guest.balloon.inert


@pytest.mark.parametrize("role", Role)
@given(CHANCE)
def test_one_ring(role: Role, chance: Random) -> None:
    check([role], chance)


@given(CHANCE)
def test_all_rings_at_once(chance: Random) -> None:
    """In any order of steps."""
    check(list(Role), chance, steps=40)
