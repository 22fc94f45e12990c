"""What needs a boot of its own: other features, other words on the kernel's command line, memory that is added, long loads.

Each suite in a cell of the table in docs/results/ where the feature is one of its rows.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from guest_images.errors import AgentRefusedError
from qmp_glue.board import Board
from qmp_glue.hotplug import plug_balloon, unplug_balloon
from tests.guest.balloon import (
    NOISE,
    Record,
    cell,
    command,
    has_arrived,
    large_blocks,
    memory_of,
    reach,
    status,
    wait_until,
)
from tests.guest.guests import (
    MEMORY,
    MIB,
    Booted,
    assert_all_well,
    assert_reports,
    booted,
    complaints,
    setup_for,
)
from tests.guest.prepare import ALL_SUITES

pytestmark = [pytest.mark.guest, pytest.mark.full, pytest.mark.timeout(600)]

suites = pytest.mark.parametrize("suite", ALL_SUITES)

STRESS_TARGETS = 150
PLUG_ROUNDS = 10


@contextmanager
def up(suite: str, folder: Path, *, features: str = "", append: str = "", **more: object) -> Iterator[Booted]:
    """Boot a guest with the control socket at hand and a trace."""
    setup = setup_for(suite, features=features, append=append, trace=True)
    with booted(replace(setup, control=True, **more), folder) as guest:  # type: ignore[arg-type]
        yield guest


# The guest takes pages back before it kills


def overcommit(guest: Booted) -> int:
    """Have the guest promise what it has not, so that it finds out when it runs short. Returns its free bytes."""
    guest.wait(guest.rig.agent.write("/proc/sys/vm/overcommit_memory", "1"))
    return memory_of(guest, "MemFree")[0]


@suites
def test_deflate_on_oom(suite: str, tmp_path: Path, record_property: Record) -> None:
    """A fill that is larger than what the balloon has left lives, for the guest takes back what it needs."""
    with up(suite, tmp_path, features="+deflate_on_oom") as guest:
        (total,) = memory_of(guest, "MemTotal")
        reach(guest, 300 * MIB)
        assert memory_of(guest, "MemTotal") == [total]  # with this feature the balloon shows as used memory
        free = overcommit(guest)
        held = guest.wait(guest.rig.agent.fill("anonymous", free + 64 * MIB, seed=3))
        assert guest.wait(guest.rig.agent.checksum(held.handle)).mismatched_pages == 0
        taken = status(guest)["actual"] - 300 * MIB
        assert taken >= 48 * MIB
        assert status(guest)["target"] == 300 * MIB
        guest.wait(guest.rig.agent.free(held.handle))
        reach(guest, MEMORY)
        log = guest.wait(guest.rig.agent.dmesg())
        assert "Killed process" not in log
    cell(record_property, guest, "deflate on OOM", f"{taken // MIB} MiB taken back, nothing killed")


def test_without_deflate_on_oom_the_guest_kills(tmp_path: Path) -> None:
    """The same fill dies: so it is the feature that saved it. The device goes on."""
    with up("bookworm-backports", tmp_path) as guest:
        reach(guest, 300 * MIB)
        free = overcommit(guest)
        with pytest.raises(AgentRefusedError, match="killed"):
            guest.wait(guest.rig.agent.fill("anonymous", free + 64 * MIB, seed=3))
        assert status(guest)["actual"] == 300 * MIB
        reach(guest, MEMORY)


# Pages that must keep a value


@suites
def test_zeroed_free_pages(suite: str, tmp_path: Path, record_property: Record) -> None:
    """init_on_free: freed pages are to read as zeroes, and holes do, so they are given back as with QEMU's device."""
    with up(suite, tmp_path, append="init_on_free=1") as guest:
        assert {"PAGE_POISON", "REPORTING"} <= set(status(guest)["negotiated"])
        assert status(guest)["poison-value"] == 0
        assert_reports(guest)
        reach(guest, 600 * MIB)
        reach(guest, MEMORY)
        assert_all_well(guest)
    cell(record_property, guest, "poison (init_on_free=1)", "value 0: reported pages released")


# Both numberings


@suites
def test_rings_numbered_densely_without_hinting(suite: str, tmp_path: Path, record_property: Record) -> None:
    with up(suite, tmp_path, features="-free_page_hint") as guest:
        roles = {ring["index"]: ring.get("role") for ring in command(guest, "query-rings")}
        assert roles == {0: "inflate", 1: "deflate", 2: "statistics", 3: "reporting", 4: None}
        assert_reports(guest)
        command(guest, "query-balloon-stats", {"refresh": True})
        reach(guest, 600 * MIB)
        reach(guest, MEMORY)
        assert complaints(guest.wait(guest.rig.agent.dmesg())) == []
    cell(record_property, guest, "reporting, dense numbering with a hole", "on ring 3")


# A balloon at its limits


@suites
def test_a_target_that_cannot_be_reached(suite: str, tmp_path: Path) -> None:
    """The smallest legal size: the guest gives what it can, stays alive, and gets everything back."""
    with up(suite, tmp_path, append="init_on_alloc=0") as guest:
        command(guest, "balloon", {"value": 1})
        smallest = MEMORY
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < 5:
            guest.wait(asyncio.sleep(0.2))
            actual = status(guest)["actual"]
            if actual < smallest:
                smallest, quiet_since = actual, time.monotonic()
        assert 0 < smallest < MEMORY // 4
        assert guest.rig.vm.footprint() <= smallest + NOISE
        reach(guest, MEMORY)
        guest.wait(guest.rig.agent.ping())
        log = guest.wait(guest.rig.agent.dmesg())
        assert "Out of puff" in log  # the driver's own words for it
        assert [line for line in complaints(log) if "Out of memory" not in line] == []


