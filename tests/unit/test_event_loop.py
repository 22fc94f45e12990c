"""Simulated time: order, cancelling, and pacing by the real clock."""

from __future__ import annotations

import time

import pytest

from guest_images.event_loop import EventLoop
from guest_images.free_lists import ModelError


def test_events_run_in_order_of_time_then_of_asking() -> None:
    loop, seen = EventLoop(), list[str]()
    loop.call_at(2, lambda: seen.append("c"))
    loop.call_at(1, lambda: seen.append("a"))
    loop.call_at(1, lambda: seen.append("b"))
    loop.run_until(1)
    assert (seen, loop.now) == (["a", "b"], 1)
    loop.run_until(5)
    assert (seen, loop.now) == (["a", "b", "c"], 5)


def test_an_event_may_ask_for_more_and_the_past_is_now() -> None:
    loop, seen = EventLoop(), list[float]()

    def tick() -> None:
        seen.append(loop.now)
        if len(seen) < 3:
            loop.call_later(0.5, tick)
            loop.call_at(-1, lambda: seen.append(-loop.now))

    loop.call_at(1, tick)
    loop.run_until(10)
    assert seen == [1, -1, 1.5]


def test_a_cancelled_event_does_not_happen() -> None:
    loop, seen = EventLoop(), list[int]()
    event = loop.call_later(1, lambda: seen.append(1))
    event.cancel()
    event.cancel()
    loop.run_until(2)
    assert not seen


def test_real_time_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    loop, seen = EventLoop(speed=4), list[float]()
    loop.call_at(2, lambda: seen.append(clock[0]))
    loop.run_until(8)
    assert (seen, clock) == ([100.5], [102])


def test_time_must_run_forward() -> None:
    with pytest.raises(ModelError, match="more than 0"):
        EventLoop(speed=0)
