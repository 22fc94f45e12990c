"""All of guest memory holds a pattern; afterwards every byte of it is looked at.

Random and hostile chains on all five rings go through the real device, which gives memory back for real. Then:
1. Every page that a valid chain names in whole is a hole. Every other byte of the file is as it was: of pages that were named
   in part or not at all, of what lies between two regions in the file, of what only a refused chain names.
2. Where the kernel says that there are holes (SEEK_DATA, SEEK_HOLE), there are these and no others.
3. The device's own trace, read by balloonlab's decoder, names the same pages.
Pages that the driver writes to meanwhile hold what it wrote. All is written anew from time to time, or all would be holes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from balloonlab.decode import read_trace
from hostdev.driver import DEADLINE, USER_BASE, GuestMemory
from hostdev.fds import Fd
from hostdev.frontend import Frontend, start_device
from hostdev.options import Options
from hostdev.trace import TraceFile, Tracer
from hostdev.wire.balloon import Role
from hostdev.wire.trace import Kind
from hostdev.wire.vhost_user import MemoryRegion
from tests.hostile_driver import RINGS_AT, RINGS_SIZE, SIZE, HostileDriver
from tests.in_process import MIB, PAGE, InProcess

pytestmark = pytest.mark.usefixtures("patience")

FILE = 64 * MIB
RINGS_OFFSET = 62 * MIB
# Two that touch, in the file the other way round and at an odd page; one above 4 GiB. The file has more than the regions.
NAMEABLE = (
    MemoryRegion(0, 20 * MIB, USER_BASE, 24 * MIB),
    MemoryRegion(20 * MIB, 8 * MIB + PAGE, USER_BASE + 256 * MIB, 3 * MIB + PAGE),
    MemoryRegion(1 << 32, 16 * MIB, USER_BASE + 512 * MIB, 45 * MIB),
)
REGIONS = (MemoryRegion(RINGS_AT, RINGS_SIZE, USER_BASE + 1024 * MIB, RINGS_OFFSET), *NAMEABLE)
# Each page its number, over and over: no two are the same, and none is like a hole.
PATTERN = b"".join((page + 1).to_bytes(8, "little") * (PAGE // 8) for page in range(RINGS_OFFSET // PAGE))
BATCH = SIZE // 2 * len(Role)
# After so many batches all of memory is written anew.
ROUND = 25


def file_pages(pages: Iterable[int]) -> set[int]:
    """Numbers of the file's pages that are these of the guest."""
    found = set()
    for page in pages:
        (region,) = (each for each in NAMEABLE if 0 <= page * PAGE - each.guest_address < each.size)
        found.add((page * PAGE - region.guest_address + region.mmap_offset) // PAGE)
    return found


class Oracle:
    """A driver, the file behind its guest's memory, and what must be holes in it by now."""

    def __init__(self, front: Frontend, seed: int) -> None:
        self.front = front
        self.chance = Random(seed)
        self.driver = HostileDriver(front, self.chance, NAMEABLE, rarely=60)
        self.fd = front.memory.fd.fileno()
        self.holes: set[int] = set()
        # What the trace says, with what the driver wrote since.
        self.traced: set[int] = set()
        self.batches = self.released = 0

    def write_all(self) -> None:
        """Write the pattern to all of the file but the rings."""
        os.pwrite(self.fd, PATTERN, 0)
        self.holes.clear()
        self.traced.clear()

    def offer(self) -> set[int]:
        """Offer a batch. Returns the file's pages that must be given back for it."""
        # Of the statistics ring one is held: not the same half of the heads again.
        self.heads = range(SIZE // 2) if self.batches % 2 else range(SIZE // 2, SIZE)
        self.batches += 1
        contents = [self.driver.content(self.heads) for _ in Role]
        self.driver.write(contents)
        pages: set[int] = set()
        for role, content in zip(Role, contents, strict=True):
            pages = pages.union(*self.driver.expected(role, content).pages)
        self.released += len(pages)
        return file_pages(pages)

    def note(self, given: set[int], traced: set[int]) -> None:
        """A batch was served; afterwards the driver writes to some of its pages, as a guest does with free memory."""
        self.holes |= given
        self.traced |= traced
        again = self.chance.sample(sorted(self.holes), len(self.holes) // 4)
        for page in again:
            os.pwrite(self.fd, PATTERN[page * PAGE : (page + 1) * PAGE], page * PAGE)
        self.holes -= set(again)
        self.traced -= set(again)

    def check(self) -> None:
        """Look at every byte."""
        assert self.traced == self.holes
        assert set(holes(self.fd)) == self.holes
        expected = bytearray(PATTERN)
        for page in self.holes:
            expected[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
        assert os.pread(self.fd, RINGS_OFFSET, 0) == expected


def holes(fd: int) -> Iterator[int]:
    """Yield the numbers of the pages before the rings that the kernel says are holes."""
    position = 0
    while position < RINGS_OFFSET:
        hole = min(os.lseek(fd, position, os.SEEK_HOLE), RINGS_OFFSET)
        try:
            position = min(os.lseek(fd, hole, os.SEEK_DATA), RINGS_OFFSET)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole from here on
                raise
            position = RINGS_OFFSET
        assert hole % PAGE == position % PAGE == 0
        yield from range(hole // PAGE, position // PAGE)


def released(path: Path, first: int = 0) -> tuple[set[int], int]:
    """Pages that a trace says were given back, from this record on, as the file has them; and how many records there are."""
    records = list(islice(read_trace(path), first, None))
    pages: set[int] = set()
    for record in records:
        if record.kind is Kind.RELEASE:
            start, end = record.value.address // PAGE, (record.value.address + record.value.length) // PAGE
            pages |= file_pages(range(start, end))
    return pages, first + len(records)


def serve(guest: InProcess, path: Path) -> set[int]:
    """Serve all rings, traced. Returns the pages that the trace names."""
    balloon, trace = guest.balloon, TraceFile(path)
    balloon.trace = balloon.giver._trace = balloon.rings._trace = trace
    for role in Role:
        guest.run(role)
        assert role in balloon.rings.started
    balloon.trace = balloon.giver._trace = balloon.rings._trace = Tracer()
    trace.close()
    pages, _count = released(path)
    os.truncate(path, 0)
    return pages


def run(chains: int, path: Path) -> Oracle:
    with InProcess(GuestMemory(FILE, REGIONS), ring_size=SIZE, rings_at=RINGS_AT) as guest:
        guest.start()
        oracle = Oracle(guest, seed=chains)
        while oracle.batches * BATCH < chains:
            oracle.write_all()
            for _ in range(ROUND):
                given = oracle.offer()
                oracle.note(given, serve(guest, path))
                assert_returned(oracle.driver, oracle.heads)
            oracle.check()
        assert not guest.balloon.inert
    return oracle


def assert_returned(driver: HostileDriver, heads: Sequence[int]) -> None:
    """All of a batch but the held statistics buffer, and with it the one that was held before."""
    for role in Role:
        used = driver.used(role)
        assert role is Role.STATISTICS or sorted(used) == list(heads)


@pytest.fixture
def trace() -> Iterator[Path]:
    """A file in memory: there is a new trace for each batch, and a disk takes its time for each."""
    with Fd(os.memfd_create("trace", os.MFD_CLOEXEC)) as fd:
        yield Path(f"/proc/self/fd/{fd.fileno()}")


@pytest.mark.timeout(600)  # 25 s, and 83 beside much other work
@pytest.mark.usefixtures("quiet")
def test_twenty_thousand_chains(trace: Path) -> None:
    oracle = run(20_000, trace)
    # Or nothing was looked at: several pages for each chain that gives any.
    assert oracle.released > 20_000


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("quiet")
def test_a_million_chains(trace: Path) -> None:
    run(1_000_000, trace)


@pytest.mark.usefixtures("quiet")
def test_through_a_worker(tmp_path: Path) -> None:
    """The same in a process of its own, behind the keeper."""
    options = Options(trace_file=tmp_path / "trace")
    memory = GuestMemory(FILE, REGIONS)
    with (
        start_device(options) as device,
        Frontend(device.connect(), memory=memory, ring_size=SIZE, rings_at=RINGS_AT) as front,
    ):
        front.start()
        oracle, seen = Oracle(front, seed=1), 0
        for _ in range(4):
            oracle.write_all()
            for _ in range(ROUND):
                oracle.holes |= oracle.offer()
                wait_served(front)
            oracle.traced, seen = released(tmp_path / "trace", seen)
            oracle.check()


def wait_served(front: Frontend) -> None:
    """Kick, and wait until all is returned but at most one statistics buffer."""
    for ring in front.rings:
        ring.notify()
    for role, ring in zip(Role, front.rings, strict=True):
        while (ring.next_available - ring.used_index) & 0xFFFF > (role is Role.STATISTICS):
            assert ring.wait_call(DEADLINE)
        ring.take_used()
    # A message is answered after the step that was under way, so what it did is done.
    front.read_config()


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """The log says of each kind of guest error how often there were."""
    caplog.set_level("ERROR", "hostdev")
