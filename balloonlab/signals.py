"""Ctrl-C and SIGTERM: the first one ends what goes on, in order; further ones change nothing while it ends.

The end is bounded, as everything that is waited for has a deadline; SIGQUIT and SIGKILL remain for who cannot wait for
that. cli.py turns the error into a line and an exit status; what uses asyncio is run with run().
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

ENDING = (signal.SIGINT, signal.SIGTERM)

Value = TypeVar("Value")


class SignalledError(KeyboardInterrupt):
    """One of ENDING has come. A KeyboardInterrupt, which asyncio and libraries do not hold up."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def first_only(act: Callable[[int], None]) -> Iterator[None]:
    """Have the first of ENDING call act with its number. From then on they are ignored, also after the context."""

    def handle(number: int, _frame: object) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)
        act(number)

    previous = {each: signal.signal(each, handle) for each in ENDING}
    try:
        yield
    finally:
        for each, handler in previous.items():
            # Not if one came, here or in a context within.
            if signal.getsignal(each) is handle:
                signal.signal(each, handler)


def unwind(number: int) -> NoReturn:
    """Raise SignalledError: how code that does not use asyncio is ended."""
    raise SignalledError(number)


def run(work: Coroutine[Any, Any, Value]) -> Value:
    """Run work as asyncio.run() does; a signal cancels it, so that it ends what it started. Raises SignalledError.

    Also when work comes to another end meanwhile: Ctrl-C reaches QEMU and the device as well, and they may be faster.
    """
    # When there is something to run, it has been imported: not before signals are in order.
    from balloonlab.errors import EXPECTED  # noqa: PLC0415

    async def until_told() -> Value:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        told: list[int] = []

        def cancel(number: int) -> None:
            told.append(number)
            loop.call_soon_threadsafe(task.cancel)

        # Not loop.add_signal_handler(): the loop's end would leave the signals deadly for what comes after.
        with first_only(cancel):
            try:
                value = await work
                if not told:
                    return value
            except (asyncio.CancelledError, *EXPECTED):
                if not told:
                    raise
            unwind(told[0])

    return asyncio.run(until_told())
