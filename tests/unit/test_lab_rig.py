"""What a rig refuses before anything is started."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from balloonlab.errors import UsageError
from balloonlab.rig import Rig, Setup
from guest_images.build import GuestImage
from qmp_glue.find import Qemu


def test_a_machine_that_ends_at_a_reset_is_not_rebooted(tmp_path: Path) -> None:
    image = GuestImage("own", "6.99", Path("/vmlinux"), Path("/initrd"), pvh=True)
    rig = Rig(Setup(Qemu(("qemu",)), image, 1 << 28), tmp_path)
    with pytest.raises(UsageError, match=r"Board\(reboots=True\)"):
        asyncio.run(rig.reboot())
