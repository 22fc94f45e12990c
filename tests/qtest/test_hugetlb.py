"""Guest memory of huge pages: ours releases none of it unless that was asked for, and then whole ones alone.

Run where the host's pool has pages or can be given some; else reported as not run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostdev.wire.balloon import Role
from qmp_glue.board import Board
from qmp_glue.find import Qemu
from tests.qtest.bench import FREE, MIB, PAGE, Bench

HUGE = 2 * MIB
RAM = 64 * MIB


@pytest.fixture(params=["ours", "ours, asked for", "built-in"])
def huge(
    request: pytest.FixtureRequest, qemu: Qemu, huge_pages: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """A machine of huge pages, with our device as it is, with ours told to release them, and with QEMU's own."""
    assert huge_pages * HUGE >= RAM
    bench = Bench(
        qemu,
        tmp_path_factory.mktemp("huge"),
        ours=request.param != "built-in",
        ram_bytes=RAM,
        board=Board(huge_pages=True),
        options=["--hugetlb-release"] if request.param == "ours, asked for" else [],
    )
    try:
        bench.start()
        bench.drive()
        bench.fill(FREE, 8 * MIB)
        yield bench
    finally:
        bench.close()


def gives(bench: Bench) -> bool:
    return not bench.ours or bench.command("query-memory")[-1]["method"] == "remove"


def test_a_report_of_whole_pages(huge: Bench) -> None:
    expected = 2 * HUGE if gives(huge) else 0
    assert huge.given_back(lambda: huge.report((FREE, 2 * HUGE))) == expected
    assert huge.holds(FREE, PAGE, 0 if expected else 0xAA)
    assert huge.holds(FREE + 2 * HUGE, 2 * HUGE)


@pytest.mark.parametrize("entry", [(FREE, HUGE - PAGE), (FREE + PAGE, HUGE), (FREE + MIB, HUGE)])
def test_a_report_of_less_than_a_page(huge: Bench, entry: tuple[int, int]) -> None:
    assert huge.given_back(lambda: huge.report(entry)) == 0
    assert huge.holds(FREE, 4 * HUGE)


def test_an_unaligned_report_with_a_page_in_it(huge: Bench) -> None:
    """QEMU's passes over such an entry. Ours releases the whole pages inside it: the guest named every byte of them."""
    released = huge.given_back(lambda: huge.report((FREE + PAGE, 2 * HUGE)))
    assert released == (HUGE if huge.ours and gives(huge) else 0)
    assert huge.holds(FREE, HUGE)
    assert huge.holds(FREE + 2 * HUGE, 2 * HUGE)


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "backwards"])
def test_inflation_of_whole_pages(huge: Bench, order: int) -> None:
    """In one chain; what comes over two is not put together, for the guest may have reused the first part."""
    pages = [FREE + number * PAGE for number in range(HUGE // PAGE)][::order]
    assert huge.given_back(lambda: huge.send_pages(Role.INFLATE, pages[:256])) == 0
    assert huge.given_back(lambda: huge.send_pages(Role.INFLATE, pages[256:])) == 0
    assert huge.holds(FREE, HUGE)
    expected = HUGE if gives(huge) else 0
    assert huge.given_back(lambda: huge.send_pages(Role.INFLATE, pages)) == expected
    assert huge.holds(FREE + HUGE, HUGE)


def test_the_log_says_why(huge: Bench) -> None:
    if not huge.ours:
        return
    log = huge.device_log()
    assert "guest memory is hugetlb pages" in log
    assert "kill QEMU" in log or "QEMU dies" in log
    assert ("discard method is remove" in log) == gives(huge)
