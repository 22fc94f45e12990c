"""The size that the guest is asked for: what of it the driver reads, when it is told, what the driver says back."""

from __future__ import annotations

import pytest

from hostdev.wire.balloon import Config, Role
from qmp_glue.virtio_pci import Status
from tests.qtest.bench import FREE, MIB, PAGE, RAM_BYTES, Bench, offset_of

ISR_CONFIG = 2


def is_told(bench: Bench) -> None:
    """Wait for the config interrupt."""
    bench.wait_until(lambda: bool(bench.device.take_isr() & ISR_CONFIG), "no interrupt for the config")


@pytest.mark.parametrize("size", [RAM_BYTES // 2, RAM_BYTES - PAGE, RAM_BYTES - 1, 5 * MIB + 17, 1])
def test_a_target_is_in_the_config_and_the_driver_is_told(bench: Bench, size: int) -> None:
    bench.drive()
    bench.device.take_isr()
    assert bench.command("balloon", {"value": size}) == {}
    if (RAM_BYTES - size) // PAGE:
        is_told(bench)
    assert bench.config() == Config(num_pages=(RAM_BYTES - size) // PAGE)


def test_a_target_beyond_memory_is_all_of_it(bench: Bench) -> None:
    bench.drive()
    bench.command("balloon", {"value": 64 * MIB})
    assert bench.config().num_pages == 192 * MIB // PAGE
    bench.command("balloon", {"value": 1 << 40})
    assert bench.config().num_pages == 0


@pytest.mark.parametrize("value", [0, -1, -(1 << 62)])
def test_what_is_no_size_is_refused_in_the_same_words(bench: Bench, value: int) -> None:
    bench.drive()
    assert bench.refused("balloon", {"value": value}) == "GenericError: Parameter 'value' expects a size"
    assert bench.config() == Config()


@pytest.mark.parametrize("value", ["big", 1.5, True, None, {}])
def test_what_is_no_number_is_refused_in_the_same_words(bench: Bench, value: object) -> None:
    said = bench.refused("balloon", {"value": value})
    assert said == "GenericError: Invalid parameter type for 'value', expected: integer"


def test_actual_is_what_the_driver_says(bench: Bench) -> None:
    bench.drive()
    assert bench.command("query-balloon") == {"actual": RAM_BYTES}
    bench.device.write_config(offset_of("actual"), 4, 64 * MIB // PAGE)
    assert bench.command("query-balloon") == {"actual": RAM_BYTES - 64 * MIB}
    bench.await_event("BALLOON_CHANGE", {"actual": RAM_BYTES - 64 * MIB})
    assert bench.config() == Config(actual=64 * MIB // PAGE)


def test_more_than_there_is(bench: Bench) -> None:
    """QEMU's subtracts it all the same and tells a size below zero, or, unsigned, one beyond everything."""
    bench.drive()
    bench.device.write_config(offset_of("actual"), 4, 0xFFFF_FFFF)
    actual = bench.command("query-balloon")["actual"]
    assert actual == (0 if bench.ours else RAM_BYTES - 0xFFFF_FFFF * PAGE)


def test_a_stale_target_written_back_changes_nothing(bench: Bench) -> None:
    """QEMU hands every write on with all 16 bytes as it last read them."""
    bench.drive()
    bench.command("balloon", {"value": 64 * MIB})
    assert bench.config().num_pages == 192 * MIB // PAGE
    bench.command("balloon", {"value": 128 * MIB})
    bench.device.write_config(offset_of("actual"), 4, 1)
    assert bench.config() == Config(num_pages=128 * MIB // PAGE, actual=1)


@pytest.mark.parametrize("how", ["reset", "system_reset", "stop"])
def test_the_target_is_kept(bench: Bench, how: str) -> None:
    bench.drive()
    bench.command("balloon", {"value": 64 * MIB})
    if how == "reset":
        bench.device.reset()
    elif how == "system_reset":
        bench.system_reset()
    else:
        bench.qmp("stop")
        bench.qmp("cont")
    if how != "stop":
        assert not bench.device.status & Status.DRIVER_OK
        bench.drive()
    assert bench.config().num_pages == 192 * MIB // PAGE


def test_a_target_set_before_the_driver_is_up(bench: Bench) -> None:
    assert bench.command("balloon", {"value": 64 * MIB}) == {}
    bench.drive()
    assert bench.config().num_pages == 192 * MIB // PAGE


def test_a_target_set_in_a_pause_is_told_after_it(bench: Bench) -> None:
    bench.drive()
    bench.device.take_isr()
    bench.qmp("stop")
    bench.command("balloon", {"value": 64 * MIB})
    bench.qmp("cont")
    is_told(bench)
    assert bench.config().num_pages == 192 * MIB // PAGE


def test_pages_that_move(bench: Bench) -> None:
    """Balloon compaction (virtballoon_migratepage, Linux 6.12): one page in, another out, the target as it was."""
    bench.drive()
    bench.fill(FREE, 4 * PAGE)
    bench.send_pages(Role.INFLATE, [FREE])
    before = bench.footprint()
    assert bench.send_pages(Role.INFLATE, [FREE + 2 * PAGE]) == 0
    assert bench.send_pages(Role.DEFLATE, [FREE]) == 0
    assert before - bench.footprint() == PAGE
    bench.fill(FREE, PAGE)
    assert bench.send_pages(Role.INFLATE, [FREE + 3 * PAGE]) == 0
    assert bench.holds(FREE, 2 * PAGE)
    assert bench.holds(FREE + 2 * PAGE, 2 * PAGE, 0)


def test_targets_at_any_moment_of_a_stop(ours: Bench) -> None:
    """QEMU dies of a config change that its main loop takes after the device was stopped: none may be on its way then."""
    ours.drive()
    for number in range(100):
        # Ten of them are under way while QEMU stops and goes on, and none waits for the other.
        arguments = [{"value": (100 + (number + each) % 2) * MIB} for each in range(10)]
        targets = ours.begin_all("balloon", arguments)
        ours.qmp("stop")
        ours.qmp("cont")
        assert ours.finish(targets) == [{}] * 10
    ours.device.take_isr()
    ours.command("balloon", {"value": 50 * MIB})
    is_told(ours)
    assert ours.config().num_pages == (RAM_BYTES - 50 * MIB) // PAGE
