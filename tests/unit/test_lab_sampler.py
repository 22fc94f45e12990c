"""What belongs together in a sample, and what a guest may not say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from balloonlab.device import Counters
from balloonlab.rig import Rig, Setup
from balloonlab.sampler import FOOTPRINT_SECONDS, Sampler
from guest_images.build import GuestImage
from guest_images.errors import AgentGarbageError
from qmp_glue.find import Qemu

MIB = 1 << 20
IMAGE = GuestImage("own", "6.99", Path("/vmlinux"), Path("/initrd"), pvh=True)


class Host:
    """A machine whose footprint is set by hand, and a guest that answers as it is told."""

    def __init__(self, meminfo: Callable[[], Awaitable[dict[str, int]]]) -> None:
        self.held = 100 * MIB
        self.meminfo = meminfo

    def footprint(self) -> int:
        return self.held

    def counters(self) -> Counters:
        return Counters()


def sampler(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sampler:
    rig = Rig(Setup(Qemu(("qemu",)), IMAGE, 256 * MIB), tmp_path)
    for name in ("vm", "agent", "device"):
        monkeypatch.setattr(rig, name, host, raising=False)
    return Sampler(rig, start=time.monotonic())


def test_a_sample_is_of_the_moment_after_the_guests_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slowly() -> dict[str, int]:
        await asyncio.sleep(1.5 * FOOTPRINT_SECONDS)
        host.held, looking.phase = 50 * MIB, "return"
        return {"MemFree": 70 * MIB}

    host = Host(slowly)
    looking = sampler(host, tmp_path, monkeypatch)
    looking.phase = "fill"
    whole = asyncio.run(looking.look())
    assert (whole.phase, whole.footprint_bytes, whole.guest_memfree_bytes) == ("return", 50 * MIB, 70 * MIB)
    # Meanwhile the footprint was sampled as it was, and each sample is later than the one before.
    before = looking.samples[:-1]
    assert before
    assert {(one.phase, one.footprint_bytes) for one in before} == {("fill", 100 * MIB)}
    times = [one.seconds for one in looking.samples]
    assert times == sorted(times)


@pytest.mark.parametrize("said", [{}, {"MemFree": -1}, {"MemFree": 257 * MIB}, {"MemTotal": MIB}])
def test_a_guest_that_says_what_cannot_be_is_broken(
    said: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer() -> dict[str, int]:
        return said

    with pytest.raises(AgentGarbageError, match=r"MemFree.*broken"):
        asyncio.run(sampler(Host(answer), tmp_path, monkeypatch).look())
