"""A driver that comes back on virtio-mmio: a microvm is rebooted with its balloon. On PCI, test_balloon.py does that and more."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostdev.wire.balloon import Role
from hostdev.wire.trace import Kind
from qmp_glue.board import Board
from tests.guest.guests import MIB, Booted, assert_all_well, assert_reports, booted, reboot, setup_for, traced

pytestmark = [pytest.mark.guest, pytest.mark.full, pytest.mark.timeout(400)]


def assert_serves(guest: Booted, times: int) -> None:
    """The reporting queue, which is ring 4, was started so many times so far, and reports give memory back."""
    started = [record for record in traced(guest) if record.kind is Kind.RING_STARTED]
    assert sum(record.ring == Role.REPORTING for record in started) == times
    assert_reports(guest)


def test_a_microvm_reboots_with_its_balloon(tmp_path: Path) -> None:
    board = Board(kind="microvm", reboots=True)
    setup = setup_for("bookworm-backports", memory=512 * MIB, board=board, trace=True)
    with booted(setup, tmp_path) as guest:
        assert_serves(guest, 1)
        reboot(guest)
        assert_serves(guest, 2)
        assert_all_well(guest)
