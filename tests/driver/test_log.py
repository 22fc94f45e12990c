"""Whatever a guest does, as often as it likes, the log stays short, and says what it left out nothing of the first times."""

from __future__ import annotations

from pathlib import Path

from hostdev.frontend import Frontend
from hostdev.log_limit import BURST
from hostdev.wire.balloon import Role
from hostdev.wire.vhost_user import Request
from tests.device_program import program, works

RESETS = 60


def test_a_guest_that_resets_its_device_and_breaks_a_ring_again_and_again(tmp_path: Path) -> None:
    with program(tmp_path / "balloon.sock", "--once") as device:
        with Frontend(device.connect()) as guest:
            guest.start()
            for _ in range(RESETS):
                ring = guest.rings[Role.DEFLATE]
                ring.set_available_index(999)
                ring.notify()
                guest.request(Request.GET_FEATURES)
                bases = guest.stop()
                guest.resume(bases=bases)
            works(guest)
        said = device.wait()[1].splitlines()
    accepted = [line for line in said if "accepted" in line]
    broken = [line for line in said if "broken" in line]
    assert BURST <= len(accepted) < 2 * BURST
    assert BURST <= len(broken) < 2 * BURST
    assert len(said) < 6 * BURST
