"""Our device is unplugged with work in flight, without a word to its driver, and plugged again on the same connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from hostdev.driver import Buffer
from hostdev.wire.balloon import Role
from qmp_glue.board import Board
from qmp_glue.find import Qemu
from qmp_glue.hotplug import BALLOON_ID, plug_balloon
from qmp_glue.pci import eject, open_root_port
from qmp_glue.virtio_pci import Status, VirtioPciDevice
from tests.qtest.bench import FREE, LIST, MIB, PAGE, RINGS_AT, WAIT_SECONDS, Bench
from tests.qtest.hostile import BROKEN, INTERRUPTS, REFUSED, await_stopped, started

BUS = 1
BIG = 128 * MIB


@pytest.fixture(scope="module")
def kept() -> Iterator[list[Bench]]:
    """Where the one bench of this module is kept."""
    kept: list[Bench] = []
    yield kept
    for each in kept:
        assert each.close() == (0, 0)


@pytest.fixture
def bench(kept: list[Bench], qemu: Qemu, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if not kept:
        folder = tmp_path_factory.mktemp("unplugged")
        kept.append(Bench(qemu, folder, ours=True, board=Board(root_ports=1), plugged=False))
        kept[0].start()
        # No device has waited for it in realize.
        kept[0].wait_until(lambda: "worker" in kept[0].command("query-status"), "no worker")
    return kept[0]


def plug(bench: Bench) -> None:
    """Bring the device, behind the root port, and find it."""
    bench.work(plug_balloon(bench.vm))
    open_root_port(bench.qtest, BUS)
    bench.device = VirtioPciDevice.find(bench.qtest, BUS)


def unplug(bench: Bench) -> None:
    bench.qmp("device_del", {"id": BALLOON_ID})
    eject(bench.qtest)
    while True:
        gone = bench.work(bench.vm.monitor.wait_event("DEVICE_DELETED", seconds=WAIT_SECONDS))["data"]
        if isinstance(gone, dict) and gone.get("device") == BALLOON_ID:
            return


def a_big_report(bench: Bench) -> None:
    bench.drive()
    bench.rings[Role.REPORTING].offer([Buffer(FREE, BIG, writable=True)])


def many_reports(bench: Bench) -> None:
    bench.drive()
    ring = bench.rings[Role.REPORTING]
    for number in range(ring.size):
        ring.add([Buffer(FREE + number * MIB, MIB, writable=True)])
    ring.notify()


def a_statistics_buffer(bench: Bench) -> None:
    bench.drive()
    ring = bench.rings[Role.STATISTICS]
    ring.offer([Buffer(LIST, 20)])
    bench.send_pages(Role.INFLATE, [FREE])
    assert ring.used_index == 0


def a_broken_ring(bench: Bench) -> None:
    bench.drive()
    ring = bench.rings[Role.REPORTING]
    ring.set_available_index(ring.size + 1)
    ring.notify()
    await_stopped(bench, Role.REPORTING)


def a_refused_ring(bench: Bench) -> None:
    bench.set_up()
    ring = bench.rings[Role.REPORTING]
    ring.descriptors = INTERRUPTS
    bench.device.enable_queue(ring)
    bench.device.add_status(Status.DRIVER_OK)
    assert not any(started(bench).values())


def rings_that_are_gone(bench: Bench) -> None:
    bench.drive()
    bench.report((RINGS_AT, FREE - RINGS_AT))
    await_stopped(bench, Role.REPORTING)


def a_pause(bench: Bench) -> None:
    bench.drive()
    bench.rings[Role.REPORTING].offer([Buffer(FREE, BIG, writable=True)])
    bench.qmp("stop")


def no_driver(_bench: Bench) -> None:
    pass


@pytest.mark.parametrize(
    ("state", "lines"),
    [
        (a_big_report, []),
        (many_reports, []),
        (a_statistics_buffer, []),
        (a_broken_ring, [BROKEN]),
        (a_refused_ring, list(REFUSED)),
        (rings_that_are_gone, [BROKEN]),
        (a_pause, []),
        (no_driver, []),
    ],
)
def test_unplugged_with(bench: Bench, state: Callable[[Bench], None], lines: list[str]) -> None:
    """Nothing is released any more once it is gone, and the next one is served by the same process."""
    said = len(bench.qemu_log())
    worker = bench.command("query-status")["worker"]
    plug(bench)
    bench.rings.clear()
    bench.fill(FREE, BIG)
    state(bench)
    unplug(bench)
    bench.fill(FREE, BIG)
    if state is a_pause:
        bench.qmp("cont")
    assert not any(started(bench).values())
    plug(bench)
    bench.drive()
    assert bench.given_back(lambda: bench.report((FREE, PAGE))) == PAGE
    assert bench.given_back(lambda: bench.send_pages(Role.INFLATE, [FREE + PAGE])) == PAGE
    assert bench.holds(FREE + 2 * PAGE, BIG - 2 * PAGE)
    unplug(bench)
    status = bench.command("query-status")
    assert (status["worker"], status["inert"]) == (worker, False)
    bench.wait_until(lambda: len(written(bench, said)) >= len(lines), "QEMU says nothing")
    assert [line[: len(begin)] for line, begin in zip(written(bench, said), lines, strict=True)] == lines


def written(bench: Bench, said: int) -> list[str]:
    """What QEMU has written since, line by line, as far as it has come to the end of one."""
    whole = bench.qemu_log()[said:].rpartition("\n")[0]
    return [line.partition(": ")[2] for line in whole.splitlines()]
