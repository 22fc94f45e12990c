"""The lab's view of the device: its counters by name, and what is said when it ends early."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from balloonlab.device import Counters, DeviceProcess, parse_counters
from hostdev.metrics import Metrics
from hostdev.wire.balloon import Feature


def test_the_lab_reads_the_samples_that_the_device_writes() -> None:
    metrics = Metrics()
    metrics.add("released_bytes_total", 4096, "report", "remove")
    metrics.add("released_bytes_total", 8192, "inflate", "remove")
    metrics.add("withheld_bytes_total", 512, "report", "unaligned")
    metrics.add("chains_total", 3, "reporting")
    metrics.add("chains_total", 5, "stats")
    metrics.add("buffers_total", 96, "reporting")
    accepted = Feature.REPORTING | Feature.STATS_VQ | Feature.VERSION_1
    metrics.gauges["negotiated_features"] = accepted
    counters = parse_counters(metrics.exposition())
    assert counters.released_bytes == 4096 + 8192
    assert counters.named_bytes == 4096 + 8192 + 512
    assert (counters.reports, counters.buffers) == (3, 96)
    assert counters.features == accepted


def test_no_counters_count_nothing() -> None:
    assert parse_counters("") == Counters()
    assert (Counters().released_bytes, Counters().reports, Counters().features) == (0, 0, Feature(0))


def test_text_of_other_programs_is_passed_over() -> None:
    text = "# HELP x y\nup 1\nvhost_user_balloon_chains_total no\nnode_load1 0.1\n"
    with pytest.raises(ValueError, match="no"):
        parse_counters(text)
    assert parse_counters("# HELP x y\nup 1\nnode_load1 0.1\n") == Counters()


def test_a_device_that_refuses_to_start_is_quoted(tmp_path: Path) -> None:
    device = DeviceProcess(tmp_path, discard="auto", features="-no_such_feature")

    async def main() -> None:
        with device.start():
            await device.close()

    asyncio.run(main())
    assert device.returncode == 2
    assert re.search(r"ended with status 2; .*\n.*--features '-no_such_feature'", str(device.error()))
    assert [path.name for path in tmp_path.iterdir()] == ["device.log"]


def test_the_device_ends_with_its_connection(tmp_path: Path) -> None:
    device = DeviceProcess(tmp_path, discard="none")

    async def main() -> list[int]:
        with device.start():
            pids = device.pids()
        await device.close()
        return pids

    pids = asyncio.run(main())
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert "--discard=none" in device.argv(3)
    assert [path.name for path in tmp_path.iterdir()] == ["device.log"]


def test_another_program_gets_the_same_options(tmp_path: Path) -> None:
    usual = DeviceProcess(tmp_path, discard="auto", trace=True).argv(3)
    other = DeviceProcess(tmp_path, discard="auto", trace=True, program=("-m", "other")).argv(3)
    assert other == [usual[0], "-m", "other", *usual[3:]]
    assert f"--trace={tmp_path / 'device.trace'}" in other


def test_closing_what_was_never_started_is_nothing(tmp_path: Path) -> None:
    device = DeviceProcess(tmp_path, discard="auto")
    asyncio.run(device.close())
    assert device.returncode is None
    assert list(tmp_path.iterdir()) == []
