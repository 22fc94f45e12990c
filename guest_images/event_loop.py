"""Discrete time for models: callbacks at moments of simulated time, as fast as they run or in step with real time.

Not asyncio: nothing waits here, and a run repeats exactly. Callbacks for the same moment run in the order they were asked
for. Modelled guests share one loop, so that they live in step.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from guest_images.free_lists import ModelError

Callback = Callable[[], None]


@dataclass(order=True, slots=True)
class Event:
    """A callback that waits for its moment (seconds of simulated time)."""

    time: float
    _sequence: int
    _callback: Callback | None = field(compare=False)

    def cancel(self) -> None:
        """Make it never happen; nothing if it has."""
        self._callback = None

    def run(self) -> None:
        """Call back, once at most."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class EventLoop:
    """Simulated time, from 0 s on.

    speed: simulated seconds in a real second, 1.0 for real time; None for as fast as it goes.
    """

    def __init__(self, speed: float | None = None) -> None:
        if speed is not None and speed <= 0:
            raise ModelError(
                f"time cannot run {speed} times as fast: give more than 0, or nothing for no limit"
            )
        self.now = 0.0
        self._speed = speed
        self._events: list[Event] = []
        self._sequence = 0

    def call_at(self, moment: float, callback: Callback) -> Event:
        """Call back at a moment; at once, but after this callback, if it has passed."""
        event = Event(max(moment, self.now), self._sequence, callback)
        self._sequence += 1
        heapq.heappush(self._events, event)
        return event

    def call_later(self, delay: float, callback: Callback) -> Event:
        """Call back so many seconds from now."""
        return self.call_at(self.now + delay, callback)

    def run_until(self, end: float) -> None:
        """Run all events up to and at a moment; then it is that moment, or stays later if it has passed."""
        real = time.monotonic()
        begun = self.now
        while self._events and self._events[0].time <= end:
            self._pace(real, self._events[0].time - begun)
            event = heapq.heappop(self._events)
            self.now = event.time
            event.run()
        self._pace(real, end - begun)
        self.now = max(self.now, end)

    def _pace(self, real: float, elapsed: float) -> None:
        """Wait until so many simulated seconds have passed since a moment of real time."""
        if self._speed is not None:
            time.sleep(max(0.0, real + elapsed / self._speed - time.monotonic()))
