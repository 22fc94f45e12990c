"""The device added to a Linux guest that runs, and taken out again: what was freed before it came is given back."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from balloonlab.rig import Rig
from qmp_glue.attach import attach, detach
from tests.device_on_path import device_on_path
from tests.guest.guests import MIB, booted, setup_for

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SUITE = "bookworm-backports"
FILL = 200 * MIB
LIVE = 32 * MIB
# Blocks smaller than 2 MiB stay, as the guest does not report them; test_reporting.py measures the exact promise.
RETURN_BYTES = FILL * 3 // 4
# A pass every 2 s, and a 512 MiB guest is done in three: as in test_reporting.py, on a machine under load.
RETURN_SECONDS = 45.0
PORT = ("-device", "pcie-root-port,id=port0,chassis=1")
# The guest's driver has told what it accepts: it is bound.
BOUND = "the guest's driver accepted"


async def footprint_at_most(rig: Rig, size: int) -> None:
    end = time.monotonic() + RETURN_SECONDS
    while rig.vm.footprint() > size:
        assert time.monotonic() < end, f"{rig.vm.footprint()} bytes, and not {size}"
        await asyncio.sleep(0.2)


def test_attached_to_a_guest_that_runs(tmp_path: Path) -> None:
    setup = replace(setup_for(SUITE, memory=512 * MIB), balloon="none", extra=PORT)

    async def walk(rig: Rig) -> None:
        live = await rig.agent.fill("anonymous", LIVE, seed=1)
        for number in (1, 2):
            fill = await rig.agent.fill("anonymous", FILL)
            await rig.agent.free(fill.handle)
            before = rig.vm.footprint()
            assert before >= FILL + LIVE
            attachment = await attach(rig.vm.monitor, device.path)
            assert (attachment.bus, attachment.findings) == ("port0", ())
            await asyncio.to_thread(device.wait_said, BOUND, number)
            await footprint_at_most(rig, before - RETURN_BYTES)
            await detach(rig.vm.monitor)
            await asyncio.to_thread(device.wait_served, number)
        assert (await rig.agent.checksum(live.handle)).mismatched_pages == 0
        log = await rig.agent.dmesg()
        assert not re.search(r"BUG|WARNING|Oops|Call Trace|hung task", log), log
        await rig.power_off()

    with device_on_path(tmp_path) as device, booted(setup, tmp_path) as guest:
        guest.wait(walk(guest.rig))
