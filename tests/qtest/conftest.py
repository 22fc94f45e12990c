"""One QEMU for each of the two devices, shared by all cases, and made anew where a case has ended it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qmp_glue.errors import QmpGlueError
from qmp_glue.find import Qemu, find_qemu
from tests.qtest.bench import Bench
from tests.qtest.hostile import Witness

OURS, BUILT_IN = "ours", "built-in"


SHMEM_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def _needs_small_pages(unmet: Callable[[str], None]) -> None:
    """With huge pages for guest RAM one byte written holds 2 MiB: footprints are no longer exact to the page.

    QEMU advises them for its RAM (ram_block_add(), system/physmem.c), so that advise is as good as always.
    """
    if SHMEM_HUGE_PAGES.exists():
        chosen = SHMEM_HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
        if chosen not in ("never", "deny"):
            unmet(f"{SHMEM_HUGE_PAGES} says {chosen}: footprints are exact to the page with never")


@pytest.fixture
def qemu(unmet: Callable[[str], None]) -> Qemu:
    """A capable QEMU: on a user's machine without one these tests are skipped, in CI one is fetched or they fail."""
    _needs_small_pages(unmet)
    try:
        return find_qemu(fetch=os.environ.get("CI") == "true")
    except QmpGlueError as error:
        unmet(str(error))
        raise


@pytest.fixture(scope="package")
def benches() -> Iterator[dict[str, Bench]]:
    """The running benches, by device. They end with these tests: others look at this process's children and files."""
    running: dict[str, Bench] = {}
    yield running
    with contextlib.ExitStack() as each:  # whichever fails to close, the others are closed
        for bench in running.values():
            each.callback(bench.close)


def take(name: str, benches: dict[str, Bench], qemu: Qemu, factory: pytest.TempPathFactory) -> Bench:
    """Return a bench that is as new."""
    if name in benches and not benches[name].is_alive:
        benches.pop(name).close()
    if name not in benches:
        bench = Bench(qemu, factory.mktemp(name), ours=name == OURS)
        try:
            bench.start()
        except BaseException:
            bench.close()
            raise
        benches[name] = bench
    benches[name].renew()
    return benches[name]


@pytest.fixture(params=[OURS, BUILT_IN])
def bench(
    request: pytest.FixtureRequest,
    benches: dict[str, Bench],
    qemu: Qemu,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bench:
    """Each of the two devices in turn."""
    return take(request.param, benches, qemu, tmp_path_factory)


@pytest.fixture
def ours(benches: dict[str, Bench], qemu: Qemu, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Our device alone, for what QEMU's has no way to do."""
    return take(OURS, benches, qemu, tmp_path_factory)


@pytest.fixture
def witness(bench: Bench) -> Iterator[Witness]:
    """Of what a hostile driver comes to, on each of the two devices in turn."""
    witness = Witness(bench)
    bench.drive()
    yield witness
    witness.check()
