"""The guest's statistics: what is kept of an answer, and when the next question is due."""

from __future__ import annotations

import pytest

from hostdev.errors import CommandError
from hostdev.statistics import ABSENT, Statistics
from hostdev.wire.balloon import STATISTIC, STATISTIC_NAMES, Statistic
from tests.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def statistics(clock: Clock) -> Statistics:
    return Statistics(clock, lambda: 1_700_000_000.9)


def answer(*pairs: tuple[int, int]) -> bytes:
    return b"".join(STATISTIC.encode(Statistic(*pair)) for pair in pairs)


def test_before_the_first_answer(statistics: Statistics) -> None:
    assert set(statistics.named().values()) == {ABSENT}
    assert len(statistics.named()) == 16
    assert statistics.last_update == 0
    assert statistics.due is None


def test_an_answer_replaces_the_one_before(statistics: Statistics) -> None:
    statistics.take(answer((0, 1), (4, 2)))
    statistics.take(answer((15, 3), (4, 5)) + b"rest")
    assert statistics.named() == dict.fromkeys(STATISTIC_NAMES, ABSENT) | {
        "stat-free-memory": 5,
        "stat-direct-reclaims": 3,
    }
    assert statistics.last_update == 1_700_000_000
    assert statistics.updates == 2


def test_tags_without_a_name_are_kept_by_number(statistics: Statistics) -> None:
    statistics.take(answer((16, 1), (0xFFFF, 2), (3, 3)))
    assert statistics.unnamed() == {16: 1, 0xFFFF: 2}
    assert statistics.named()["stat-minor-faults"] == 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "timer value must be greater than zero"), (1 << 32, "timer value is too big")]
)
def test_intervals_out_of_bounds(statistics: Statistics, seconds: int, text: str) -> None:
    statistics.set_interval(7)
    with pytest.raises(CommandError, match=text):
        statistics.set_interval(seconds)
    assert statistics.interval == 7


def test_polling_begins_at_once_and_goes_on_from_the_answer(statistics: Statistics, clock: Clock) -> None:
    statistics.set_interval(10)
    assert statistics.is_due()
    statistics.note_asked(asked=True)
    clock.now += 1000
    assert not statistics.is_due()  # a guest that does not answer is not asked again
    statistics.take(answer())
    assert statistics.due == clock.now + 10
    clock.now += 9.9
    assert not statistics.is_due()
    clock.now += 0.1
    assert statistics.is_due()


def test_without_a_buffer_the_question_waits_for_the_next_turn(statistics: Statistics, clock: Clock) -> None:
    statistics.set_interval(10)
    statistics.note_asked(asked=False)
    assert statistics.due == clock.now + 10


def test_another_interval_counts_from_now(statistics: Statistics, clock: Clock) -> None:
    statistics.set_interval(1000)
    statistics.note_asked(asked=True)
    statistics.set_interval(3)
    assert statistics.due == clock.now + 3
    statistics.set_interval(3)
    clock.now += 1
    assert statistics.due == clock.now + 2


def test_polling_ends_and_the_last_answer_stays(statistics: Statistics) -> None:
    statistics.set_interval(1)
    statistics.take(answer((4, 9)))
    statistics.set_interval(0)
    assert statistics.due is None
    assert statistics.named()["stat-free-memory"] == 9
    statistics.take(answer((4, 8)))
    assert statistics.due is None


def test_a_single_question(statistics: Statistics) -> None:
    statistics.ask_now()
    assert statistics.is_due()
    statistics.note_asked(asked=False)
    assert statistics.due is None
