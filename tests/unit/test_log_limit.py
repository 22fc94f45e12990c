"""The limit of the log: a burst, then a trickle, from each place; what was left out is counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from hostdev.log_limit import BURST, PERIOD, LogLimit

log = logging.getLogger("tests.log_limit")


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(clock: Clock) -> Iterator[Lines]:
    handler = Lines()
    handler.addFilter(LogLimit(clock))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    yield handler
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)
    log.propagate = True


def chatter(times: int) -> None:
    for number in range(times):
        log.warning("ring %d: %s", number, "50% of it")


def test_a_burst_passes_and_no_more(lines: Lines) -> None:
    chatter(BURST + 500)
    assert lines.said == [f"ring {number}: 50% of it" for number in range(BURST)]


def test_one_more_in_its_time_says_what_was_left_out(lines: Lines, clock: Clock) -> None:
    chatter(BURST + 500)
    clock.now += PERIOD
    chatter(3)
    clock.now += PERIOD / 2
    chatter(1)
    assert lines.said[BURST:] == ["ring 0: 50% of it (500 more like it were left out)"]
    clock.now += PERIOD / 2
    chatter(1)
    assert lines.said[BURST + 1 :] == ["ring 0: 50% of it (3 more like it were left out)"]


def test_an_hour_of_it(lines: Lines, clock: Clock) -> None:
    for _ in range(3600):
        clock.now += 1.0
        chatter(2)
    assert len(lines.said) <= BURST + 3600 / PERIOD


def test_quiet_earns_no_more_than_a_burst(lines: Lines, clock: Clock) -> None:
    chatter(1)
    clock.now += 1e6
    chatter(3 * BURST)
    assert len(lines.said) == 1 + BURST


def test_places_do_not_share(lines: Lines) -> None:
    chatter(BURST + 1)
    log.warning("elsewhere")
    assert lines.said[-1] == "elsewhere"


def test_what_was_asked_for_is_not_limited(lines: Lines) -> None:
    for _ in range(10 * BURST):
        log.debug("a chain")
    assert len(lines.said) == 10 * BURST


def test_a_traceback_is_a_line_as_any(lines: Lines) -> None:
    for _ in range(BURST + 1):
        try:
            1 // 0  # noqa: B018
        except ZeroDivisionError:
            log.exception("unexpected")
    assert len(lines.said) == BURST
    assert "ZeroDivisionError" in lines.said[0]
