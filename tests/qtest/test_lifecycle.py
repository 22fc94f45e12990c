"""Resets, pauses and the end: what the rings are worth across them."""

from __future__ import annotations

import pytest

from hostdev.driver import Buffer
from hostdev.wire.balloon import Config, Role
from qmp_glue.find import Qemu
from qmp_glue.virtio_pci import Status
from tests.qtest.bench import FREE, LIST, MIB, PAGE, RING_SIZE, Bench, offset_of


def reports_work(bench: Bench) -> bool:
    bench.fill(FREE, MIB)
    return bench.given_back(lambda: bench.report((FREE, MIB))) == MIB


def test_reset_and_again(bench: Bench) -> None:
    for _ in range(5):
        bench.drive()
        assert reports_work(bench)
        assert reports_work(bench)
        assert bench.rings[Role.REPORTING].used_index == 2
        bench.device.reset()
        assert bench.device.queue_size(Role.INFLATE) == RING_SIZE


def test_reset_with_a_held_statistics_buffer(bench: Bench) -> None:
    bench.drive()
    bench.rings[Role.STATISTICS].offer([Buffer(LIST, 20)])
    bench.send_pages(Role.INFLATE, [FREE])
    bench.device.reset()
    bench.drive()
    ring = bench.rings[Role.STATISTICS]
    first = ring.offer([Buffer(LIST, 20)])
    bench.send_pages(Role.INFLATE, [FREE])
    assert ring.used_index == 0
    ring.offer([Buffer(LIST, 20)])
    assert ring.wait_used(first) == 0


def test_poison_over_a_reset(bench: Bench) -> None:
    """QEMU's forgets the value. Ours is told of no reset, keeps it, and minds it only where PAGE_POISON is chosen."""
    bench.drive()
    bench.device.write_config(offset_of("poison_val"), 4, 1)
    bench.device.reset()
    assert bench.config() == Config(poison_val=int(bench.ours))
    bench.set_up()
    bench.device.write_config(offset_of("poison_val"), 4, 0)
    bench.device.add_status(Status.DRIVER_OK)
    assert reports_work(bench)


def test_stop_and_cont(bench: Bench) -> None:
    bench.drive()
    for number in range(3):
        assert reports_work(bench)
        bench.qmp("stop")
        bench.qmp("cont")
        assert bench.rings[Role.REPORTING].used_index == number + 1
        assert bench.device.status & Status.DRIVER_OK
    assert reports_work(bench)
    assert bench.send_pages(Role.INFLATE, [FREE]) == 0


def test_stop_and_cont_with_a_held_statistics_buffer(bench: Bench) -> None:
    bench.drive()
    ring = bench.rings[Role.STATISTICS]
    first = ring.offer([Buffer(LIST, 20)])
    bench.send_pages(Role.INFLATE, [FREE])
    bench.qmp("stop")
    bench.qmp("cont")
    bench.send_pages(Role.INFLATE, [FREE])
    assert ring.used_index == 0
    second = ring.offer([Buffer(LIST, 20)])
    assert ring.wait_used(first) == 0
    bench.send_pages(Role.INFLATE, [FREE])
    assert ring.used_index == 1
    ring.offer([Buffer(LIST, 20)])
    assert ring.wait_used(second) == 0


def test_what_was_offered_during_a_stop_is_seen_at_cont(ours: Bench) -> None:
    """Without another kick; QEMU's answers the kick at once, paused or not, so there is nothing to compare."""
    ours.drive()
    ours.fill(FREE, MIB)
    ours.qmp("stop")
    before = ours.footprint()
    ring = ours.rings[Role.REPORTING]
    head = ring.add([Buffer(FREE, MIB, writable=True)])
    assert ring.used_index == 0
    ours.qmp("cont")
    assert ring.wait_used(head) == 0
    assert before - ours.footprint() == MIB


def test_system_reset(bench: Bench) -> None:
    bench.drive()
    assert reports_work(bench)
    bench.system_reset()
    assert bench.device.status == 0
    bench.drive()
    assert bench.rings[Role.REPORTING].used_index == 0
    assert reports_work(bench)


def test_system_reset_while_stopped(bench: Bench) -> None:
    bench.drive()
    bench.qmp("stop")
    bench.system_reset()
    bench.qmp("cont")
    bench.drive()
    assert reports_work(bench)


def test_reset_in_the_middle_of_reports(bench: Bench) -> None:
    """Whatever was done of them by then, the device works afterwards and nothing is released any more."""
    bench.drive()
    ring = bench.rings[Role.REPORTING]
    bench.fill(FREE, 128 * MIB)
    for number in range(32):
        ring.add([Buffer(FREE + 4 * MIB * number, 4 * MIB, writable=True)])
    ring.notify()
    bench.device.reset()
    bench.fill(FREE, 128 * MIB)
    held = bench.footprint()
    bench.drive()
    assert reports_work(bench)
    assert held - bench.footprint() == MIB


@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "built-in"])
@pytest.mark.parametrize("running", [False, True], ids=["idle", "running"])
def test_the_end(qemu: Qemu, tmp_path_factory: pytest.TempPathFactory, is_ours: bool, running: bool) -> None:
    bench = Bench(qemu, tmp_path_factory.mktemp("end"), ours=is_ours)
    try:
        bench.start()
        if running:
            bench.drive()
            bench.rings[Role.STATISTICS].offer([Buffer(LIST, PAGE)])
    finally:
        ended = bench.close()
    assert ended == (0, 0 if is_ours else None)
