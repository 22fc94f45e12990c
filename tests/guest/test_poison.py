"""Guests whose kernel writes a pattern into freed pages and looks for it when it takes them: a hole would be corruption.

Debian's cloud kernels cannot do that; its amd64 kernels do, with page_poison=1.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from guest_images.kernel import GENERIC
from hostdev.wire.balloon import Feature
from hostdev.wire.trace import Cause, Kind
from tests.guest.balloon import Record, cell
from tests.guest.guests import MIB, assert_all_well, await_named, booted, setup_for, traced
from tests.guest.prepare import POISONING_SUITES

pytestmark = [pytest.mark.guest, pytest.mark.full, pytest.mark.timeout(400)]

MEMORY, FILL = 512 * MIB, 200 * MIB


@pytest.mark.parametrize("suite", POISONING_SUITES)
def test_poisoned_pages_are_answered_and_kept(suite: str, tmp_path: Path, record_property: Record) -> None:
    """Nothing is released, and the guest, which checks each page that it takes, takes nearly all of them again."""
    setup = setup_for(suite, flavour=GENERIC, memory=MEMORY, append="page_poison=1", trace=True)
    with booted(setup, tmp_path) as guest:
        agent = guest.rig.agent
        used = guest.wait(agent.fill("anonymous", FILL, seed=1))
        start = len(traced(guest))
        guest.wait(agent.free(used.handle))
        await_named(guest, Kind.WITHHOLD, start, FILL * 3 // 4)
        again = guest.wait(agent.fill("anonymous", FILL + 100 * MIB, seed=2))
        assert guest.wait(agent.checksum(again.handle)).mismatched_pages == 0
        found = [record.value for record in traced(guest) if record.kind in {Kind.RELEASE, Kind.WITHHOLD}]
        assert {one.cause for one in found} == {Cause.REPORT}
        assert not any(record.kind is Kind.RELEASE for record in traced(guest))
        counters = guest.rig.device.counters()
        assert (
            counters.features & (Feature.PAGE_POISON | Feature.REPORTING)
            == Feature.PAGE_POISON | Feature.REPORTING
        )
        withheld = counters.total("withheld_bytes_total", reason="poison")
        assert withheld >= FILL * 3 // 4
        assert_all_well(guest)
    cell(
        record_property,
        guest,
        "poison (page_poison=1, amd64 kernel)",
        f"{withheld // MIB} MiB reported, all kept",
    )


def test_without_page_poison_such_a_guest_does_not_report(tmp_path: Path) -> None:
    setup = setup_for(
        POISONING_SUITES[0], flavour=GENERIC, memory=MEMORY, append="page_poison=1", features="-page_poison"
    )
    with booted(setup, tmp_path) as guest:
        used = guest.wait(guest.rig.agent.fill("anonymous", FILL, seed=1))
        guest.wait(guest.rig.agent.free(used.handle))
        counters = guest.rig.device.counters()
        assert counters.features & Feature.VERSION_1
        assert not counters.features & Feature.REPORTING
        assert counters.reports == 0
        assert_all_well(guest)
