"""A trace and a file of guest RAM, read together: what was released, gone, and touched again."""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from balloonlab.measure.looking import pause
from balloonlab.measure.meter import LOOK_SECONDS, Meter
from balloonlab.measure.ranges import Places
from balloonlab.measure.refault import REFAULT_SECONDS
from hostdev.trace import TraceFile
from hostdev.wire.balloon import Role
from hostdev.wire.trace import Cause
from hostdev.wire.virtqueue import Descriptor
from qmp_glue import ram
from qmp_glue.errors import VmError

RING = 4
# Where the guest sees its RAM, so that an address is no offset.
BASE = 1 << 30
SIZE = 1 << 20
PIECE = 64 << 10


class Host:
    """A device's trace and the memory that it gives back, as a memfd."""

    def __init__(self, folder: Path) -> None:
        self.trace = TraceFile(folder / "trace")
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, SIZE)
        self.memory = mmap.mmap(self.fd, SIZE)
        self.touch(0, SIZE)
        sections = [ram.Section(BASE, SIZE, 0, 0)]
        self.meter = Meter(folder / "trace", [Path(f"/proc/self/fd/{self.fd}")], Places(sections))

    def touch(self, offset: int, length: int) -> None:
        self.memory[offset : offset + length] = b"x" * length

    def report(self, head: int, offset: int, *, frees: bool = True, answers: bool = True) -> None:
        """Take a report of one piece, and give it back."""
        self.trace.chain(RING, Role.REPORTING, head, (Descriptor(BASE + offset, PIECE, 2, 0),))
        self.trace.release(RING, Cause.REPORT, BASE + offset, PIECE, withheld=False)
        if frees:
            self.memory.madvise(mmap.MADV_REMOVE, offset, PIECE)
        if answers:
            self.trace.answer(RING, head)

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)
        self.trace.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.close()


def test_what_is_released_gone_and_touched_again_is_a_refault(host: Host) -> None:
    host.meter.look_now(1.0)
    host.report(1, 0)
    host.report(2, 2 * PIECE)
    host.meter.look_now(2.0)
    assert host.meter.refaults.bytes == 0
    host.touch(0, 4096)
    host.meter.look_now(3.0)
    assert host.meter.refaults.bytes == 4096
    host.touch(2 * PIECE, PIECE)
    host.meter.look_now(2.0 + REFAULT_SECONDS + 0.1)
    assert host.meter.refaults.bytes == 4096
    assert len(host.meter.latencies.seconds) == 2
    assert host.meter.latencies.released_bytes == 2 * PIECE


def test_what_the_kernel_refused_to_free_is_no_refault(host: Host) -> None:
    host.meter.look_now(1.0)
    host.report(1, 0, frees=False)
    for seconds in (2.0, 3.0):
        host.meter.look_now(seconds)
    assert host.meter.refaults.bytes == 0
    assert host.meter.latencies.released_bytes == PIECE


def test_a_release_counts_from_its_answer_on(host: Host) -> None:
    """What is traced may not have happened: it is not looked for before its chain is answered."""
    host.meter.look_now(1.0)
    host.report(1, 0, frees=False, answers=False)
    host.meter.look_now(2.0)
    host.memory.madvise(mmap.MADV_REMOVE, 0, PIECE)
    host.trace.answer(RING, 1)
    host.meter.look_now(3.0)
    host.touch(0, PIECE)
    host.meter.look_now(4.0)
    assert host.meter.refaults.bytes == PIECE


def test_a_ring_that_stopped_answers_nothing_of_before(host: Host) -> None:
    host.meter.look_now(1.0)
    host.report(1, 0, answers=False)
    host.trace.ring(RING, started=False, size=0, base=0)
    host.trace.answer(RING, 1)
    host.meter.look_now(2.0)
    host.touch(0, PIECE)
    host.meter.look_now(3.0)
    assert host.meter.refaults.bytes == 0


def test_what_was_released_before_the_first_look_is_of_any_age(host: Host) -> None:
    host.report(1, 0)
    host.meter.look_now(1.0)
    host.touch(0, PIECE)
    host.meter.look_now(2.0)
    assert host.meter.refaults.bytes == 0
    assert host.meter.latencies.released_bytes == PIECE


def test_a_damaged_trace_is_a_fault_and_memory_is_looked_at_all_the_same(host: Host, tmp_path: Path) -> None:
    host.meter.look_now(1.0)
    (tmp_path / "trace").write_bytes(b"no trace" * 100)
    for seconds in (2.0, 3.0):
        host.meter.look_now(seconds)
    assert host.meter.fault is not None
    assert "is no trace" in host.meter.fault


def test_a_qemu_that_has_ended_ends_it(tmp_path: Path) -> None:
    TraceFile(tmp_path / "trace").close()
    meter = Meter(tmp_path / "trace", [tmp_path / "gone"], Places([]))

    async def main() -> None:
        async with asyncio.timeout(30):
            await meter.run(0.0)
        with pytest.raises(VmError, match="has QEMU ended"):
            await meter.look(1.0)

    asyncio.run(main())


class Slow:
    """A map of memory that takes as long as the test wants."""

    def __init__(self) -> None:
        self.began, self.may_end, self.ended = threading.Event(), threading.Event(), threading.Event()

    def held(self, _path: Path) -> list[tuple[int, int]]:
        self.began.set()
        assert self.may_end.wait(30)
        self.ended.set()
        return []

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.began.wait, 30)


def test_a_slow_look_holds_nothing_up_and_is_waited_for(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    monkeypatch.setattr(ram, "held", slow.held)

    async def main() -> None:
        running = asyncio.create_task(host.meter.run(0.0))
        await slow.begun()  # the loop goes on while it looks
        running.cancel()
        asyncio.get_running_loop().call_later(0.1, slow.may_end.set)
        await asyncio.wait([running])
        assert slow.ended.is_set()
        assert running.cancelled()

    asyncio.run(main())


def test_looks_take_a_small_share_of_the_time() -> None:
    assert pause(0.001, LOOK_SECONDS) == LOOK_SECONDS
    assert pause(0.5, LOOK_SECONDS) == pytest.approx(10.0)
