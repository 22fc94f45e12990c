"""--verify on real guests: a device that is right passes each proof, one that gives a page too many back fails each."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

import pytest

from balloonlab.measure import verify_dump, verify_holes, verify_pages
from balloonlab.measure.report import Check
from balloonlab.measure.verify import CONTENTS, Verifier
from hostdev.wire.trace import Kind
from tests.guest.guests import MIB, Booted, assert_all_well, await_named, booted, setup_for, traced
from tests.seeded import one_page_too_many

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

MEMORY, FILL, PIECE = 512 * MIB, 160 * MIB, 8 * MIB
NAMES = [verify_holes.NAME, verify_pages.NAME, CONTENTS, verify_dump.NAME]
FAULT_SECONDS = 30.0


def free_and_await(guest: Booted, handles: list[int], size: int) -> None:
    start = len(traced(guest))
    for handle in handles:
        guest.wait(guest.rig.agent.free(handle))
    await_named(guest, Kind.RELEASE, start, size)


def conclude(guest: Booted, verifier: Verifier, handles: list[int]) -> dict[str, Check]:
    checks = guest.wait(verifier.conclude(handles))
    assert [check.name for check in checks] == NAMES
    assert guest.wait(guest.rig.vm.query_status()) == "running"
    assert guest.wait(guest.rig.agent.ping()).kernel
    return {check.name: check for check in checks}


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1].replace(",", ""))


def test_a_device_that_is_right_passes(tmp_path: Path) -> None:
    setup = setup_for("bookworm-backports", memory=MEMORY, trace=True)
    with booted(setup, tmp_path) as guest:
        verifier = Verifier(guest.rig, tmp_path)
        guest.wait(verifier.start())
        used = guest.wait(guest.rig.agent.fill("anonymous", FILL, seed=1))
        guest.wait(verifier.look("fill"))
        guest.wait(verifier.compare(used.handle))
        free_and_await(guest, [used.handle], FILL * 3 // 4)
        guest.wait(verifier.look("free"))
        held = guest.wait(guest.rig.agent.fill("tmpfs", PIECE, seed=2))
        checks = conclude(guest, verifier, [held.handle])
        assert_all_well(guest)
    for check in checks.values():
        print(check)
    assert {check.outcome for check in checks.values()} == {"pass"}
    assert number(r"^([\d,]+) pages", checks[verify_holes.NAME].message) >= FILL * 3 // 4 // 4096
    pages = checks[verify_pages.NAME].message
    assert number(r"^([\d,]+) pages", pages) >= (verifier.canary_bytes + PIECE) // 4096
    assert number(r"holes: ([\d,]+) free", pages) >= FILL // 2 // 4096
    assert "200 MiB of memory in 3 fills" in checks[CONTENTS].message
    assert f"all {verifier.canary_bytes // 4096:,} pages with known" in checks[verify_dump.NAME].message


def test_a_page_too_many_is_caught_by_each_proof(tmp_path: Path) -> None:
    """Fills beside the canary are freed until the device has given back a page of it."""
    setup = setup_for("bookworm-backports", memory=MEMORY, trace=True)
    setup = dataclasses.replace(setup, program=one_page_too_many.PROGRAM)
    with booted(setup, tmp_path) as guest:
        verifier = Verifier(guest.rig, tmp_path)
        guest.wait(verifier.start())
        end = time.monotonic() + FAULT_SECONDS
        while one_page_too_many.SAID not in guest.rig.device.log_text():
            assert time.monotonic() < end, "the device has released nothing beside the canary"
            used = guest.wait(guest.rig.agent.fill("anonymous", FILL, seed=1))
            free_and_await(guest, [used.handle], FILL // 2)
        checks = conclude(guest, verifier, [])
        said = guest.rig.device.log_text()
    for check in checks.values():
        print(check)
    lost = sorted(
        int(address, 16) for address in re.findall(rf"{one_page_too_many.SAID}: (0x[0-9a-f]+)", said)
    )
    assert {check.outcome for check in checks.values()} == {"fail"}
    for name in (verify_holes.NAME, verify_pages.NAME):
        assert number(r"^([\d,]+) page", checks[name].message) == len(lost)
        assert f"guest address {lost[0]:#x}" in checks[name].message
    assert number(r"^([\d,]+) page", checks[CONTENTS].message) == len(lost)
    assert number(r"([\d,]+) of [\d,]+ pages with known contents", checks[verify_dump.NAME].message) == len(
        lost
    )
