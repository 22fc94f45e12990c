"""What a driver sees before it uses a queue: features, queues, config space, status."""

from __future__ import annotations

import pytest

from hostdev.wire.balloon import CONFIG_SIZE, Config, Feature, Role
from qmp_glue.virtio_pci import Status
from tests.qtest.bench import (
    BALLOON_FEATURES,
    FEATURES,
    FREE,
    MIB,
    RING_SIZE,
    Bench,
    balloon_bits,
    offset_of,
)

RING_EVENT_IDX = 1 << 29
RING_PACKED = 1 << 34


def test_features_offered(bench: Bench) -> None:
    offered = bench.device.device_features()
    assert balloon_bits(offered) == BALLOON_FEATURES
    assert offered & FEATURES == FEATURES
    assert not offered & RING_PACKED
    # Ours leaves EVENT_IDX out: suppressing a signal needs a store ordered before a load, and Python has no fence.
    assert bool(offered & RING_EVENT_IDX) is not bench.ours


def test_features_chosen(bench: Bench) -> None:
    chosen = Feature.REPORTING | Feature.VERSION_1
    bench.device.negotiate(chosen)
    assert bench.device.driver_features() == chosen


def test_queues(bench: Bench) -> None:
    assert bench.device.queue_count == len(Role)
    sizes = [bench.device.queue_size(index) for index in range(len(Role) + 1)]
    # QEMU's sizes each of its queues by its use; its generic vhost-user device has one size for all of ours.
    last = [RING_SIZE, RING_SIZE] if bench.ours else [1024, 32]
    assert sizes == [RING_SIZE] * 3 + last + [0]


def test_config_bytes(bench: Bench) -> None:
    bench.drive()
    bench.device.write_config(offset_of("actual"), 4, 0x0403_0201)
    assert bench.config() == Config(actual=0x0403_0201)
    single = bytes(bench.device.read_config(at, 1) for at in range(CONFIG_SIZE))
    assert single == bytes([0, 0, 0, 0, 1, 2, 3, 4]) + bytes(8)
    assert bench.device.read_config(6, 2) == 0x0403


@pytest.mark.parametrize("field", ["num_pages", "free_page_hint_cmd_id"])
def test_config_that_is_the_devices_own(bench: Bench, field: str) -> None:
    bench.drive()
    bench.device.write_config(offset_of(field), 4, 7)
    assert bench.config() == Config()


def test_actual_reaches_the_monitor(bench: Bench) -> None:
    bench.drive()
    bench.device.write_config(offset_of("actual"), 4, 256)
    assert bench.config().actual == 256
    if not bench.ours:  # its own balloon is the only one that QEMU's monitor knows
        answer = bench.qmp("query-balloon")
        assert answer == {"actual": 255 * MIB}


def test_status_reads_back(bench: Bench) -> None:
    device = bench.device
    assert device.status == 0
    bench.set_up()
    assert device.status == Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
    device.add_status(Status.DRIVER_OK)
    assert device.status == Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
    device.reset()
    assert device.status == 0


def test_poisoned_pages_keep_their_poison(bench: Bench) -> None:
    bench.set_up()
    bench.device.write_config(offset_of("poison_val"), 4, 0xAAAA_AAAA)
    bench.device.add_status(Status.DRIVER_OK)
    bench.fill(FREE, 2 * MIB)
    assert bench.given_back(lambda: bench.report((FREE, 2 * MIB))) == 0
    assert bench.holds(FREE, 2 * MIB)
    # Zero is what a hole reads as: such pages are given back.
    bench.device.write_config(offset_of("poison_val"), 4, 0)
    assert bench.given_back(lambda: bench.report((FREE, 2 * MIB))) == 2 * MIB


def test_poison_without_the_feature_means_nothing(bench: Bench) -> None:
    bench.drive(FEATURES & ~Feature.PAGE_POISON)
    bench.device.write_config(offset_of("poison_val"), 4, 0xAAAA_AAAA)
    bench.fill(FREE, 2 * MIB)
    assert bench.given_back(lambda: bench.report((FREE, 2 * MIB))) == 2 * MIB
