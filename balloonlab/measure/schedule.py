"""Which runs there are, in which order, and how many at once.

Arms take turns, and who is first changes from turn to turn, so that a machine that slows down slows all of them. Used by
command.py; runner.py makes each run.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

from balloonlab.fleet_options import available_bytes
from balloonlab.measure.scenario import Arm
from balloonlab.sizes import human
from hostdev.errors import UnsupportedHostError

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
    return at_once(memory_bytes, cpus, available_bytes(), len(os.sched_getaffinity(0)))


def check_room(memory_bytes: int, guests: int, available_bytes: int) -> None:
    """Raises UnsupportedHostError where so many guests at once may hold more than the machine has to give.

    A guest can come to hold all of its memory, and then whatever the machine runs out for would be measured, or killed.
    """
    wanted = guests * (memory_bytes + OVERHEAD_BYTES)
    if wanted > available_bytes:
        what = "a guest" if guests == 1 else f"{guests} guests at once"
        fix = "a smaller --memory" if guests == 1 else "a smaller --memory or fewer --jobs"
        raise UnsupportedHostError(
            f"{what} of {human(memory_bytes)} may hold all of it, with QEMU and the device {human(wanted)}, and this "
            f"machine has {human(available_bytes)} to give (MemAvailable): take {fix}"
        )


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
