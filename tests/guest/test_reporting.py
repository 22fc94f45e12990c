"""Real kernels beside the device: freed memory comes back, live memory is never touched. One boot a suite."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from balloonlab.demo_run import Measurement, Plan
from balloonlab.results import Result
from hostdev.wire.balloon import Feature
from tests.guest.balloon import paused
from tests.guest.guests import (
    MEMORY,
    MIB,
    RETURN_SECONDS,
    Booted,
    assert_all_well,
    booted,
    released_since,
    setup_for,
)
from tests.guest.prepare import SUITES

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

FILL = 600 * MIB
# The promise: within RETURN_SECONDS of the free at least 95 % of what MemFree regained is off the footprint.
RETURN_SHARE = 0.95
# Of what is freed while nobody waits for the rest: per-CPU lists keep what assert_reports() says, most of it for a time only.
REPORTED_SHARE = 0.75

Record = Callable[[str, object], None]


@pytest.fixture(scope="module", params=SUITES)
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    with booted(setup_for(request.param), tmp_path_factory.mktemp("guest")) as running:
        yield running


@pytest.fixture(scope="module")
def measurement(guest: Booted) -> Measurement:
    measurement = Measurement(guest.rig.setup, Plan(FILL), guest.folder)
    guest.wait(measurement.on(guest.rig))
    return measurement


@pytest.fixture(scope="module")
def result(measurement: Measurement) -> Result:
    result = measurement.measured.result
    assert result is not None
    return result


def record_result(record_property: Record, result: Result) -> None:
    record_property("kernel", f"{result.guest.kernel} ({result.guest.suite})")
    record_property("discard", result.device.discard)
    for name in ("floor_bytes", "peak_bytes", "residual_bytes", "returned_bytes", "settle_seconds"):
        record_property(name, getattr(result, name))
    record_property("memfree_regained_bytes", result.guest.memfree_regained_bytes)
    record_property("released_bytes", result.device.released_bytes)


def test_the_driver_takes_what_the_device_offers(guest: Booted) -> None:
    accepted = guest.rig.device.counters().features
    expected = Feature.STATS_VQ | Feature.FREE_PAGE_HINT | Feature.REPORTING | Feature.VERSION_1
    assert accepted & expected == expected


def test_freed_memory_comes_back(result: Result, record_property: Record) -> None:
    record_result(record_property, result)
    assert result.notes == []
    assert result.passed
    assert result.settle_seconds <= RETURN_SECONDS
    assert result.guest.memfree_regained_bytes > FILL * 3 // 4
    assert result.returned_bytes >= RETURN_SHARE * result.guest.memfree_regained_bytes


def test_the_device_released_what_came_back(result: Result) -> None:
    device = result.device
    assert device.reports > 0
    assert device.buffers >= device.reports
    assert device.released_bytes >= result.returned_bytes
    assert device.released_bytes_by_method == {"remove": device.released_bytes}
    assert device.withheld_bytes == 0


def test_the_result_agrees_with_stat_by_hand(guest: Booted, measurement: Measurement, result: Result) -> None:
    """A figure is that of a sample; and a sample, here one of a pause, for the guest goes on living, is what stat says."""
    returned = [sample for sample in measurement.measured.samples if sample.phase == "return"]
    assert result.residual_bytes in {
        sample.footprint_bytes for sample in returned if sample.guest_memfree_bytes is not None
    }
    with paused(guest):
        by_hand, footprint = guest.rig.vm.ram_file.stat(), guest.rig.vm.footprint()
    assert (by_hand.st_size, by_hand.st_blocks * 512) == (MEMORY, footprint)


def test_live_memory_beside_reports_keeps_its_contents(guest: Booted, record_property: Record) -> None:
    """200 MiB live; 400 MiB beside it filled, checked, freed, reported and reused, three rounds."""
    agent, device = guest.rig.agent, guest.rig.device
    live = guest.wait(agent.fill("anonymous", 200 * MIB, seed=7))
    released = []
    for round_number in range(3):
        before = device.counters().released_bytes
        used = guest.wait(agent.fill("anonymous", 400 * MIB, seed=100 + round_number))
        checked = guest.wait(agent.checksum(used.handle))
        assert (checked.bytes, checked.mismatched_pages) == (400 * MIB, 0)
        guest.wait(agent.free(used.handle))
        guest.wait(released_since(guest, before, int(REPORTED_SHARE * 400 * MIB)))
        released.append(device.counters().released_bytes - before)
        checked = guest.wait(agent.checksum(live.handle))
        assert (checked.bytes, checked.mismatched_pages) == (200 * MIB, 0)
    guest.wait(agent.free(live.handle))
    record_property("released_in_rounds_bytes", released)


def test_stop_and_cont_lose_nothing(guest: Booted) -> None:
    """GET_VRING_BASE and a new start in between: reports go on, and so does what was freed while stopped."""
    rig = guest.rig
    held = guest.wait(rig.agent.fill("anonymous", 300 * MIB, seed=9))
    before = rig.device.counters().released_bytes
    for _ in range(3):
        guest.wait(rig.vm.stop())
        assert guest.wait(rig.vm.query_status()) == "paused"
        guest.wait(rig.vm.cont())
    guest.wait(rig.agent.free(held.handle))
    guest.wait(rig.vm.stop())
    guest.wait(rig.vm.cont())
    guest.wait(released_since(guest, before, int(REPORTED_SHARE * 300 * MIB)))
    assert guest.wait(rig.agent.meminfo())["MemFree"] > 300 * MIB


def test_the_guest_and_the_device_have_nothing_to_complain_about(guest: Booted) -> None:
    assert_all_well(guest)


def test_power_off_ends_qemu_and_device(guest: Booted) -> None:
    """Last, for it ends the guest: QEMU goes by itself, and with it the device."""
    pids = [guest.rig.vm.pid, *guest.rig.device.pids()]
    guest.wait(guest.rig.power_off())
    guest.wait(guest.rig.device.close())
    assert guest.rig.vm.returncode == 0
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


# Once each here; every kernel in the full tier.
CONTROLS = {("dontneed", "bookworm-backports"), ("none", "trixie-backports")}


@pytest.mark.parametrize(
    ("discard", "suite"),
    [
        pytest.param(*each, marks=() if each in CONTROLS else pytest.mark.full)
        for each in itertools.product(("dontneed", "none"), SUITES)
    ],
)
def test_control_runs_stay_at_their_peak(
    suite: str, discard: str, tmp_path: Path, record_property: Record
) -> None:
    """MADV_DONTNEED on shared memory frees nothing, and neither does releasing nothing: so it is the method that frees."""
    setup = setup_for(suite, discard=discard)
    with booted(setup, tmp_path) as guest:
        result = guest.wait(Measurement(setup, Plan(FILL), tmp_path).on(guest.rig))
    record_result(record_property, result)
    assert result.notes == []
    assert abs(result.peak_bytes - result.residual_bytes) <= 0.05 * result.peak_bytes
    assert result.guest.memfree_regained_bytes > FILL * 3 // 4
    by_method = result.device.released_bytes_by_method
    if discard == "dontneed":
        assert by_method["dontneed"] >= FILL
    else:
        assert by_method == {}
        assert result.device.withheld_bytes >= FILL


def test_without_page_poison_a_guest_with_init_on_free_is_told_apart(tmp_path: Path) -> None:
    """Such a guest drops REPORTING: said in the result, not a hang."""
    setup = setup_for(
        "bookworm-backports", features="-page_poison", append="init_on_free=1", memory=512 * MIB
    )
    with booted(setup, tmp_path) as guest:
        result = guest.wait(Measurement(setup, Plan(100 * MIB), tmp_path).on(guest.rig))
    assert not result.passed
    assert "REPORTING" not in result.device.negotiated_features
    assert "does not report free pages" in result.notes[0]
    assert result.device.reports == 0


def test_with_page_poison_a_guest_with_init_on_free_reports(tmp_path: Path) -> None:
    """The pages are to read as zeroes, and a hole does."""
    setup = setup_for("bookworm-backports", append="init_on_free=1")
    with booted(setup, tmp_path) as guest:
        result = guest.wait(Measurement(setup, Plan(FILL), tmp_path).on(guest.rig))
    assert result.notes == []
    assert {"REPORTING", "PAGE_POISON"} <= set(result.device.negotiated_features)
    assert result.returned_bytes >= RETURN_SHARE * result.guest.memfree_regained_bytes
