"""A real guest under churn whose device becomes another version and back again: neither it nor QEMU may notice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from balloonlab.demo_run import Measurement, Plan
from balloonlab.results import Result
from tests.guest.balloon import cell
from tests.guest.guests import MIB, Booted, assert_all_well, booted, setup_for
from tests.guest.test_reporting import RETURN_SHARE
from tests.upgradable import APART, LATER, Versions

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

LIVE = 150 * MIB
FILL = 300 * MIB
UPGRADES = 8
# Seconds that one may take: a new process is started beside a guest that is busy.
UPGRADE_SECONDS = 30.0
LOOK_SECONDS = 0.05

SERVES, REFUSED = " serves from now on", "the upgrade is refused"


@pytest.fixture
def versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Versions:
    """What the device is started from, and started from again."""
    (tmp_path / "versions").mkdir()
    versions = Versions(tmp_path / "versions")
    versions.make("later", *LATER)
    versions.make("apart", *LATER, APART)
    monkeypatch.setenv("PYTHONPATH", str(versions.installed))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    return versions


async def become(guest: Booted, versions: Versions, name: str) -> bool:
    """Upgrade to a version. False if that was refused."""
    device = guest.rig.device
    versions.install(name)
    before = device.log_text()
    os.kill(device.pid, signal.SIGHUP)
    end = time.monotonic() + UPGRADE_SECONDS
    while time.monotonic() < end:
        said = device.log_text()
        if said.count(SERVES) > before.count(SERVES):
            return True
        if said.count(REFUSED) > before.count(REFUSED):
            return False
        await asyncio.sleep(LOOK_SECONDS)
    raise AssertionError(f"no upgrade within {UPGRADE_SECONDS:g} s: {device.log_text()}")


class Churn:
    """Fills that come and go beside live memory, until told to end."""

    def __init__(self, guest: Booted) -> None:
        self._agent = guest.rig.agent
        self._random = random.Random(5)
        self.rounds = 0

    async def go_on(self, done: asyncio.Event) -> None:
        live = await self._agent.fill("anonymous", LIVE, seed=1)
        while not done.is_set():
            self.rounds += 1
            filled = await self._agent.fill("tmpfs", self._random.randrange(40, 200) * MIB, seed=self.rounds)
            assert (await self._agent.checksum(filled.handle)).mismatched_pages == 0
            await self._agent.free(filled.handle)
            checked = await self._agent.checksum(live.handle)
            assert (checked.bytes, checked.mismatched_pages) == (LIVE, 0)
        await self._agent.free(live.handle)


async def back_and_forth(guest: Booted, versions: Versions, measurement: Measurement) -> tuple[int, Result]:
    """Upgrade under churn, then measure what comes back. Returns the rounds of churn as well."""
    churn, done = Churn(guest), asyncio.Event()
    at_work = asyncio.create_task(churn.go_on(done))
    try:
        for number in range(UPGRADES):
            assert await become(guest, versions, ("later", "now")[number % 2])
        assert await become(guest, versions, "apart")
        # What that one has written the first cannot read; it goes on.
        assert not await become(guest, versions, "now")
    finally:
        done.set()
        await at_work
    return churn.rounds, await measurement.on(guest.rig)


def test_a_guest_notices_no_upgrade(
    tmp_path: Path, versions: Versions, record_property: Callable[[str, object], None]
) -> None:
    setup = replace(setup_for("bookworm-backports"), cpus=2)
    with booted(setup, tmp_path) as guest:
        rounds, result = guest.wait(back_and_forth(guest, versions, Measurement(setup, Plan(FILL), tmp_path)))
        assert result.notes == []
        assert result.returned_bytes >= RETURN_SHARE * result.guest.memfree_regained_bytes
        assert guest.wait(guest.rig.vm.query_status()) == "running"
        assert_all_well(guest)
        assert guest.rig.device.log_text().count(SERVES) == UPGRADES + 1
        back = f"{result.returned_bytes // MIB} of {FILL // MIB} MiB back at the end"
        cell(
            record_property,
            guest,
            "upgrades to another version and back, under churn",
            f"{UPGRADES + 1}; {back}",
        )
    record_property("rounds", rounds)
