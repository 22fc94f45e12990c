"""What may happen to a balloon's driver while its guest lives: plugged, unbound, bound, reloaded, rebooted, unplugged.

One boot a kernel walks it all: after each step the driver negotiates anew with the same device, and reports give memory
back as before. The queues are numbered without a hole, which Linux 6.11 and later need to let go of a device.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hostdev.wire.balloon import Role
from hostdev.wire.trace import Kind
from qmp_glue.board import Board
from qmp_glue.hotplug import plug_balloon, unplug_balloon
from tests.guest.guests import (
    MIB,
    Booted,
    assert_all_well,
    assert_reports,
    bind,
    booted,
    bound,
    complaints,
    reboot,
    reload_module,
    setup_for,
    traced,
    unbind,
    wait_until_bound,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

LIVE = 32 * MIB


def starts(guest: Booted) -> int:
    """How often the reporting queue was started, which is ring 4."""
    started = [record for record in traced(guest) if record.kind is Kind.RING_STARTED]
    return sum(record.ring == Role.REPORTING for record in started)


def assert_serves(guest: Booted, times: int) -> None:
    """The device was started so many times so far, and reports give memory back."""
    assert starts(guest) == times
    assert_reports(guest)


@pytest.mark.parametrize(
    "suite",
    [
        pytest.param("bookworm", marks=pytest.mark.full),
        pytest.param("bookworm-backports", marks=pytest.mark.full),
        "trixie-backports",
        pytest.param("forky", marks=pytest.mark.full),
    ],
)
def test_a_driver_comes_and_goes(suite: str, tmp_path: Path) -> None:
    board = Board(root_ports=1, reboots=True)
    setup = setup_for(suite, memory=512 * MIB, board=board, plugged=False, trace=True)
    with booted(setup, tmp_path) as guest:
        rig = guest.rig
        assert bound(guest) is None
        guest.wait(plug_balloon(rig.vm))
        wait_until_bound(guest)
        live = guest.wait(rig.agent.fill("anonymous", LIVE, seed=3))
        assert_serves(guest, 1)

        device = unbind(guest)
        bind(guest, device)
        assert_serves(guest, 2)
        reload_module(guest)
        assert_serves(guest, 3)
        assert guest.wait(rig.agent.checksum(live.handle)).mismatched_pages == 0
        assert complaints(guest.wait(rig.agent.dmesg())) == []

        reboot(guest)
        assert_serves(guest, 4)
        guest.wait(unplug_balloon(rig.vm))
        assert bound(guest) is None
        assert_all_well(guest)
        guest.wait(rig.power_off())


@pytest.mark.full
def test_a_microvm_reboots_with_its_balloon(tmp_path: Path) -> None:
    board = Board(kind="microvm", reboots=True)
    setup = setup_for("bookworm-backports", memory=512 * MIB, board=board, trace=True)
    with booted(setup, tmp_path) as guest:
        assert_serves(guest, 1)
        reboot(guest)
        assert_serves(guest, 2)
        assert_all_well(guest)
