"""Which runs there are, in which order, and how many at once.

Arms take turns, and who is first changes from turn to turn, so that a machine that slows down slows all of them. Used by
command.py; runner.py makes each run.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from balloonlab.measure.scenario import Arm

# What a QEMU under TCG and our device hold beside guest RAM: 110 MiB and 25 MiB were seen, and TCG's cache may double.
OVERHEAD_BYTES = 384 << 20

Item = TypeVar("Item")
Value = TypeVar("Value")


def turns(arms: Sequence[Arm], repeat: int) -> list[tuple[Arm, int]]:
    """Return the runs in their order, as arm and number from 1: each turn has each arm once."""
    return [
        (arms[(place + turn) % len(arms)], turn + 1) for turn in range(repeat) for place in range(len(arms))
    ]


def at_once(memory_bytes: int, cpus: int, available_bytes: int, cores: int) -> int:
    """Return how many guests may run beside each other: each needs its RAM, its CPUs, and one more for QEMU and device."""
    return max(1, min(available_bytes // (memory_bytes + OVERHEAD_BYTES), cores // (cpus + 1)))


def room(memory_bytes: int, cpus: int) -> int:
    """Return at_once() for this machine as it is."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    available = int(found[1]) * 1024 if found else 0
    return at_once(memory_bytes, cpus, available, len(os.sched_getaffinity(0)))


async def in_slots(
    work: Callable[[Item], Awaitable[Value]], items: Sequence[Item], slots: int
) -> AsyncGenerator[Value, None]:
    """Do a piece of work for each item, so many at once, begun in their order; yield what each gives, as it ends.

    The first that raises ends the others, and is raised.
    """
    free = asyncio.Semaphore(slots)

    async def one(item: Item) -> Value:
        async with free:
            return await work(item)

    tasks = [asyncio.create_task(one(item)) for item in items]
    try:
        for done in asyncio.as_completed(tasks):
            yield await done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
