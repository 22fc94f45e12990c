"""The long tier on real kernels: more suites, and churn for minutes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from balloonlab.demo_run import Measurement, Plan
from tests.guest.guests import MIB, assert_all_well, booted, setup_for
from tests.guest.test_reporting import FILL, RETURN_SHARE, record_result

pytestmark = [pytest.mark.guest, pytest.mark.full, pytest.mark.timeout(1200)]

CHURN_SECONDS = 180.0

Record = Callable[[str, object], None]


@pytest.mark.parametrize("suite", ["forky", "trixie"])
def test_freed_memory_comes_back_with_other_suites(
    suite: str, tmp_path: Path, record_property: Record
) -> None:
    setup = setup_for(suite)
    with booted(setup, tmp_path) as guest:
        result = guest.wait(Measurement(setup, Plan(FILL), tmp_path).on(guest.rig))
    record_result(record_property, result)
    assert result.notes == []
    assert result.returned_bytes >= RETURN_SHARE * result.guest.memfree_regained_bytes


@pytest.mark.parametrize("suite", ["bookworm-backports", "trixie-backports"])
def test_live_memory_survives_minutes_of_churn(suite: str, tmp_path: Path, record_property: Record) -> None:
    """Fills of changing size, kind and content come and go on two CPUs beside 150 MiB that must not change."""
    with booted(replace(setup_for(suite), cpus=2), tmp_path) as guest:
        agent, device = guest.rig.agent, guest.rig.device
        live = guest.wait(agent.fill("anonymous", 150 * MIB, seed=1))
        end = time.monotonic() + CHURN_SECONDS
        rounds = 0
        while time.monotonic() < end:
            rounds += 1
            kind = ("anonymous", "tmpfs")[rounds % 2]
            sizes = (37 * rounds % 200 + 50, 53 * rounds % 250 + 50)

            async def both(kind: str = kind, sizes: tuple[int, int] = sizes, rounds: int = rounds) -> None:
                fills = await asyncio.gather(
                    *(agent.fill(kind, size * MIB, seed=1000 * rounds + size) for size in sizes)  # type: ignore[arg-type]
                )
                for filled in fills:
                    checked = await agent.checksum(filled.handle)
                    assert checked.mismatched_pages == 0
                    await agent.free(filled.handle)

            guest.wait(both())
        checked = guest.wait(agent.checksum(live.handle))
        assert (checked.bytes, checked.mismatched_pages) == (150 * MIB, 0)
        counters = device.counters()
        record_property("churn_rounds", rounds)
        record_property("churn_released_bytes", counters.released_bytes)
        assert counters.released_bytes > 1024 * MIB
        assert_all_well(guest)
