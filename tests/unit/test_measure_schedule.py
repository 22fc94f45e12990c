"""Which runs there are, in which order, and how many at once."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from balloonlab.measure.schedule import OVERHEAD_BYTES, at_once, check_room, in_slots, turns
from hostdev.errors import UnsupportedHostError

GIB = 1 << 30


def test_arms_take_turns_and_who_is_first_changes() -> None:
    assert turns(["ours", "qemu", "off"], 2) == [
        ("ours", 1), ("qemu", 1), ("off", 1), ("qemu", 2), ("off", 2), ("ours", 2),
    ]  # fmt: skip
    assert turns(["ours"], 3) == [("ours", 1), ("ours", 2), ("ours", 3)]


@pytest.mark.parametrize(
    ("memory", "cpus", "available", "cores", "expected"),
    [(GIB, 1, 100 * GIB, 2, 1), (GIB, 1, 100 * GIB, 8, 4), (GIB, 3, 100 * GIB, 8, 2), (GIB, 1, GIB // 2, 8, 1),
     (GIB, 1, 2 * (GIB + OVERHEAD_BYTES), 64, 2), (GIB, 1, 2 * (GIB + OVERHEAD_BYTES) - 1, 64, 1)],
)  # fmt: skip
def test_guests_at_once_are_bounded_by_memory_and_cores(
    memory: int, cpus: int, available: int, cores: int, expected: int
) -> None:
    assert at_once(memory, cpus, available, cores) == expected


def test_guests_that_may_come_to_hold_more_than_there_is_are_refused() -> None:
    check_room(GIB, 1, GIB + OVERHEAD_BYTES)
    check_room(GIB, 3, 3 * (GIB + OVERHEAD_BYTES))
    with pytest.raises(
        UnsupportedHostError, match=r"a guest of 1.0 GiB .* 1.4 GiB, .* take a smaller --memory$"
    ):
        check_room(GIB, 1, GIB + OVERHEAD_BYTES - 1)
    with pytest.raises(UnsupportedHostError, match=r"3 guests at once .* or fewer --jobs$"):
        check_room(GIB, 3, 3 * (GIB + OVERHEAD_BYTES) - 1)


class Work:
    """Pieces of work that end when they are told to, and count how many go on."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.most = 0
        self.cancelled: list[int] = []

    async def __call__(self, item: int) -> int:
        self.begun.append(item)
        self.most = max(self.most, len(self.begun) - len(self.ended))
        try:
            for _ in range(3):
                await asyncio.sleep(0)
            if item < 0:
                raise ValueError(item)
        except asyncio.CancelledError:
            self.cancelled.append(item)
            raise
        finally:
            self.ended.append(item)
        return item * 10


async def gathered(work: Work, items: list[int], slots: int) -> list[int]:
    async with contextlib.aclosing(in_slots(work, items, slots)) as ended:
        return [one async for one in ended]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_so_many_at_once_and_no_more(slots: int) -> None:
    work = Work()
    assert sorted(asyncio.run(gathered(work, [1, 2, 3, 4], slots))) == [10, 20, 30, 40]
    assert work.begun == [1, 2, 3, 4]
    assert work.most == min(slots, 4)


def test_the_first_that_fails_ends_the_others() -> None:
    work = Work()
    with pytest.raises(ValueError, match="-1"):
        asyncio.run(gathered(work, [-1, 2, 3], 2))
    assert set(work.begun) == set(work.ended)
    assert 3 not in work.begun or 3 in work.cancelled
