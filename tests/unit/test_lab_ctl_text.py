"""The control socket's answers as lines for people, and what people write as its arguments."""

from __future__ import annotations

from typing import Any

import pytest

from balloonlab import ctl_text
from balloonlab.errors import UsageError
from hostdev.statistics import ABSENT
from hostdev.wire.balloon import STATISTIC_NAMES

MIB = 1 << 20

STATUS: dict[str, Any] = {
    "connected": True,
    "running": True,
    "memory": 1024 * MIB,
    "target": 512 * MIB,
    "actual": 700 * MIB,
    "released": 3 * MIB,
    "inhibited": False,
    "inert": False,
    "poison-value": 0,
    "negotiated": ["STATS_VQ", "REPORTING"],
}


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("512M", {"size": 512 * MIB}),
        ("1.5G", {"size": 1536 * MIB}),
        ("50%", {"percent": 50}),
        ("100 %", {"percent": 100}),
    ],
)
def test_targets(text: str, arguments: dict[str, int]) -> None:
    assert ctl_text.target_arguments(text) == arguments


@pytest.mark.parametrize("text", ["", "%", "0%", "101%", "-5%", "1.5%", "a lot", "5X", "٣%"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="write it like"):
        ctl_text.target_arguments(text)


def test_outcomes() -> None:
    assert "not 512 MiB" in ctl_text.outcome(STATUS, 30.0)
    assert "700 MiB after 30.0 s" in ctl_text.outcome(STATUS, 30.0)
    arrived = STATUS | {"actual": 512 * MIB}
    assert ctl_text.has_arrived(arrived)
    assert ctl_text.outcome(arrived, 1.5) == "the guest has 512 MiB after 1.5 s"
    early = {"connected": True, "running": False}
    assert not ctl_text.has_arrived(early)
    assert "driver is not up" in ctl_text.outcome(early, 1.0)


def test_status() -> None:
    assert ctl_text.status_lines({"connected": False}) == ["no front end is connected: start QEMU"]
    lines = ctl_text.status_lines(STATUS)
    assert "memory     1.0 GiB, target 512 MiB, actual 700 MiB" in lines
    assert lines[-1] == "negotiated STATS_VQ, REPORTING"
    assert len(lines) == 4
    worse = STATUS | {
        "running": False,
        "inhibited": True,
        "inert": True,
        "reason": "why",
        "poison-value": 0xAA,
    }
    text = "\n".join(ctl_text.status_lines(worse))
    for part in ("not up, or it is paused", "until it is allowed again", "any more: why", "0xaa"):
        assert part in text


def test_statistics() -> None:
    stats = dict.fromkeys(STATISTIC_NAMES, ABSENT) | {
        "stat-free-memory": 5 * MIB,
        "stat-major-faults": 2048,
        "stat-swap-out": 4096,
    }
    lines = ctl_text.statistic_lines({"stats": stats, "unknown": [{"tag": 20, "value": 7}]})
    assert [line.split() for line in lines] == [
        ["swap-out", "4.0", "KiB"],
        ["major-faults", "2048"],
        ["free-memory", "5.0", "MiB"],
        ["tag", "20", "7"],
    ]
    line = ctl_text.watch_line({"stats": stats, "last-update": 1_700_000_000})
    assert line.split()[1:] == ["5.0", "MiB", "-", "-", "4.0", "KiB", "2048"]
    assert len(ctl_text.watch_header()) == len(line)


def test_rings_and_regions() -> None:
    stopped = {"index": 3, "started": False}
    assert ctl_text.ring_line(stopped) == "3  not started"
    ring = {
        "index": 4,
        "started": True,
        "role": "reporting",
        "size": 128,
        "next-available": 7,
        "used": 6,
        "outstanding": 1,
        "chains": 6,
        "enabled": False,
    }
    assert ctl_text.ring_line(ring) == (
        "4  reporting       size 128, next 7, used 6, 1 in hand, 6 chains returned, disabled"
    )
    region = {
        "guest-address": 0x100000,
        "size": MIB,
        "backing": "shared memory",
        "footprint": 4096,
        "released-report": 2 * MIB,
        "released-inflate": 0,
        "withheld": 0,
        "method": "remove",
    }
    assert ctl_text.region_line(region) == (
        "    0x100000  1.0 MiB of shared memory, 4.0 KiB held; released 2.0 MiB reported, 0 bytes inflated; "
        "0 bytes withheld (method remove)"
    )


def test_guests() -> None:
    guests: list[dict[str, Any]] = [
        {"name": "vm1", "socket-path": "/run/1", "connected": True, "worker": 4711, "restarts": 0},
        {"name": "another", "socket-path": "/run/2", "connected": True, "worker": 4712, "restarts": 2},
        {"name": "between", "socket-path": "/run/3", "connected": True, "restarts": 1},
        {"name": "", "connected": False, "restarts": 3},
    ]
    assert ctl_text.guest_lines(guests) == [
        "vm1      worker 4711                       /run/1",
        "another  worker 4712, restarts: 2          /run/2",
        "between  between two workers, restarts: 1  /run/3",
        "         no front end                      an inherited socket",
    ]
    (line,) = ctl_text.guest_lines([])
    assert "guest-add" in line


@pytest.mark.parametrize("complete", [True, False])
def test_estimates(complete: bool) -> None:
    answer = {"bytes": 8 * MIB, "blocks": 2, "seconds": 0.254, "complete": complete}
    line = ctl_text.estimate_line(answer)
    assert line.startswith("8.0 MiB in 2 blocks, hinted in 0.25 s")
    assert ("at least that" in line) is not complete