def test_an_estimate_in_a_guest_that_zeroes_what_it_takes(tmp_path: Path, record_property: Record) -> None:
    """The host holds nearly all of the guest's memory for a while, and gets it back by the next reports."""
    with up("bookworm-backports", tmp_path) as guest:
        free = large_blocks(guest)
        floor = guest.rig.vm.footprint()
        answer = command(guest, "estimate-free")
        peak = guest.rig.vm.footprint()
        assert answer["bytes"] <= free
        assert answer["complete"] or answer["seconds"] >= 2
        assert peak - floor >= answer["bytes"] * 3 // 4
        wait_until(guest, lambda: large_blocks(guest) >= free * 0.9, "the guest does not get its memory back")
        wait_until(
            guest,
            lambda: guest.rig.vm.footprint() <= floor + 2 * NOISE,
            "what was written does not come back",
        )
        assert_all_well(guest)
    record_property("estimate_with_init_on_alloc_peak_mib", peak // MIB)


def test_memory_that_is_added_under_a_balloon(tmp_path: Path) -> None:
    """A DIMM plugged in: the device is told of its memory, and the balloon stays as it is, as with QEMU's own."""
    extra = ("-m", f"size={MEMORY >> 20}M,slots=2,maxmem=4G")
    append = "memhp_default_state=online"
    with up("bookworm-backports", tmp_path, append=append, extra=extra) as guest:
        reach(guest, 768 * MIB)
        (total,) = memory_of(guest, "MemTotal")
        vm = guest.rig.vm
        backend = {"qom-type": "memory-backend-memfd", "id": "dimm", "size": 512 * MIB, "share": True}
        guest.wait(vm.execute("object-add", backend))
        guest.wait(vm.execute("device_add", {"driver": "pc-dimm", "id": "dimm0", "memdev": "dimm"}))
        wait_until(guest, lambda: memory_of(guest, "MemTotal")[0] >= total + 400 * MIB, "no memory is added")
        now = status(guest)
        assert now["memory"] == MEMORY + 512 * MIB
        assert now["actual"] == now["target"] == 768 * MIB + 512 * MIB
        regions = command(guest, "query-memory")
        assert sum(region["size"] for region in regions) >= MEMORY + 511 * MIB
        reach(guest, 700 * MIB)
        reach(guest, MEMORY + 512 * MIB)
        assert_reports(guest)
        assert_all_well(guest)


# Under load


@pytest.mark.parametrize("suite", ["bookworm-backports", "trixie-backports"])
def test_targets_at_random_while_the_guest_works(suite: str, tmp_path: Path, record_property: Record) -> None:
    """Targets, pauses and fills all at once beside memory that must not change."""
    with up(suite, tmp_path, cpus=2) as guest:
        agent, chance = guest.rig.agent, random.Random(11)
        live = guest.wait(agent.fill("anonymous", 120 * MIB, seed=1))

        async def churn() -> int:
            rounds = 0
            while not done.is_set():
                filled = await agent.fill(("anonymous", "tmpfs")[rounds % 2], 60 * MIB, seed=rounds)
                assert (await agent.checksum(filled.handle)).mismatched_pages == 0
                await agent.free(filled.handle)
                rounds += 1
            return rounds

        async def resize() -> None:
            for number in range(STRESS_TARGETS):
                await guest.rig.control.execute("balloon", {"value": chance.randrange(400, 1024) * MIB})
                if number % 10 == 0:
                    await guest.rig.vm.stop()
                    await guest.rig.vm.cont()
                await asyncio.sleep(chance.random() / 10)

        async def both() -> int:
            churning = asyncio.create_task(churn())
            try:
                await resize()
            finally:
                done.set()
                rounds = await churning
            return rounds

        done = asyncio.Event()
        rounds = guest.wait(both())
        checked = guest.wait(agent.checksum(live.handle))
        assert (checked.bytes, checked.mismatched_pages) == (120 * MIB, 0)
        reach(guest, MEMORY)
        assert_all_well(guest)
    record_property("stress_fills_beside_150_targets", rounds)


def test_plugged_and_unplugged_again_and_again(tmp_path: Path) -> None:
    with up("trixie-backports", tmp_path, board=Board(root_ports=1), plugged=False) as guest:
        for number in range(PLUG_ROUNDS):
            size = (500 + 40 * (number % 3)) * MIB
            command(guest, "balloon", {"value": size})
            guest.wait(plug_balloon(guest.rig.vm))
            wait_until(guest, lambda: has_arrived(guest), "the plugged balloon is not inflated")
            assert status(guest)["actual"] == size
            guest.wait(unplug_balloon(guest.rig.vm))
        assert_all_well(guest)


def test_powering_off_with_an_inflated_balloon(tmp_path: Path) -> None:
    with up("bookworm-backports", tmp_path) as guest:
        reach(guest, 400 * MIB)
        guest.wait(guest.rig.power_off())
        guest.wait(guest.rig.device.close())
        assert (guest.rig.vm.returncode, guest.rig.device.returncode) == (0, 0)
