"""A hundred guests behind one keeper that was started with few descriptors: what each costs, that none wakes anybody while
it is idle, and that workers that die in turn are replaced without a look at each other's guests.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from balloonlab.process import proportional_bytes
from hostdev.driver import Buffer, GuestMemory
from hostdev.frontend import Frontend
from hostdev.wire.balloon import Role
from tests.device_program import Program, children, descriptors, program, wait_for, works
from tests.in_process import MIB, PAGE
from tests.killing import is_alive, is_idle, waits

Record = Callable[[str, object], None]

GUESTS = 100
FEW = 10
MEMORY = 16 * MIB
DESCRIPTORS = 256
# Of proportional memory. It is 5.3 MiB with Python 3.11, most of it pages that a reference count was written to.
MOST_BYTES = 8 * MIB
# Looks in a row that must see the same. To be looked at wakes nobody.
LOOKS = 20


@dataclass
class Crowd:
    """The keeper and its guests. bytes_at: proportional memory of all its processes by the number of guests."""

    keeper: Program
    paths: list[Path]
    guests: list[Frontend] = field(default_factory=list)
    bytes_at: dict[int, int] = field(default_factory=dict)

    def grow(self, count: int, stack: contextlib.ExitStack) -> None:
        for path in self.paths[len(self.guests) : count]:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(path))
            guest = stack.enter_context(Frontend(connection, memory=GuestMemory(MEMORY)))
            guest.start()
            works(guest)
            self.guests.append(guest)
        wait_for(self.is_idle, "nothing more to do")
        self.bytes_at[count] = sum(proportional_bytes(pid) for pid in self.pids())

    def pids(self) -> list[int]:
        return [self.keeper.pid, *children(self.keeper.pid)]

    def is_idle(self) -> bool:
        workers = children(self.keeper.pid)
        if len(workers) != len(self.guests) or not all(is_idle(pid) for pid in workers):
            return False
        return waits(self.keeper.pid)  # last: no worker has anything for it any more

    def workers(self) -> dict[int, int]:
        """The process that has a guest's memory mapped, by the memory's inode."""
        pids = children(self.keeper.pid)
        return {inode: pid for pid in pids for inode in memory_files(pid)["guest-ram"]}


def memory_of(guest: Frontend) -> int:
    """The inode of its memory."""
    return os.fstat(guest.memory.fd.fileno()).st_ino


def memory_files(pid: int) -> dict[str, set[int]]:
    """Inodes of the memory files that a process has mapped, by what they are."""
    found: dict[str, set[int]] = {"guest-ram": set(), "vhost-user-balloon-record": set()}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for inode, name in re.findall(r" (\d+) +/memfd:([\w-]+)", Path(f"/proc/{pid}/maps").read_text()):
            found[name].add(int(inode))
    return found


def open_memory_files(pid: int) -> set[int]:
    """Inodes of the memory files that a process has open."""
    return {
        os.stat(f"/proc/{pid}/fd/{number}").st_ino  # noqa: PTH116
        for number, name in descriptors(pid).items()
        if name.startswith("/memfd:")
    }


@contextlib.contextmanager
def limited(soft: int) -> Iterator[None]:
    """For what is started meanwhile: so many descriptors, unless it asks for more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    """Guests take 16 descriptors each here, too."""
    folder = tmp_path_factory.mktemp("crowd")
    paths = [folder / f"g{number}.sock" for number in range(GUESTS)]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 25 * GUESTS:
        pytest.skip(f"not run: at most {hard} descriptors a process, {25 * GUESTS} are needed")
    options = [f"--socket-path={path}" for path in paths[1:]]
    with contextlib.ExitStack() as stack:
        with limited(DESCRIPTORS):
            words = (*options, "--log-level=error", "--on-term=now")
            keeper = stack.enter_context(program(paths[0], *words))
        stack.enter_context(limited(25 * GUESTS))
        guests = stack.enter_context(contextlib.ExitStack())
        crowd = Crowd(keeper, paths)
        crowd.grow(FEW, guests)
        crowd.grow(GUESTS, guests)
        yield crowd
        # One after the other: how long it takes all of them on few CPUs is not to matter.
        for number, guest in enumerate(crowd.guests, 1):
            guest.close()
            wait_for(lambda left=GUESTS - number: len(children(keeper.pid)) == left, "a worker's end")  # type: ignore[misc]
        status, _said = keeper.end()
        assert status == 0


def test_more_guests_than_there_were_descriptors(crowd: Crowd) -> None:
    assert len(children(crowd.keeper.pid)) == GUESTS
    assert len(descriptors(crowd.keeper.pid)) > DESCRIPTORS


def test_what_a_further_guest_costs(crowd: Crowd, record_property: Record) -> None:
    further = (crowd.bytes_at[GUESTS] - crowd.bytes_at[FEW]) // (GUESTS - FEW)
    record_property("proportional_bytes_of_ten", crowd.bytes_at[FEW])
    record_property("proportional_bytes_of_a_further_guest", further)
    assert 0 < further < MOST_BYTES


def switches(pids: list[int]) -> dict[int, list[str]]:
    return {
        pid: re.findall(r"ctxt_switches:\t(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in pids
    }


def test_idle_guests_wake_nobody(crowd: Crowd) -> None:
    """While one of them works, a hundred times, the others' workers stay asleep."""
    wait_for(crowd.is_idle, "nothing more to do")
    busy, others = crowd.guests[0], crowd.pids()
    others.remove(crowd.keeper.pid)
    worker = crowd.workers()[memory_of(busy)]
    others.remove(worker)
    before = switches(others)
    for _ in range(LOOKS):
        for _ in range(5):
            works(busy)
        busy.read_config()
        assert switches(others) == before
    wait_for(crowd.is_idle, "nothing more to do")
    everybody = switches(crowd.pids())
    for _ in range(LOOKS):
        assert len(memory_files(worker)["guest-ram"]) == 1
        assert switches(crowd.pids()) == everybody


def test_workers_die_in_turn_while_the_others_report(crowd: Crowd, record_property: Record) -> None:
    """Every chain is answered, and afterwards no worker has anything of a guest that is not its own."""
    free = Buffer(8 * MIB, PAGE, writable=True)
    killed = set()
    workers = crowd.workers()
    for number, victim in enumerate(crowd.guests):
        reporting = [victim, *crowd.guests[(number + 1) % 10 :: 10]]
        pid = workers[memory_of(victim)]
        heads = []
        for guest in reporting:
            guest.memory.write(free.address, b"\xaa" * PAGE)
            heads.append(guest.rings[Role.REPORTING].offer([free]))
            if len(heads) == len(reporting) // 2:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        for guest, head in zip(reporting, heads, strict=True):
            assert guest.rings[Role.REPORTING].wait_used(head) == 0
            assert guest.memory.read(free.address, PAGE) == bytes(PAGE)
    wait_for(crowd.is_idle, "nothing more to do")
    assert not any(is_alive(pid) for pid in killed)
    assert len(killed) == GUESTS
    record_property("workers_killed", len(killed))
    everything: dict[str, set[int]] = {}
    workers = crowd.workers()
    for guest in crowd.guests:
        pid = workers[memory_of(guest)]
        mapped = memory_files(pid)
        assert mapped["guest-ram"] == {memory_of(guest)}
        assert len(mapped["vhost-user-balloon-record"]) == 1
        assert open_memory_files(pid) == mapped["guest-ram"] | mapped["vhost-user-balloon-record"]
        for name, inodes in mapped.items():
            assert not inodes & everything.setdefault(name, set())
            everything[name] |= inodes
