"""Every feature on real kernels, one boot a suite: plugged in, sized, asked, paused, reset, rebooted, taken out.

Each test is a cell of the table in docs/results/: a feature, a suite, what was seen. Cases of other projects' balloon tests
that apply to a device outside QEMU are among them, named by what they check. Tests of one guest run in the order of this
file; each leaves the guest with all of its memory.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from balloonlab.measure.ranges import intersect
from hostdev.pages import Span, merge
from hostdev.statistics import ABSENT
from hostdev.wire.balloon import STATISTIC_NAMES, Feature
from hostdev.wire.trace import Kind
from qmp_glue.board import Board
from qmp_glue.hotplug import plug_balloon, unplug_balloon
from tests.guest.balloon import (
    NOISE,
    REACH_SECONDS,
    Record,
    cell,
    command,
    has_arrived,
    large_blocks,
    memory_of,
    pattern_places,
    paused,
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
    bind,
    booted,
    reboot,
    reload_module,
    setup_for,
    traced,
    unbind,
)
from tests.guest.prepare import SUITES

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

PATH = "/machine/peripheral/balloon0"
INTERVAL = {"path": PATH, "property": "guest-stats-polling-interval"}


@pytest.fixture(scope="module", params=[*SUITES, pytest.param("forky", marks=pytest.mark.full)])
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """A guest that is up and has no balloon yet; the device waits for it.

    Debian's kernels write zeroes over what they allocate, and so over all that they hint. At the speed of emulation that
    is about a round's two seconds for a guest of 1 GiB: not in this one.
    """
    board = Board(root_ports=1, reboots=True)
    setup = setup_for(request.param, board=board, plugged=False, trace=True, append="init_on_alloc=0")
    setup = replace(setup, control=True)
    with booted(setup, tmp_path_factory.mktemp("guest")) as running:
        yield running


def test_attach_to_a_running_guest_whose_target_was_set_before(
    guest: Booted, record_property: Record
) -> None:
    """The target waits for a guest whose memory is not known, as for one that starts paused."""
    assert status(guest)["running"] is False
    command(guest, "set-target", {"percent": 75})
    guest.wait(plug_balloon(guest.rig.vm))
    seconds = wait_until(guest, lambda: has_arrived(guest), "the plugged balloon is not inflated")
    assert status(guest)["actual"] == MEMORY * 3 // 4
    reach(guest, MEMORY)
    assert_all_well(guest)
    cell(
        record_property,
        guest,
        "attach to a running guest",
        f"inflated to 75 % {seconds:.1f} s after device_add",
    )


def test_the_driver_takes_what_the_device_offers(guest: Booted) -> None:
    expected = Feature.STATS_VQ | Feature.FREE_PAGE_HINT | Feature.REPORTING | Feature.VERSION_1
    assert {feature.name for feature in expected} <= set(status(guest)["negotiated"])


def test_inflate_to_a_target_and_back(guest: Booted, record_property: Record) -> None:
    """The guest has less memory, the host has it, and every released byte is in a region of the guest."""
    (total,) = memory_of(guest, "MemTotal")
    before = sum(region["released-inflate"] for region in command(guest, "query-memory"))
    down = reach(guest, MEMORY // 2)
    assert abs(total - memory_of(guest, "MemTotal")[0] - MEMORY // 2) <= MIB
    with paused(guest):
        regions, footprint = command(guest, "query-memory"), guest.rig.vm.footprint()
    assert footprint <= MEMORY // 2
    assert sum(region["released-inflate"] for region in regions) - before == MEMORY // 2
    assert sum(region["footprint"] for region in regions) == footprint
    up = reach(guest, MEMORY)
    assert memory_of(guest, "MemTotal") == [total]
    cell(
        record_property, guest, "inflate to a target and back", f"512 MiB in {down:.1f} s, back in {up:.1f} s"
    )


def test_evict_and_enlarge_to_any_size(guest: Booted) -> None:
    """The device's figure is exact, the guest's own follows it."""
    (total,) = memory_of(guest, "MemTotal")
    for size in random.Random(5).sample(range(400 * MIB, MEMORY, MIB), 4):
        reach(guest, size)
        assert command(guest, "query-balloon") == {"actual": size}
        assert abs(total - memory_of(guest, "MemTotal")[0] - (MEMORY - size)) <= MIB
    reach(guest, MEMORY)


def test_used_memory_that_is_freed_is_gone_once_it_was_inflated_over(guest: Booted) -> None:
    """What the guest had written is in no page that was released: not kept, not found by the next owner."""
    ram = guest.rig.vm.ram_file
    held = guest.wait(guest.rig.agent.fill("anonymous", 512 * MIB, seed=77))
    written = pattern_places(ram, 77)
    assert len(written) >= 511
    start = len(traced(guest))
    guest.wait(guest.rig.agent.free(held.handle))
    reach(guest, 256 * MIB)
    with paused(guest):  # no report comes between what is left and what was released
        left, records = pattern_places(ram, 77), traced(guest, start)
    reach(guest, MEMORY)
    released = merge(Span(one.value.address, one.value.length) for one in records if one.kind is Kind.RELEASE)
    gone = {place for place in written if intersect([Span(place, 1)], released)}
    # The guest may have moved a page before it freed it; what it had written is in no page that was released since.
    assert [place for place in left if intersect([Span(place, 1)], released)] == []
    # Of the 1 GiB 256 MiB are not in the balloon, the guest's own among them: at least 256 of the 512 MiB that it freed are.
    assert len(gone) >= len(written) // 2
    live = guest.wait(guest.rig.agent.fill("anonymous", 200 * MIB, seed=78))
    assert guest.wait(guest.rig.agent.checksum(live.handle)).mismatched_pages == 0
    guest.wait(guest.rig.agent.free(live.handle))


def test_live_memory_beside_a_balloon_that_moves(guest: Booted) -> None:
    live = guest.wait(guest.rig.agent.fill("anonymous", 200 * MIB, seed=79))
    for size in (512 * MIB, 900 * MIB, 400 * MIB, MEMORY):
        reach(guest, size)
        checked = guest.wait(guest.rig.agent.checksum(live.handle))
        assert (checked.bytes, checked.mismatched_pages) == (200 * MIB, 0)
    guest.wait(guest.rig.agent.free(live.handle))


def test_statistics_are_the_guests_own_numbers(guest: Booted, record_property: Record) -> None:
    """Both are asked until no report takes pages off the guest's free lists between the two, up to 128 MiB at a time."""
    answer: dict[str, Any] = {}

    def agree() -> bool:
        answer.update(command(guest, "query-balloon-stats", {"refresh": True}))
        total, free, available, cached, buffers = memory_of(
            guest, "MemTotal", "MemFree", "MemAvailable", "Cached", "Buffers"
        )
        stats = answer["stats"]
        assert stats["stat-total-memory"] == total
        moving = {
            "stat-free-memory": free,
            "stat-available-memory": available,
            "stat-disk-caches": cached + buffers,
        }
        return all(abs(stats[name] - size) <= NOISE for name, size in moving.items())

    wait_until(guest, agree, "the statistics are not the guest's own numbers")
    stats = answer["stats"]
    assert (stats["stat-swap-in"], stats["stat-swap-out"], stats["stat-oom-kills"]) in (
        (0, 0, 0),
        (0, 0, ABSENT),
    )
    faults = int(_vmstat(guest, "pgfault"))
    assert 0 < stats["stat-minor-faults"] <= faults
    known = [name for name in STATISTIC_NAMES if stats[name] != ABSENT]
    assert len(known) >= 8
    assert answer["unknown"] == []
    cell(record_property, guest, "statistics against the guest's own", f"{len(known)} tags")


