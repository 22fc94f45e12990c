"""A worker whose rings never run dry answers messages after a bounded number of slices: counted, not timed.

The count is taken in the worker: steps that are done while a message of the keeper waits to be read.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from hostdev.discard import Discarder
from hostdev.driver import Buffer, GuestMemory
from hostdev.frontend import Frontend, start_device
from hostdev.giver import SLICE_BYTES
from hostdev.memory import Region
from hostdev.rings import Step
from hostdev.wire.balloon import Role
from hostdev.wire.vhost_user import Request
from hostdev.worker import Worker
from tests import busy
from tests.in_process import MIB, PAGE

# One that is replaced leaves off in the middle of its count.
pytestmark = pytest.mark.usefixtures("patience")

KICKS = 1_000_000


class Counts:
    """Numbers that a forked worker leaves for the test: of steps and bytes, in all and the most that a message waited for."""

    NAMES = ("steps", "waiting_steps", "most_steps", "waiting_bytes", "most_bytes")

    def __init__(self) -> None:
        self._mapping = mmap.mmap(-1, mmap.PAGESIZE)
        self._words = memoryview(self._mapping).cast("Q")

    def __getitem__(self, name: str) -> int:
        return self._words[self.NAMES.index(name)]

    def __setitem__(self, name: str, value: int) -> None:
        self._words[self.NAMES.index(name)] = value

    def wait(self, kind: str, amount: int) -> None:
        """Add to what the message that waits has waited for."""
        self[f"waiting_{kind}"] += amount
        self[f"most_{kind}"] = max(self[f"most_{kind}"], self[f"waiting_{kind}"])

    def close(self) -> None:
        self._words.release()
        self._mapping.close()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    counts = Counts()
    step, release, serve = Worker._step, Discarder.release, Worker._serve_channel

    def counted_step(worker: Worker, index: int) -> Step:
        counts["steps"] += 1
        if worker._messages.has_message():
            counts.wait("steps", 1)
        return step(worker, index)

    def counted_release(discarder: Discarder, region: Region, offset: int, length: int) -> None:
        if counts["waiting_steps"]:
            counts.wait("bytes", length)
        release(discarder, region, offset, length)

    def counted_message(worker: Worker) -> bool:
        counts["waiting_steps"] = counts["waiting_bytes"] = 0
        return serve(worker)

    monkeypatch.setattr(Worker, "_serve_channel", counted_message)
    monkeypatch.setattr(Worker, "_step", counted_step)
    monkeypatch.setattr(Discarder, "release", counted_release)
    yield counts
    counts.close()


def assert_bounded(counts: Counts) -> None:
    """The message that comes when a turn has begun waits for one step of each ring."""
    assert counts["most_steps"] <= len(Role)
    assert counts["most_bytes"] < len(Role) * 2 * SLICE_BYTES


def test_messages_among_endless_work(counts: Counts) -> None:
    with start_device() as device, Frontend(device.connect(), memory=GuestMemory(busy.MEMORY)) as front:
        front.start()
        busy.fill(front)
        for _ in range(30):
            busy.refill(front)
            before = counts["steps"]
            front.read_config()
            front.enable()
        assert counts["steps"] > before
        bases = front.stop()
        assert set(bases) == set(Role)
    assert counts["most_steps"] > 0
    assert_bounded(counts)


def test_a_message_while_all_of_memory_is_reported(counts: Counts) -> None:
    """4 GiB of which nothing is resident, again and again: the slices are as large as they get."""
    with start_device() as device, Frontend(device.connect(), memory=GuestMemory(4096 * MIB)) as front:
        front.start()
        ring = front.rings[Role.REPORTING]
        for _ in range(100):
            ring.take_used()
            while ring._free:
                ring.add([Buffer(16 * MIB, 4080 * MIB, writable=True)])
            ring.notify()
            front.read_config()
        front.stop()
    assert counts["steps"] > 100
    assert_bounded(counts)


def test_a_storm_of_kicks(counts: Counts) -> None:
    """A million kicks and one chain: it is returned once, and messages are answered in between."""
    with start_device() as device, Frontend(device.connect()) as front:
        front.start()
        ring = front.rings[Role.REPORTING]
        for number in range(KICKS):
            os.eventfd_write(ring.kick.fileno(), 1)
            if number % (KICKS // 10) == 0:
                front.read_config()
        front.request(Request.GET_FEATURES)
        idle = counts["steps"]
        ring.wait_used(ring.offer([Buffer(16 * MIB, PAGE, writable=True)]))
        front.stop()
        assert (ring.used_index, ring.take_used()) == (1, [])
    assert idle < KICKS
    assert_bounded(counts)
