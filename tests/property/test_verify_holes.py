"""Properties of the proof that what became a hole was released.

A device, a guest and somebody who looks take turns in any order, one small step at a time: the device writes a record and later
does what it says, a look takes each page at a moment of its own, the guest touches pages. The trace is as long as what was
recorded.

1. However they take turns, a device that releases what it records is not suspected.
2. A page that is punched without a record, that was data at the look before and is not touched until the next, is found, and
   nothing else.
3. What vanished is what was data at one look and is not at the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from balloonlab.measure.ranges import PAGE, Places
from balloonlab.measure.verify_holes import Look, Release, Step, check_holes, judge_holes, step
from hostdev.pages import Span, merge
from qmp_glue.ram import Section

COUNT = 12
HEADER, RECORD = 32, 29
# Guest address and offset in the file differ, so that whoever mixes them up is found out.
BASE = 64 * PAGE
PLACES = Places([Section(BASE, COUNT * PAGE, 0, 0)])
RANGES = st.tuples(st.integers(0, COUNT - 1), st.integers(1, COUNT)).map(
    lambda pair: range(pair[0], min(COUNT, pair[0] + pair[1]))
)


@dataclass
class World:
    """The pages that are data, how many records the trace has, the releases among them, the looks taken."""

    data: set[int] = field(default_factory=lambda: set(range(COUNT)))
    records: int = 0
    releases: list[Release] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)

    def steps(self) -> list[Step]:
        return [step(*pair) for pair in pairwise(self.looks)]

    def length(self) -> int:
        return HEADER + RECORD * self.records

    def device(self, ranges: list[range]) -> Iterator[None]:
        for pages in ranges:
            span = Span(BASE + pages.start * PAGE, len(pages) * PAGE)
            self.records += 1
            self.releases.append(Release(self.length(), span))
            yield
            self.data -= set(pages)
            yield
            self.records += pages.start % 2  # an answer, now and then
            yield

    def guest(self, ranges: list[range]) -> Iterator[None]:
        for pages in ranges:
            self.data |= set(pages)
            yield

    def looker(self, count: int) -> Iterator[None]:
        for number in range(count):
            begin, seen = self.length(), []
            for page in range(COUNT):
                seen += [Span(page * PAGE, PAGE)] if page in self.data else []
                yield
            self.looks.append(Look(f"look {number}", begin, tuple(merge(seen)), self.length()))
            yield


def take_turns(draw: st.DrawFn, *actors: Iterator[None]) -> None:
    waiting = list(actors)
    while waiting:
        actor = waiting[draw(st.integers(0, len(waiting) - 1))]
        for _ in range(draw(st.integers(1, 8))):
            if next(actor, "ended") == "ended":
                waiting.remove(actor)
                break


@st.composite
def worlds(draw: st.DrawFn) -> World:
    world = World()
    released, touched = draw(st.lists(RANGES, max_size=6)), draw(st.lists(RANGES, max_size=4))
    take_turns(draw, world.device(released), world.guest(touched), world.looker(draw(st.integers(2, 4))))
    return world


@given(worlds())
def test_a_device_that_is_right_is_not_suspected(world: World) -> None:
    found = judge_holes(world.steps(), world.releases, PLACES)
    assert found.unexplained == ()
    assert check_holes(found, PLACES).outcome == ("pass" if found.vanished_bytes else "skip")


@given(worlds())
def test_what_vanished_is_what_was_there(world: World) -> None:
    seen = [
        {place for span in look.held for place in range(span.start, span.end, PAGE)} for look in world.looks
    ]
    gone = sum(len(before - after) for before, after in pairwise(seen))
    assert judge_holes(world.steps(), world.releases, PLACES).vanished_bytes == gone * PAGE


@given(worlds(), st.integers(0, COUNT - 1), RANGES)
def test_a_page_that_nobody_recorded_is_found(world: World, page: int, beside: range) -> None:
    """After all that went before: an answer, a look, releases of other pages, the fault, a look."""
    world.data.add(page)
    world.records += 1
    others = [range(one, one + 1) for one in beside if one != page]
    for actor in (world.looker(1), world.device(others)):
        for _ in actor:
            pass
    world.data.discard(page)
    for _ in world.looker(1):
        pass
    found = judge_holes(world.steps()[-1:], world.releases, PLACES)
    assert [one.places for one in found.unexplained] == [(Span(page * PAGE, PAGE),)]
    check = check_holes(found, PLACES)
    assert check.outcome == "fail"
    expected = f"1 page (4.0 KiB), the first at guest address {BASE + page * PAGE:#x}; first seen between"
    assert f"holes that no release in the device's trace names: {expected}" in check.message


def steps(actor: Iterator[None], count: int) -> None:
    for _ in range(count):
        next(actor)


def test_a_release_on_its_way_at_a_look_explains_what_it_takes_after_it() -> None:
    world = World()
    device = world.device([range(2, 4)])
    steps(device, 1)  # recorded
    list(world.looker(1))
    steps(device, 1)  # done
    list(world.looker(1))
    found = judge_holes(world.steps(), world.releases, PLACES)
    assert (found.vanished_bytes, found.unexplained) == (2 * PAGE, ())


def test_a_release_that_was_over_before_a_look_explains_nothing() -> None:
    world = World()
    list(world.device([range(1, 4), range(8, 9)]))
    world.records += 1
    list(world.guest([range(2, 3)]))
    list(world.looker(1))
    world.data.discard(2)
    list(world.looker(1))
    (left,) = judge_holes(world.steps(), world.releases, PLACES).unexplained
    assert (left.earlier, left.later, left.places) == ("look 0", "look 0", (Span(2 * PAGE, PAGE),))


def test_a_release_that_was_recorded_after_a_look_explains_nothing() -> None:
    world = World()
    list(world.looker(1))
    world.data.discard(2)
    list(world.looker(1))
    list(world.device([range(2, 3)]))
    assert len(judge_holes(world.steps(), world.releases, PLACES).unexplained) == 1
