"""--verify on real guests: a device that is right passes each proof, one that gives a page too many back fails each."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import time
from collections.abc import AsyncIterator
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
from qmp_glue.board import PLAIN, Board, equal_nodes
from qmp_glue.errors import QmpGlueError
from tests.guest.guests import DRAINED_SECONDS, MIB, setup_for
from tests.guest.prepare import ALL_SUITES
from tests.seeded import one_page_too_many

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

MEMORY, FILL, PIECE, CANARY = 512 * MIB, 160 * MIB, 8 * MIB, 32 * MIB
NAMES = [verify_holes.NAME, verify_pages.NAME, CONTENTS, verify_dump.NAME]
FAULT_SECONDS = 30.0
# What each proof says of the pages that are lost, and then how many they are.
WORDS = {
    verify_holes.NAME: "^holes that no release in the device's trace names",
    verify_pages.NAME: "^holes that the guest has in use and has written",
    CONTENTS: "^not as it was written",
    verify_dump.NAME: "^pages with known contents that are nowhere",
}


@contextlib.asynccontextmanager
async def watched(setup: Setup, folder: Path) -> AsyncIterator[tuple[Rig, Verifier]]:
    """A rig that has not booted yet, watched from the very beginning."""
    async with Rig(setup, folder) as rig:
        verifier = Verifier(rig, folder)
        watching = asyncio.create_task(verifier.watch())
        try:
            yield rig, verifier
        finally:
            watching.cancel()
            await asyncio.wait([watching])


async def free_and_await(rig: Rig, handle: int, size: int) -> None:
    """Free a fill and poll until so much was released: more than the bytes, for other pages may be among them."""
    before = sum(one.span.length for one in verify_holes.read_releases(rig.device.trace_file))
    await rig.agent.free(handle)
    end = time.monotonic() + DRAINED_SECONDS
    released = 0
    while released < size:
        assert time.monotonic() < end, f"{released} of {size} bytes within {DRAINED_SECONDS} s"
        await asyncio.sleep(0.2)
        released = sum(one.span.length for one in verify_holes.read_releases(rig.device.trace_file)) - before


async def conclude(rig: Rig, verifier: Verifier, handles: list[int]) -> dict[str, Check]:
    """The guest runs on afterwards."""
    checks = await verifier.conclude(handles)
    assert [check.name for check in checks] == NAMES
    assert await rig.vm.query_status() == "running"
    assert (await rig.agent.ping()).kernel
    for check in checks:
        print(check)
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

    async def main() -> dict[str, Check]:
        async with watched(case.setup, tmp_path) as (rig, verifier):
            await rig.boot()
            await verifier.start()
            assert verifier.canary_bytes == CANARY
            used = await rig.agent.fill("anonymous", FILL, seed=1)
            await verifier.look("fill")
            await verifier.compare(used.handle)
            if ours:
                await free_and_await(rig, used.handle, FILL * 3 // 4)
            else:
                await rig.agent.free(used.handle)
            await verifier.look("free")
            held = await rig.agent.fill("tmpfs", PIECE, seed=2)
            return await conclude(rig, verifier, [held.handle])

    checks = asyncio.run(main())
    outcomes = {name: check.outcome for name, check in checks.items()}
    assert outcomes == dict.fromkeys(NAMES, "pass") | ({} if ours else {verify_holes.NAME: "skip"})
    if ours:
        assert number(r"^([\d,]+) pages", checks[verify_holes.NAME].message) >= FILL // 2 // 4096
        assert number(r"holes: ([\d,]+) free", checks[verify_pages.NAME].message) >= FILL // 2 // 4096
    if "init_on_free" not in case.append:
        known = (CANARY + PIECE) // 4096
        assert number(r"^([\d,]+) pages", checks[verify_pages.NAME].message) >= known
    assert "200 MiB of memory in 3 fills" in checks[CONTENTS].message
    assert f"all {CANARY // 4096:,} pages with known" in checks[verify_dump.NAME].message


@pytest.mark.full
def test_a_guest_that_is_gone_is_no_crash(tmp_path: Path) -> None:
    """What was looked at before is judged still."""

    async def main() -> list[Check]:
        async with watched(Case().setup, tmp_path) as (rig, verifier):
            await rig.boot()
            await verifier.start()
            used = await rig.agent.fill("anonymous", FILL, seed=1)
            await verifier.look("fill")
            await free_and_await(rig, used.handle, FILL * 3 // 4)
            await verifier.look("free")
            await rig.vm.quit()
            return await verifier.conclude()

    checks = asyncio.run(main())
    assert [check.name for check in checks] == NAMES
    assert [check.outcome for check in checks] == ["pass", "fail", "fail", "fail"]
    assert all(check.message.startswith("could not be proved: ") for check in checks[1:])


def test_a_page_too_many_is_caught_by_each_proof(tmp_path: Path) -> None:
    """Fills beside the canary are freed until the device has given back a page of it."""
    setup = dataclasses.replace(Case().setup, program=one_page_too_many.PROGRAM)

    async def main() -> tuple[dict[str, Check], str]:
        async with watched(setup, tmp_path) as (rig, verifier):
            await rig.boot()
            await verifier.start()
            # What was lost before the first look that had it nobody can have seen go.
            before = rig.device.log_text().count(one_page_too_many.SAID)
            end = time.monotonic() + FAULT_SECONDS
            while rig.device.log_text().count(one_page_too_many.SAID) == before:
                assert time.monotonic() < end, "the device has released nothing beside the canary"
                used = await rig.agent.fill("anonymous", FILL, seed=1)
                await free_and_await(rig, used.handle, FILL // 2)
            return await conclude(rig, verifier, []), rig.device.log_text()

    checks, said = asyncio.run(main())
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
        async with watched(setup, tmp_path) as (rig, verifier):
            return await fill_and_free(rig, verifier), await verifier.prove_holes()

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