def _vmstat(guest: Booted, name: str) -> str:
    text = guest.wait(guest.rig.agent.read("/proc/vmstat"))
    return next(line.split()[1] for line in text.splitlines() if line.split()[0] == name)


def test_statistics_are_polled_across_a_pause(guest: Booted) -> None:
    def updates() -> int:
        return int(guest.rig.device.counters().total("chains_total", queue="statistics"))

    for interval in (21474836, 1):
        command(guest, "qom-set", INTERVAL | {"value": interval})
        assert command(guest, "qom-get", dict(INTERVAL)) == interval
    begun = updates()
    wait_until(guest, lambda: updates() >= begun + 2, "the guest is not polled")
    guest.wait(guest.rig.vm.stop())
    guest.wait(guest.rig.vm.cont())
    begun = updates()
    wait_until(guest, lambda: updates() >= begun + 2, "the guest is not polled after the pause")
    command(guest, "qom-set", INTERVAL | {"value": 0})
    last = command(guest, "qom-get", {"path": PATH, "property": "guest-stats"})
    assert last["stats"]["stat-free-memory"] > 0
    assert last["last-update"] > 0


def test_the_estimate_is_the_guests_free_large_blocks(guest: Booted, record_property: Record) -> None:
    """What is missing the guest keeps for itself: its watermarks, and the zone for old DMA.

    Asked until nothing comes between the two looks: a report has up to 128 MiB off the guest's free lists, and a round that
    the machine holds up for its two seconds is not complete.
    """
    answer: dict[str, Any] = {}
    footprint = guest.rig.vm.footprint()
    free = 0

    def agree() -> bool:
        nonlocal free
        free = large_blocks(guest)
        answer.update(command(guest, "estimate-free"))
        wait_until(guest, lambda: large_blocks(guest) >= free * 0.9, "the guest does not get its memory back")
        return bool(answer["complete"]) and abs(answer["bytes"] - free) <= 0.1 * free

    wait_until(guest, agree, "the estimate is not what the guest has free")
    assert free >= 600 * MIB
    assert guest.rig.vm.footprint() <= footprint + NOISE
    text = (
        f"{answer['bytes'] // MIB} of {free // MIB} MiB free in blocks of 4 MiB, in {answer['seconds']:.2f} s"
    )
    cell(record_property, guest, "estimate by hinting (init_on_alloc=0)", text)


