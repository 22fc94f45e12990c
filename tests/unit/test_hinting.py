"""A round of free page hinting: ids, what counts, how it ends. And the same as a state machine under any order of events."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hostdev.hinting import ID_DONE, ID_MAX, ID_MIN, ID_STOP, ROUND_SECONDS, Estimate, Hinting, State
from tests.clock import Clock

MIB = 1 << 20


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hinting(clock: Clock) -> Hinting:
    return Hinting(clock)


def test_a_whole_round(hinting: Hinting, clock: Clock) -> None:
    assert hinting.shown_id == ID_STOP
    hinting.begin()
    number = hinting.shown_id
    assert number == ID_MIN + 1  # QEMU counts up before its first round
    hinting.take_id(number)
    assert hinting.shown_id == number
    for _ in range(3):
        hinting.take_block(4 * MIB)
    assert not hinting.is_over()
    clock.now += 0.25
    hinting.take_id(ID_STOP)
    assert hinting.is_over()
    hinting.end()
    assert hinting.shown_id == ID_DONE
    assert hinting.result == Estimate(12 * MIB, 3, 0.25, complete=True)


def test_blocks_outside_a_round_do_not_count(hinting: Hinting) -> None:
    hinting.take_block(MIB)
    hinting.begin()
    hinting.take_block(MIB)  # the guest has not said that it is this round's
    hinting.take_id(hinting.shown_id + 5)
    hinting.take_block(MIB)
    hinting.take_id(hinting.shown_id)
    hinting.take_block(3 * MIB)
    hinting.take_id(ID_STOP)
    hinting.take_block(MIB)
    hinting.end()
    assert hinting.result is not None
    assert hinting.result.bytes == 3 * MIB


def test_a_start_cannot_be_replayed(hinting: Hinting) -> None:
    hinting.begin()
    number = hinting.shown_id
    hinting.take_id(number)
    hinting.take_id(ID_STOP)
    hinting.take_id(number)
    assert hinting.state is State.STOP
    hinting.end()
    hinting.take_id(number)
    hinting.take_block(MIB)
    assert hinting.shown_id == ID_DONE


def test_a_stop_before_the_start_is_not_this_rounds(hinting: Hinting) -> None:
    """ "a stop followed by a start is not lost": the guest may still be on its way out of the last round."""
    hinting.begin()
    hinting.take_id(ID_STOP)
    assert hinting.state is State.REQUESTED
    assert not hinting.is_over()


@pytest.mark.parametrize("started", [False, True])
def test_time_runs_out(hinting: Hinting, clock: Clock, started: bool) -> None:
    hinting.begin()
    if started:
        hinting.take_id(hinting.shown_id)
        hinting.take_block(MIB)
    clock.now += ROUND_SECONDS - 0.001
    assert not hinting.is_over()
    clock.now += 0.001
    assert hinting.is_over()
    hinting.end()
    assert hinting.result is not None
    assert (hinting.result.bytes, hinting.result.complete) == (MIB * started, False)
    assert hinting.result.seconds == pytest.approx(ROUND_SECONDS)
    assert not hinting.is_over()


def test_each_round_has_an_id_of_its_own(hinting: Hinting) -> None:
    seen = []
    for _ in range(3):
        hinting.begin()
        seen.append(hinting.shown_id)
        hinting.end()
    assert seen == [ID_MIN + 1, ID_MIN + 2, ID_MIN + 3]
    hinting._id = ID_MAX
    hinting.begin()
    assert hinting.shown_id == ID_MIN


class Rounds(RuleBasedStateMachine):
    """Whatever guest and host do, in any order:

    - while no round is open, the guest reads STOP or DONE, and after any round DONE: it gets its memory back;
    - while one is open, it reads that round's id, which no other round had;
    - a round is over no later than ROUND_SECONDS after it began;
    - no more is counted than the guest hinted between its start and its stop.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.hinting = Hinting(self.clock)
        self.used: set[int] = set()
        self.hinted = 0
        self.began = 0.0

    @precondition(lambda self: not self.hinting.is_open)
    @rule()
    def begin(self) -> None:
        self.hinting.begin()
        assert self.hinting.shown_id not in self.used
        assert self.hinting.shown_id >= ID_MIN
        self.used.add(self.hinting.shown_id)
        self.hinted, self.began = 0, self.clock.now

    @rule(how=st.sampled_from(["this", "stop", "done", "last", "wild"]))
    def take_id(self, how: str) -> None:
        shown = self.hinting.shown_id
        values = {"this": shown, "stop": ID_STOP, "done": ID_DONE, "last": shown - 1, "wild": 77}
        self.hinting.take_id(values[how])

    @rule(size=st.integers(0, 1 << 22))
    def take_block(self, size: int) -> None:
        self.hinted += size
        self.hinting.take_block(size)

    @rule(seconds=st.floats(0, 1.5))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def look(self) -> None:
        if self.hinting.is_over():
            self.hinting.end()
            assert self.hinting.result is not None
            assert self.hinting.result.bytes <= self.hinted
            assert self.hinting.shown_id == ID_DONE

    @rule()
    def cancel(self) -> None:
        self.hinting.end()

    @invariant()
    def what_the_guest_reads(self) -> None:
        if self.hinting.is_open:
            assert self.hinting.shown_id in self.used
            assert self.clock.now - self.began < ROUND_SECONDS or self.hinting.is_over()
        else:
            assert self.hinting.shown_id == (ID_DONE if self.used else ID_STOP)


Rounds.TestCase.settings = settings(max_examples=200, stateful_step_count=30)
TestRounds = Rounds.TestCase
