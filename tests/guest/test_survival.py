"""A real guest under churn whose device's worker is killed again and again: neither it nor QEMU may notice.

Two CPUs, live memory with known contents beside fills that come and go, a balloon that moves, statistics every second.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from balloonlab.demo_run import Measurement, Plan
from balloonlab.device import Counters
from balloonlab.results import Result
from balloonlab.trace_check import TraceCheck, violations
from tests.guest.balloon import cell, command, has_arrived, memory_of, wait_until
from tests.guest.guests import MEMORY, MIB, Booted, assert_all_well, booted, setup_for, traced
from tests.guest.test_reporting import RETURN_SHARE
from tests.killing import Killer

pytestmark = [pytest.mark.guest, pytest.mark.timeout(1200)]

LIVE = 150 * MIB
FILL = 400 * MIB
# As often as they are counted: a file that is at most half a second old.
LOOK_SECONDS = 0.25
# Of a target of which the guest has to move at most 64 MiB.
FOLLOW_SECONDS = 60.0

INTERVAL = {"path": "/machine/peripheral/balloon0", "property": "guest-stats-polling-interval", "value": 1}

Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Ordeal:
    """kills: at the least, to the end. seconds: of churn. pause: between two kills, on average."""

    kills: int
    seconds: float
    pause: float


SHORT = Ordeal(kills=40, seconds=6.0, pause=0.35)
LONG = Ordeal(kills=300, seconds=600.0, pause=1.2)


class Survival:
    """One guest's way through it."""

    def __init__(self, guest: Booted, seed: int) -> None:
        self._guest = guest
        self._agent = guest.rig.agent
        self._random = random.Random(seed)
        self.killer = Killer(guest.rig.device.pid, seed)
        self.rounds = self.targets = 0
        self.backwards: list[str] = []

    @property
    def kills(self) -> int:
        return self.killer.kills

    async def go_through(self, ordeal: Ordeal, measurement: Measurement) -> Result:
        """Churn, then fill, free and measure, all of it while workers die."""
        async with self.killing(ordeal.pause) as tasks:
            await self.churn(ordeal)
            result = await measurement.on(self._guest.rig)
            # Some die before they have written anything down, so that more are killed than the trace has.
            while self.kills < 3 * ordeal.kills // 2 and not any(task.done() for task in tasks):
                await asyncio.sleep(LOOK_SECONDS)
            return result

    @contextlib.asynccontextmanager
    async def killing(self, pause: float) -> AsyncIterator[list[asyncio.Task[None]]]:
        """Workers die and counters are watched for as long as this lasts, or one of the two tasks fails."""
        tasks = [asyncio.create_task(work) for work in (self.killer.go_on(pause), self._watch_counters())]
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [each for each in ended if not isinstance(each, asyncio.CancelledError)] == []

    async def _watch_counters(self) -> None:
        last: dict[object, float] = {}
        while True:
            now = totals(self._guest.rig.device.counters())
            self.backwards += [
                f"{name}: {last[name]:g}, {now.get(name)}" for name in last if now.get(name, 0) < last[name]
            ]
            last = now
            await asyncio.sleep(LOOK_SECONDS)

    async def churn(self, ordeal: Ordeal) -> None:
        """Fill, check and free beside live memory, and move the balloon meanwhile."""
        live = await self._agent.fill("anonymous", LIVE, seed=1)
        end = time.monotonic() + ordeal.seconds
        while time.monotonic() < end:
            self.rounds += 1
            await asyncio.gather(self._come_and_go("anonymous"), self._come_and_go("tmpfs"), self._follow())
            checked = await self._agent.checksum(live.handle)
            assert (checked.bytes, checked.mismatched_pages) == (LIVE, 0)
        await self._reach(MEMORY)
        checked = await self._agent.checksum(live.handle)
        assert (checked.bytes, checked.mismatched_pages) == (LIVE, 0)
        await self._agent.free(live.handle)

    async def _come_and_go(self, kind: str) -> None:
        number = self._random.randrange(1 << 30)
        filled = await self._agent.fill(kind, self._random.randrange(40, 200) * MIB, seed=number)  # type: ignore[arg-type]
        assert (await self._agent.checksum(filled.handle)).mismatched_pages == 0
        await self._agent.free(filled.handle)

    async def _follow(self) -> None:
        await self._reach(MEMORY - self._random.randrange(1, 65) * MIB)
        self.targets += 1

    async def _reach(self, size: int) -> None:
        """Ask for a size and wait until the guest says that it has it."""
        execute = self._guest.rig.control.execute
        await execute("balloon", {"value": size})
        end = time.monotonic() + FOLLOW_SECONDS
        while (now := await execute("query-balloon")) != {"actual": size}:
            assert time.monotonic() < end, f"the guest does not come to {size}: {now}"
            await asyncio.sleep(LOOK_SECONDS)


def totals(counters: Counters) -> dict[object, float]:
    return {(name, labels): value for name, labels, value in counters.samples if name.endswith("_total")}


def polled(guest: Booted) -> int:
    return guest.rig.device.counters().total("chains_total", queue="statistics")


def assert_statistics_go_on(guest: Booted) -> None:
    """They are still asked for, and are still the guest's own."""
    begun = polled(guest)
    wait_until(guest, lambda: polled(guest) >= begun + 2, "the guest is not polled any more")
    stats = command(guest, "query-balloon-stats", {"refresh": True})["stats"]
    assert [stats["stat-total-memory"]] == memory_of(guest, "MemTotal")


@pytest.mark.parametrize(
    ("suite", "ordeal"),
    [
        pytest.param("bookworm-backports", SHORT, id="short"),
        pytest.param("bookworm-backports", LONG, id="long", marks=pytest.mark.full),
        pytest.param("trixie-backports", LONG, id="long-trixie-backports", marks=pytest.mark.full),
    ],
)
def test_a_guest_notices_nothing(suite: str, ordeal: Ordeal, tmp_path: Path, record_property: Record) -> None:
    setup = replace(setup_for(suite, trace=True), cpus=2, control=True)
    with booted(setup, tmp_path) as guest:
        command(guest, "qom-set", INTERVAL)
        survival = Survival(guest, seed=11)
        result = guest.wait(survival.go_through(ordeal, Measurement(setup, Plan(FILL), tmp_path)))
        assert result.notes == []
        assert result.returned_bytes >= RETURN_SHARE * result.guest.memfree_regained_bytes
        assert survival.backwards == []
        assert guest.wait(guest.rig.vm.query_status()) == "running"
        assert has_arrived(guest)
        assert_statistics_go_on(guest)
        assert_all_well(guest)
        check = TraceCheck()
        assert violations(traced(guest), check) == []
        back = f"{result.returned_bytes // MIB} of {FILL // MIB} MiB back at the end"
        feature = f"workers killed under {ordeal.seconds:g} s of churn"
        cell(record_property, guest, feature, f"{survival.kills}; {back}")
    for name in ("kills", "rounds", "targets"):
        record_property(name, getattr(survival, name))
    record_property("chains_returned", check.chains)
    assert survival.kills >= ordeal.kills
    assert check.workers > ordeal.kills
