"""--verify on real guests: a device that is right passes each proof, one that gives a page too many back fails each."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from balloonlab.errors import LabError
from balloonlab.measure import verify_dump, verify_holes, verify_pages
from balloonlab.measure.report import Check
from balloonlab.measure.verify import CONTENTS, Verifier
from balloonlab.rig import Rig, Setup
from guest_images.errors import GuestError
from guest_images.kernel import CLOUD, GENERIC
from hostdev.wire.trace import Kind
from qmp_glue.board import PLAIN, Board, equal_nodes
from qmp_glue.errors import QmpGlueError
from tests.guest.guests import MIB, Booted, await_named, booted, setup_for, traced
from tests.guest.prepare import ALL_SUITES
from tests.seeded import one_page_too_many

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

MEMORY, FILL, PIECE = 512 * MIB, 160 * MIB, 8 * MIB
NAMES = [verify_holes.NAME, verify_pages.NAME, CONTENTS, verify_dump.NAME]
FAULT_SECONDS = 30.0
# What each proof says of the pages that are lost, and then how many they are.
WORDS = {
    verify_holes.NAME: "^holes that no release in the device's trace names",
    verify_pages.NAME: "^holes that the guest has in use and has written",
    CONTENTS: "^not as it was written",
    verify_dump.NAME: "^pages with known contents that are nowhere",
}


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


@dataclass(frozen=True)
class Case:
    """A guest. arm: whose balloon it has."""

    suite: str = "bookworm-backports"
    flavour: str = CLOUD
    board: Board = PLAIN
    arm: Literal["vhost-user", "built-in", "none"] = "vhost-user"
    append: str = ""

    @property
    def setup(self) -> Setup:
        setup = setup_for(
            self.suite, flavour=self.flavour, memory=MEMORY, board=self.board, append=self.append, trace=True
        )
        return dataclasses.replace(setup, balloon=self.arm)


FULL = pytest.mark.full
CASES = [
    pytest.param(Case(), id="bookworm-backports"),
    *(pytest.param(Case(suite), marks=FULL, id=suite) for suite in ALL_SUITES if suite != Case().suite),
    pytest.param(Case("trixie-backports", GENERIC), marks=FULL, id="no-cloud-kernel"),
    pytest.param(Case(board=Board(nodes=equal_nodes(MEMORY, 2))), marks=FULL, id="two-nodes"),
    pytest.param(Case(board=Board(kind="microvm")), marks=FULL, id="microvm"),
    pytest.param(Case(arm="built-in"), marks=FULL, id="qemus-own"),
    pytest.param(Case(arm="none"), marks=FULL, id="no-balloon"),
    pytest.param(Case(append="init_on_free=1"), marks=FULL, id="init-on-free"),
    pytest.param(Case(append="transparent_hugepage=always"), marks=FULL, id="huge-pages"),
    pytest.param(Case("bookworm", append="transparent_hugepage=always"), marks=FULL, id="huge-pages-6.1"),
]


@pytest.mark.parametrize("case", CASES)
def test_a_device_that_is_right_passes(case: Case, tmp_path: Path) -> None:
    ours = case.arm == "vhost-user"
    with booted(case.setup, tmp_path) as guest:
        verifier = Verifier(guest.rig, tmp_path)
        guest.wait(verifier.start())
        used = guest.wait(guest.rig.agent.fill("anonymous", FILL, seed=1))
        guest.wait(verifier.look("fill"))
        guest.wait(verifier.compare(used.handle))
        if ours:
            free_and_await(guest, [used.handle], FILL * 3 // 4)
        else:
            guest.wait(guest.rig.agent.free(used.handle))
        guest.wait(verifier.look("free"))
        held = guest.wait(guest.rig.agent.fill("tmpfs", PIECE, seed=2))
        checks = conclude(guest, verifier, [held.handle])
    for check in checks.values():
        print(check)
    outcomes = {name: check.outcome for name, check in checks.items()}
    assert outcomes == dict.fromkeys(NAMES, "pass") | ({} if ours else {verify_holes.NAME: "skip"})
    if ours:
        assert number(r"^([\d,]+) pages", checks[verify_holes.NAME].message) >= FILL // 2 // 4096
        assert number(r"holes: ([\d,]+) free", checks[verify_pages.NAME].message) >= FILL // 2 // 4096
    if "init_on_free" not in case.append:
        known = (verifier.canary_bytes + PIECE) // 4096
        assert number(r"^([\d,]+) pages", checks[verify_pages.NAME].message) >= known
    assert "200 MiB of memory in 3 fills" in checks[CONTENTS].message
    assert f"all {verifier.canary_bytes // 4096:,} pages with known" in checks[verify_dump.NAME].message


@pytest.mark.full
def test_a_guest_that_is_gone_is_no_crash(tmp_path: Path) -> None:
    """What was looked at before is judged still."""
    with booted(Case().setup, tmp_path) as guest:
        verifier = Verifier(guest.rig, tmp_path)
        guest.wait(verifier.start())
        used = guest.wait(guest.rig.agent.fill("anonymous", FILL, seed=1))
        guest.wait(verifier.look("fill"))
        free_and_await(guest, [used.handle], FILL * 3 // 4)
        guest.wait(verifier.look("free"))
        guest.wait(guest.rig.vm.quit())
        checks = {check.name: check for check in guest.wait(verifier.conclude())}
    for check in checks.values():
        print(check)
    assert {check.name: check.outcome for check in checks.values()} == {
        verify_holes.NAME: "pass",
        verify_pages.NAME: "fail",
        CONTENTS: "fail",
        verify_dump.NAME: "fail",
    }
    assert all(
        "could not be proved: " in check.message for check in checks.values() if check.outcome == "fail"
    )


def test_a_page_too_many_is_caught_by_each_proof(tmp_path: Path) -> None:
    """Fills beside the canary are freed until the device has given back a page of it."""
    setup = dataclasses.replace(Case().setup, program=one_page_too_many.PROGRAM)
    with booted(setup, tmp_path) as guest:
        verifier = Verifier(guest.rig, tmp_path)
        guest.wait(verifier.start())
        # What was lost before the first look nobody can have seen go.
        before = guest.rig.device.log_text().count(one_page_too_many.SAID)
        end = time.monotonic() + FAULT_SECONDS
        while guest.rig.device.log_text().count(one_page_too_many.SAID) == before:
            assert time.monotonic() < end, "the device has released nothing beside the canary"
            used = guest.wait(guest.rig.agent.fill("anonymous", FILL, seed=1))
            free_and_await(guest, [used.handle], FILL // 2)
        checks = conclude(guest, verifier, [])
        said = guest.rig.device.log_text()
    for check in checks.values():
        print(check)
    lost = [int(address, 16) for address in re.findall(rf"{one_page_too_many.SAID}: (0x[0-9a-f]+)", said)]
    assert {check.outcome for check in checks.values()} == {"fail"}
    for name, words in WORDS.items():
        assert 1 <= number(rf"{words}: ([\d,]+)", checks[name].message) <= len(lost)
    for name in (verify_holes.NAME, verify_pages.NAME):
        first = re.search(r"the first at guest address (0x[0-9a-f]+)", checks[name].message)
        assert first is not None
        assert int(first[1], 16) in lost


@pytest.mark.full
def test_a_page_too_many_of_any_kind_does_not_pass(tmp_path: Path) -> None:
    """Its guest dies of it sooner or later; who looks so often has mostly seen the page go, and does not say that all is well."""
    setup = dataclasses.replace(Case().setup, program=(*one_page_too_many.PROGRAM, one_page_too_many.ANY))

    async def main() -> tuple[bool, Check]:
        async with Rig(setup, tmp_path) as rig:
            verifier = Verifier(rig, tmp_path)
            watching = asyncio.create_task(verifier.watch())
            survived = await fill_and_free(rig, verifier)
            watching.cancel()
            await asyncio.wait([watching])
            return survived, await verifier.prove_holes()

    survived, check = asyncio.run(main())
    print(survived, check)
    assert not survived or check.outcome == "fail"
    if check.outcome == "fail":
        assert re.match(WORDS[verify_holes.NAME], check.message)


async def fill_and_free(rig: Rig, verifier: Verifier) -> bool:
    """Boot, and have the guest report again and again. Returns False if something dies of it."""
    try:
        await rig.boot()
        await verifier.start()
        for _ in range(5):
            used = await rig.agent.fill("anonymous", FILL, seed=1)
            await rig.agent.free(used.handle)
            await asyncio.sleep(2)
    except (GuestError, LabError, QmpGlueError):
        return False
    return True