def test_reports_are_on_ring_four(guest: Booted, record_property: Record) -> None:
    """Where dense and fixed numbering agree, for all three optional queues were negotiated."""
    roles = {ring["index"]: ring.get("role") for ring in command(guest, "query-rings")}
    assert roles == {0: "inflate", 1: "deflate", 2: "statistics", 3: "free-page-hint", 4: "reporting"}
    assert_reports(guest)
    cell(record_property, guest, "reporting, dense and fixed numbering alike", "on ring 4")


def test_a_target_set_in_a_pause_is_reached_after_it(guest: Booted, record_property: Record) -> None:
    for size in (700 * MIB, 900 * MIB, MEMORY):
        guest.wait(guest.rig.vm.stop())
        command(guest, "balloon", {"value": size})
        assert status(guest)["running"] is False
        guest.wait(guest.rig.vm.cont())
        wait_until(guest, lambda: has_arrived(guest), "the target is not reached after the pause")
    cell(record_property, guest, "stop and cont", "targets set in a pause reached after it, three times")


def test_inhibited_nothing_is_released(guest: Booted) -> None:
    command(guest, "inhibit")
    released = status(guest)["released"]
    reach(guest, 800 * MIB)
    assert status(guest)["released"] == released
    command(guest, "allow")
    reach(guest, 700 * MIB)
    assert status(guest)["released"] >= released + 100 * MIB
    reach(guest, MEMORY)


def ctl(guest: Booted, *words: str) -> subprocess.CompletedProcess[str]:
    """Run balloonlab ctl as a person does."""
    argv = [
        sys.executable,
        "-m",
        "balloonlab.cli",
        "ctl",
        "--control",
        str(guest.rig.device.control_path),
        *words,
    ]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=2 * REACH_SECONDS)


def test_ctl(guest: Booted) -> None:
    in_time = ("--wait", "--timeout", f"{REACH_SECONDS:g}s")
    done = ctl(guest, "set", "50%", *in_time)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the guest has 512 MiB after ")
    exact = json.loads(ctl(guest, "set", "640M", *in_time, "--json").stdout)
    assert (exact["target"], exact["actual"], exact["memory"]) == (640 * MIB, 640 * MIB, MEMORY)
    assert "target 640 MiB, actual 640 MiB" in ctl(guest, "status").stdout
    assert json.loads(ctl(guest, "status", "--json").stdout)["target"] == 640 * MIB
    lines = ctl(guest, "stats").stdout.splitlines()
    assert {line.split()[0] for line in lines} >= {"free-memory", "total-memory", "minor-faults"}
    watched = ctl(guest, "stats", "--watch", "10ms", "--count", "3").stdout.splitlines()
    assert len(watched) == 4
    assert "held; released" in ctl(guest, "memory").stdout
    assert "reporting" in ctl(guest, "rings").stdout
    assert "blocks, hinted in" in ctl(guest, "estimate-free").stdout
    assert ctl(guest, "inhibit").stdout == "inhibited: everything is answered, nothing is released\n"
    assert "until it is allowed again" in ctl(guest, "status").stdout
    assert ctl(guest, "allow").returncode == 0
    assert ctl(guest, "set", "100%", *in_time).returncode == 0


