"""One QEMU for each of the two devices, shared by all cases, and made anew where a case has ended it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from qmp_glue.errors import QmpGlueError
from qmp_glue.find import Qemu, find_qemu
from tests.qtest.bench import Bench

OURS, BUILT_IN = "ours", "built-in"


@pytest.fixture
def qemu(unmet: Callable[[str], None]) -> Qemu:
    """A capable QEMU: on a user's machine without one these tests are skipped, in CI one is fetched or they fail."""
    try:
        return find_qemu(fetch=os.environ.get("CI") == "true")
    except QmpGlueError as error:
        unmet(str(error))
        raise


@pytest.fixture(scope="session")
def benches() -> Iterator[dict[str, Bench]]:
    """The running benches, by device."""
    running: dict[str, Bench] = {}
    yield running
    for bench in running.values():
        bench.close()


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
