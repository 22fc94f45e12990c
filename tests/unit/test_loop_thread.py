"""The event loop beside a test: results, errors, and a caller that is interrupted while it waits."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from balloonlab.testing.loop_thread import LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    before = threading.active_count()
    loop = LoopThread()
    yield loop
    loop.close()
    assert threading.active_count() == before


async def answer(value: int) -> int:
    await asyncio.sleep(0)
    return value


def test_a_result_comes_back(loop: LoopThread) -> None:
    assert [loop.run(answer(number)) for number in range(3)] == [0, 1, 2]


def test_an_error_is_the_caller_s(loop: LoopThread) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("as it was said")

    with pytest.raises(ValueError, match="as it was said"):
        loop.run(fail())
    assert loop.run(answer(4)) == 4


def test_what_was_started_goes_on_between_two_calls(loop: LoopThread) -> None:
    async def start() -> tuple[asyncio.Task[int], asyncio.Event]:
        event = asyncio.Event()

        async def wait() -> int:
            await event.wait()
            return 5

        return asyncio.create_task(wait()), event

    async def end(task: asyncio.Task[int], event: asyncio.Event) -> int:
        event.set()
        return await task

    assert loop.run(end(*loop.run(start()))) == 5


def test_it_works_for_a_caller_that_has_a_loop_of_its_own(loop: LoopThread) -> None:
    async def caller() -> int:
        return loop.run(answer(6))

    assert asyncio.run(caller()) == 6


def test_an_interrupted_caller_is_raised_to_when_the_work_has_ended(loop: LoopThread) -> None:
    """Ctrl-C: what was under way ends what it has started before the caller goes on, and the loop is whole."""
    told = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)  # the caller waits in the main thread, which gets it
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            told.append("ended")

    with pytest.raises(KeyboardInterrupt):
        loop.run(work())
    assert told == ["ended"]
    assert loop.run(answer(7)) == 7


def test_it_can_be_closed_twice() -> None:
    loop = LoopThread()
    loop.close()
    loop.close()
