"""What the guest tests judge by, without a guest: lines of kernel logs, and pages between two pictures of RAM."""

from __future__ import annotations

import pytest

from hostdev.wire.trace import Cause, Release
from qmp_glue.ram import Section
from tests.guest.guests import complaints
from tests.guest.ram_pages import PAGE, Change, Picture, compare, misplaced, named_pages, pattern_digests

MIB = 1 << 20


@pytest.mark.parametrize(
    "line",
    [
        "BUG: unable to handle page fault for address: 0000000000001000",
        "WARNING: CPU: 0 PID: 1 at mm/page_alloc.c:1",
        "Oops: 0000 [#1] PREEMPT SMP NOPTI",
        "Call Trace:",
        "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "INFO: task kworker/0:1:9 blocked for more than 120 seconds.",
        "Out of memory: Killed process 77 (python3)",
        "pagealloc: memory corruption",
        "virtio_balloon: probe of virtio0 failed with error -2",
    ],
)
def test_a_complaint_is_seen(line: str) -> None:
    log = f"[    0.1] Linux version 6.12\n[    2.0] {line}\n[    3.0] random: crng init done\n"
    assert complaints(log) == [f"[    2.0] {line}"]


@pytest.mark.parametrize(
    "line",
    ["virtio_blk installed", "DEBUG: nothing", "Write protecting the kernel", "x86/mm: Checked W+X mappings"],
)
def test_what_is_no_complaint(line: str) -> None:
    assert complaints(f"[    2.0] {line}\n") == []


def release(address: int, length: int) -> Release:
    return Release(address, length, Cause.REPORT)


def test_ranges_that_are_not_whole_pages_in_one_section() -> None:
    sections = [Section(0, MIB, 0, 0), Section(2 * MIB, MIB, 1, 0)]
    good = [release(0, MIB), release(2 * MIB + PAGE, PAGE)]
    bad = [
        release(0, MIB + PAGE),
        release(MIB, PAGE),
        release(MIB, 2 * MIB),
        release(PAGE, 100),
        release(100, PAGE),
        release(PAGE, 0),
        release(3 * MIB - PAGE, 2 * PAGE),
    ]
    assert misplaced(good + bad, sections) == bad


def test_named_pages_are_those_of_all_ranges() -> None:
    assert named_pages([release(0, 2 * PAGE), release(PAGE, 2 * PAGE)]) == {0, PAGE, 2 * PAGE}


def test_each_page_of_a_fill_has_a_digest_of_its_own() -> None:
    assert len(pattern_digests(2 * MIB, seed=1)) == 2 * MIB // PAGE
    assert not pattern_digests(MIB, seed=1) & pattern_digests(MIB, seed=2)


def picture(**pages: bytes) -> Picture:
    return Picture((), {int(name[1:]): contents for name, contents in pages.items()}, (), 0)


FREED, LIVE, OTHER = b"f", b"l", b"o"
CLEAN = Change([], [], [], [], [])


@pytest.mark.parametrize(
    ("after", "named", "expected"),
    [
        (picture(p1=FREED, p2=LIVE, p3=OTHER), set(), CLEAN),
        (picture(p2=LIVE, p3=OTHER), {1}, Change([], [], [], [1], [])),
        (picture(p2=LIVE, p3=OTHER), {9}, Change([1], [], [], [1], [])),
        (picture(p1=FREED, p2=LIVE, p3=OTHER), {1}, Change([], [1], [], [], [1])),
        (picture(p1=OTHER, p2=LIVE, p3=OTHER), {1}, Change([], [], [], [], [1])),
        (picture(p1=FREED, p2=OTHER, p3=OTHER), set(), Change([], [], [LIVE], [], [])),
        (picture(p1=FREED, p2=OTHER, p3=OTHER, p7=LIVE), set(), CLEAN),
        (picture(p1=FREED, p2=LIVE), {3}, CLEAN),
    ],
    ids=["nothing", "released", "vanished", "kept", "taken-anew", "lost", "moved", "other-released"],
)
def test_each_change_is_told(after: Picture, named: set[int], expected: Change) -> None:
    before = picture(p1=FREED, p2=LIVE, p3=OTHER)
    assert compare(before, after, named, freed=frozenset([FREED]), live=frozenset([LIVE])) == expected