def test_ctl_says_what_is_wrong(guest: Booted) -> None:
    for words, status_, text in (
        (["set", "1X", "--wait"], 2, "is no size"),
        (["set", "0%"], 2, "from 1% to 100%"),
        (["set", "1", "--wait", "--timeout", "nonsense"], 2, "is no duration"),
        (["quit"], 2, "a front end is connected"),
        (["nonsense"], 2, "--help"),
    ):
        done = ctl(guest, *words)
        assert (done.returncode, done.stdout) == (status_, "")
        assert text in done.stderr
        assert done.stderr.count("\n") == 1
    assert status(guest)["target"] == MEMORY


def test_ctl_gives_up_waiting(guest: Booted) -> None:
    """For a guest that is paused: the target stays, and is reached after it."""
    guest.wait(guest.rig.vm.stop())
    done = ctl(guest, "set", "900M", "--wait", "--timeout", "300ms")
    assert done.returncode == 1
    assert "and not 900 MiB" in done.stdout
    guest.wait(guest.rig.vm.cont())
    wait_until(guest, lambda: has_arrived(guest), "the target is not reached after the pause")
    reach(guest, MEMORY)


def test_unbind_and_bind_keep_the_target(guest: Booted, record_property: Record) -> None:
    (total,) = memory_of(guest, "MemTotal")
    reach(guest, 640 * MIB)
    device = unbind(guest)
    wait_until(guest, lambda: not status(guest)["running"], "the driver is still there")
    assert memory_of(guest, "MemTotal") == [total]
    bind(guest, device)
    seconds = wait_until(guest, lambda: has_arrived(guest), "the guest does not return to its target")
    assert status(guest)["actual"] == 640 * MIB
    reach(guest, MEMORY)
    assert_all_well(guest)
    cell(
        record_property,
        guest,
        "reset (unbind, bind)",
        f"target kept, reached again {seconds:.1f} s after bind",
    )


def test_reload_keeps_the_target(guest: Booted, record_property: Record) -> None:
    reach(guest, 700 * MIB)
    reload_module(guest)
    wait_until(guest, lambda: has_arrived(guest), "the reloaded driver does not return to the target")
    assert status(guest)["actual"] == 700 * MIB
    reach(guest, MEMORY)
    assert_reports(guest)
    assert_all_well(guest)
    cell(record_property, guest, "reload of the module", "target kept")


def test_reboot_keeps_the_target(guest: Booted, record_property: Record) -> None:
    """Asked of the guest itself: until its new driver writes, the device knows only what the old one said."""
    (total,) = memory_of(guest, "MemTotal")
    reach(guest, 640 * MIB)
    assert_all_well(guest)
    reboot(guest)
    seconds = wait_until(
        guest,
        lambda: (
            abs(total - memory_of(guest, "MemTotal")[0] - (MEMORY - 640 * MIB)) <= MIB
            and status(guest)["actual"] == 640 * MIB
        ),
        "the rebooted guest does not come to the target",
    )
    assert guest.rig.vm.footprint() <= 640 * MIB + NOISE
    reach(guest, MEMORY)
    assert_reports(guest)
    cell(record_property, guest, "reboot", f"target kept, reached {seconds:.1f} s after the agent's greeting")


def test_unplug_under_an_inflated_balloon_and_plug_again(guest: Booted, record_property: Record) -> None:
    (total,) = memory_of(guest, "MemTotal")
    reach(guest, 700 * MIB)
    guest.wait(unplug_balloon(guest.rig.vm))
    assert memory_of(guest, "MemTotal") == [total]
    assert_all_well(guest)
    guest.wait(plug_balloon(guest.rig.vm))
    wait_until(guest, lambda: has_arrived(guest), "the balloon that was plugged again does not work")
    reach(guest, MEMORY)
    guest.wait(unplug_balloon(guest.rig.vm))
    assert_all_well(guest)
    cell(
        record_property, guest, "unplug", "twice, the second time after another device_add; kernel log clean"
    )
