"""An event loop in a thread of its own, for code that is not asynchronous: a guest goes on between two calls.

In a thread and not in the caller's: a test may run on an event loop of its own, and an interrupted call must leave the
loop whole, for what was started still has to be ended. Used by vm.py.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future, wait
from typing import Any, TypeVar

# From a call's interruption to its end: it ends what it has started, each step of which has a deadline of its own.
END_SECONDS = 60.0
# A signal that comes in the moment before a thread begins to wait does not wake it: Python sees it at the next look.
LOOK_SECONDS = 0.2

Value = TypeVar("Value")


class LoopThread:
    """Runs coroutines one at a time until close(). The thread lives as long, which what dies with its thread needs."""

    def __init__(self) -> None:
        ready: Future[asyncio.AbstractEventLoop] = Future()
        # A daemon: at an exit without close() nobody waits for it, and what it has started dies with it.
        self._thread = threading.Thread(target=_serve, args=(ready,), name="balloon-guest", daemon=True)
        self._thread.start()
        self._loop = ready.result()

    def run(self, work: Coroutine[Any, Any, Value]) -> Value:
        """Run one coroutine to its end. Whatever interrupts the caller cancels it, and is raised when it has ended."""
        __tracebackhide__ = True
        outcome: Future[Value] = Future()
        tasks: list[asyncio.Task[Value]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(lambda task: _hand_over(task, outcome))

        def give_up() -> None:
            if tasks:
                tasks[0].cancel()
            else:  # interrupted before begin() was asked for
                work.close()
                outcome.cancel()

        try:
            self._loop.call_soon_threadsafe(begin)
            while not outcome.done():
                wait([outcome], LOOK_SECONDS)
            return outcome.result()
        finally:
            if not outcome.done():
                self._loop.call_soon_threadsafe(give_up)
                wait([outcome], END_SECONDS)

    def close(self) -> None:
        """End the loop and its thread; can be repeated."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(END_SECONDS)


def _serve(ready: Future[asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        ready.set_result(loop)
        loop.run_forever()


def _hand_over(task: asyncio.Task[Value], outcome: Future[Value]) -> None:
    if task.cancelled():
        outcome.set_exception(CancelledError())
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())
