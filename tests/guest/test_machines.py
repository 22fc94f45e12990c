"""Real guests on other machines: NUMA nodes, memory above 4 GiB, microvms, and both numberings of the rings.

On each: a guest boots, its driver comes up, it fills memory beside other memory that stays, frees it, and the device gives
back what the guest reports: exactly that, as tests.guest.ram_pages tells. Then a balloon takes nearly all that is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hostdev.wire.balloon import Feature, Role
from hostdev.wire.trace import Cause
from qmp_glue.board import PLAIN, Board, equal_nodes
from qmp_glue.ram import Section
from tests.guest import ram_pages
from tests.guest.balloon import reach
from tests.guest.guests import DRAINED_SECONDS, MIB, Booted, assert_all_well, booted, setup_for, traced

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

Record = Callable[[str, object], None]

LIVE = 48 * MIB
LIVE_SEED, FILL_SEED = 7, 8
SMALL = 512 * MIB
# What a balloon leaves: kernel, user space and the live fill; and of each GiB what page tables and watermarks take.
KEPT, KEPT_SHARE = 192 * MIB, 16
# Most of a freed fill is in blocks that are reported; the rest stays in smaller ones and in per-CPU lists.
REPORTED_SHARE = 0.75
KHUGEPAGED = "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs"
# What a guest at rest takes anew of the pages it has just reported; none was seen.
TAKEN_ANEW = 4 * MIB


@dataclass(frozen=True)
class Case:
    """A machine, what its guest fills, and what is to be seen: which ring reports, VERSION_1, who gives how much."""

    suite: str
    memory: int = SMALL
    board: Board = PLAIN
    features: str = ""
    fill: int = 256 * MIB
    ring: int = 4
    modern: bool = True
    places: int = 1
    least: int = 0


FULL = pytest.mark.full
CASES = [
    pytest.param(
        Case("bookworm-backports", board=Board(nodes=equal_nodes(SMALL, 2)), places=2, least=64 * MIB),
        id="two-nodes",
    ),
    pytest.param(Case("bookworm", board=Board(kind="microvm"), modern=False), id="microvm-legacy"),
    pytest.param(Case("trixie-backports", features="-free_page_hint", ring=3), id="dense-rings"),
    pytest.param(
        Case("trixie-backports", board=Board(kind="microvm", force_legacy=False)),
        id="microvm-modern",
        marks=FULL,
    ),
    pytest.param(
        Case("forky", board=Board(kind="microvm"), modern=False, features="-free_page_hint", ring=3),
        id="microvm-legacy-dense-rings",
        marks=FULL,
    ),
    pytest.param(
        Case("bookworm-backports", memory=5120 * MIB, fill=4096 * MIB, places=2, least=512 * MIB),
        id="above-4G",
        marks=FULL,
    ),
    pytest.param(
        Case(
            "forky",
            memory=5120 * MIB,
            board=Board(nodes=equal_nodes(5120 * MIB, 4)),
            fill=4096 * MIB,
            places=5,
            least=256 * MIB,
        ),
        id="four-nodes-above-4G",
        marks=FULL,
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_reports_and_inflation_give_back_exactly_what_they_name(
    case: Case, tmp_path: Path, record_property: Record
) -> None:
    setup = setup_for(case.suite, memory=case.memory, board=case.board, features=case.features, trace=True)
    with booted(replace(setup, control=True), tmp_path) as guest:
        # Whose huge pages are made of what others had for a while: up to eight of 2 MiB at a time, each ten seconds.
        guest.wait(guest.rig.agent.write(KHUGEPAGED, str(600_000)))
        live = guest.wait(guest.rig.agent.fill("anonymous", LIVE, seed=LIVE_SEED))
        before, change, named = fill_and_free(guest, case)
        assert_features(guest, case)
        assert change.vanished_unnamed == []
        assert change.named_and_kept == []
        assert change.live_lost == []
        assert len(change.freed_gone) * ram_pages.PAGE >= REPORTED_SHARE * case.fill
        assert len(change.taken_anew) * ram_pages.PAGE <= TAKEN_ANEW
        assert_each_place_gave(before.sections, change.freed_gone, case)
        record_property("named_mib", len(named) * ram_pages.PAGE // MIB)
        record_property("freed_pages_given_back_mib", len(change.freed_gone) * ram_pages.PAGE // MIB)
        record_property("taken_anew_kib", len(change.taken_anew) * ram_pages.PAGE // 1024)
        assert_inflation_is_exact(guest, case)
        checked = guest.wait(guest.rig.agent.checksum(live.handle))
        assert (checked.bytes, checked.mismatched_pages) == (LIVE, 0)
        assert_all_well(guest)


@pytest.mark.full
def test_a_device_that_frees_nothing_is_found_out(tmp_path: Path) -> None:
    """The control: named alike, and every page that was named keeps what it held."""
    case = Case("bookworm-backports")
    setup = setup_for(case.suite, memory=case.memory, discard="dontneed", trace=True)
    with booted(setup, tmp_path) as guest:
        guest.wait(guest.rig.agent.fill("anonymous", LIVE, seed=LIVE_SEED))
        _, change, _ = fill_and_free(guest, case)
    assert len(change.named_and_kept) * ram_pages.PAGE >= REPORTED_SHARE * case.fill
    assert change.freed_gone == []


def assert_features(guest: Booted, case: Case) -> None:
    features = guest.rig.device.counters().features
    assert features & Feature.REPORTING
    assert bool(features & Feature.VERSION_1) == case.modern
    assert bool(features & Feature.FREE_PAGE_HINT) == (case.ring == 4)


def fill_and_free(guest: Booted, case: Case) -> tuple[ram_pages.Picture, ram_pages.Change, set[int]]:
    """Fill, look, free, wait for the reports, look again. Returns the first look, the change, what was named between."""
    rig, trace = guest.rig, guest.folder / "device.trace"
    used = guest.wait(rig.agent.fill("anonymous", case.fill, seed=FILL_SEED))
    before = guest.wait(ram_pages.take_picture(rig.vm, trace))
    guest.wait(rig.agent.free(used.handle))
    freed = ram_pages.pattern_digests(case.fill, FILL_SEED)
    # Of the fill's own pages, for others are reported beside them; so many that what is taken anew may be among them.
    fill = {page for page, contents in before.pages.items() if contents in freed}
    await_pages(guest, before.records, fill, int(REPORTED_SHARE * case.fill) + TAKEN_ANEW)
    after = guest.wait(ram_pages.take_picture(rig.vm, trace))
    between = traced(guest)[before.records : after.records]
    assert ram_pages.reporting_rings(between, Role.REPORTING) == {case.ring}
    assert ram_pages.misplaced(ram_pages.releases(traced(guest)), after.sections) == []
    for picture in (before, after):
        assert len(picture.pages) * ram_pages.PAGE == sum(picture.footprints)
    named = ram_pages.named_pages(ram_pages.releases(between))
    live = ram_pages.pattern_digests(LIVE, LIVE_SEED)
    assert freed | live <= set(before.pages.values())
    return before, ram_pages.compare(before, after, named, freed=freed, live=live), named


def await_pages(guest: Booted, start: int, pages: set[int], wanted: int) -> None:
    """Poll until wanted bytes of these pages were given back since record number start of the trace."""
    end = time.monotonic() + DRAINED_SECONDS
    while (size := len(named_since(guest, start) & pages) * ram_pages.PAGE) < wanted:
        assert time.monotonic() < end, f"{size} of {wanted} bytes within {DRAINED_SECONDS} s"
        time.sleep(0.2)


def named_since(guest: Booted, start: int) -> set[int]:
    return ram_pages.named_pages(ram_pages.releases(traced(guest, start)))


def assert_inflation_is_exact(guest: Booted, case: Case) -> None:
    """A balloon over memory that was just freed: each page of it was named, is a hole, and nothing else has gone.

    Linux moves pages of a balloon to make room for large blocks: another one is inflated, and the old one is the guest's again.
    """
    rig, trace = guest.rig, guest.folder / "device.trace"
    used = guest.wait(rig.agent.fill("anonymous", case.fill, seed=FILL_SEED))
    before = guest.wait(ram_pages.take_picture(rig.vm, trace))
    guest.wait(rig.agent.free(used.handle))
    kept = KEPT + case.memory // KEPT_SHARE
    reach(guest, kept)
    after = guest.wait(ram_pages.take_picture(rig.vm, trace))
    between = list(ram_pages.releases(traced(guest)[before.records : after.records]))
    assert ram_pages.misplaced(between, after.sections) == []
    inflations = [one for one in between if one.cause == Cause.INFLATE]
    inflated = ram_pages.named_pages(inflations)
    moved = moved_pages(guest)
    # All of guest memory as QEMU's -m has it, of which the guest does not see some.
    more = sum(one.length for one in inflations) - (case.memory - kept)
    assert 0 <= more <= moved * ram_pages.PAGE
    assert len([page for page in inflated if page in after.pages]) <= moved
    named = ram_pages.named_pages(between)
    live = ram_pages.pattern_digests(LIVE, LIVE_SEED)
    change = ram_pages.compare(before, after, named, freed=frozenset(), live=live)
    assert change.vanished_unnamed == []
    assert change.live_lost == []
    assert_each_place_gave(before.sections, sorted(inflated), case)
    reach(guest, case.memory)


def moved_pages(guest: Booted) -> int:
    """Return how many pages of its balloons the guest has moved since its boot; most do not."""
    lines = (line.split() for line in guest.wait(guest.rig.agent.read("/proc/vmstat")).splitlines())
    return sum(int(value) for name, value in lines if name == "balloon_migrate")


def assert_each_place_gave(sections: tuple[Section, ...], gone: list[int], case: Case) -> None:
    """Every large section, so every node, and of one that the PCI hole cuts both parts, lost its share of the fill."""
    large = [section for section in sections if section.length > MIB]
    assert len(large) == case.places
    for section in large:
        count = sum(section.address <= page < section.end for page in gone)
        assert count * ram_pages.PAGE >= case.least
