"""Descriptors, mappings and memory of keeper and worker stay flat, whatever is repeated; what gets lost on the way is refused.

What is counted is counted by the kernel, in /proc, after some rounds that let each process settle.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostdev.driver import Buffer
from hostdev.fds import Fd
from hostdev.frontend import PROTOCOL_FEATURES, DeviceProcess, Frontend
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import DEFAULT_FEATURES, Config
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, Request
from tests.catalogue.acts import (
    FREE,
    PAYLOADS,
    REPORTING,
    STATISTICS,
    eventfd,
    is_read,
    is_refused,
    limit_of_files,
    memfd,
    offered,
    status,
    still_serves,
    wait_idle,
)
from tests.device_program import Program, descriptors, program, wait_ended, wait_for
from tests.in_process import MIB, PAGE

KIB = 1 << 10

# Rounds of what is repeated. One descriptor that is lost in all of them shows; of memory, 4000 bytes a round by default (tried;
# less goes where a process has freed some) and 115 in full.
ROUNDS, FULL_ROUNDS = 80, 10_000
SETTLING = 40
# What a process may grow by that has not settled, as it comes to what it has not done yet: 260 KiB were seen.
UNSETTLED = 2 * MIB

_PR_SET_THP_DISABLE, _PR_GET_THP_DISABLE = 41, 42  # linux/prctl.h

# SET_VRING_KICK and the like with a descriptor, on a ring.
_RING = int(STATISTICS)


def slack(rounds: int) -> int:
    """What a process may grow by in so many rounds once it has settled.

    Python's objects move on through an arena of 1 MiB that is there already, and touch it bit by bit: 250 bytes with each
    front end were seen, while neither blocks nor bytes in use became more.
    """
    return 96 * KIB + min(512 * rounds, MIB)


@pytest.fixture(autouse=True)
def small_pages() -> Iterator[None]:
    """No huge page in place of some small ones, which would be 2 MiB at a time of nobody's asking; the device inherits that."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = libc.prctl(_PR_GET_THP_DISABLE, 0, 0, 0, 0)
    assert libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
    yield
    assert libc.prctl(_PR_SET_THP_DISABLE, before, 0, 0, 0) == 0


class Holdings:
    """Open descriptors, mapped files and private memory of processes."""

    def __init__(self, *pids: int) -> None:
        self.counts = [(len(descriptors(pid)), _mapped_files(pid)) for pid in pids]
        self.bytes = [_anonymous(pid) for pid in pids]

    def assert_as(self, before: Holdings, most: int = UNSETTLED) -> None:
        assert self.counts == before.counts
        grown = [now - then for now, then in zip(self.bytes, before.bytes, strict=True)]
        assert max(grown) < most, grown


def _mapped_files(pid: int) -> int:
    """Not the allocator's own, which come and go."""
    return sum(" /" in line for line in _lines(pid, "maps"))


def _lines(pid: int, name: str) -> list[str]:
    return Path(f"/proc/{pid}/{name}").read_text().splitlines()


def _anonymous(pid: int) -> int:
    """Counted page by page, swapped ones too: RssAnon leaves out what a CPU has not added yet, up to 32 pages each or more (6.2)."""
    lines = (line.split() for line in _lines(pid, "smaps_rollup"))
    return sum(int(words[1]) * 1024 for words in lines if words[0] in ("Anonymous:", "Swap:"))


Act = Callable[[Frontend, Fd], int]


def _state(request: Request, index: int, num: int) -> Act:
    return lambda guest, _fd: status(guest, request, wire.VringState(index, num))


def _event(request: Request, value: int, *, good: bool) -> Act:
    def act(guest: Frontend, stranger: Fd) -> int:
        ring = guest.rings[_RING]
        fd = ring.kick if request is Request.SET_VRING_KICK else ring.call
        return status(guest, request, wire.U64(value), [fd if good else stranger])

    return act


def _number(request: Request, value: int) -> Act:
    return lambda guest, _fd: status(guest, request, wire.U64(value))


def _addresses(index: int) -> Act:
    def act(guest: Frontend, _fd: Fd) -> int:
        ring, address = guest.rings[_RING], guest.memory.user_address
        places = address(ring.descriptors), address(ring.used), address(ring.available)
        return status(guest, Request.SET_VRING_ADDR, wire.VringAddress(index, 0, *places, 0))

    return act


def _table(count: int) -> Act:
    def act(guest: Frontend, _fd: Fd) -> int:
        table = wire.MemoryTable(1, 0, guest.memory.regions)
        return status(guest, Request.SET_MEM_TABLE, table, [guest.memory.fd] * count)

    return act


def _region(request: Request, address: int) -> Act:
    def act(guest: Frontend, stranger: Fd) -> int:
        region = wire.SingleRegion(0, wire.MemoryRegion(address, PAGE, address, 0))
        return status(guest, request, region, [stranger])

    return act


def _channel(guest: Frontend, _fd: Fd) -> int:
    with Fd(os.dup(guest._theirs.fileno())) as theirs:
        return status(guest, Request.SET_BACKEND_REQ_FD, None, [theirs])


def _no_channel(guest: Frontend, stranger: Fd) -> int:
    return status(guest, Request.SET_BACKEND_REQ_FD, None, [stranger])


def _config(offset: int) -> Act:
    access = wire.ConfigAccess(offset, 4, 0, b"\x07\0\0\0")
    return lambda guest, _fd: status(guest, Request.SET_CONFIG, access)


def _ask(request: Request) -> Act:
    def act(guest: Frontend, _fd: Fd) -> int:
        access = wire.ConfigAccess(0, 16, 0, bytes(16)) if request is Request.GET_CONFIG else None
        return 0 if guest.request(request, access) else 1

    return act


def _start(guest: Frontend, _fd: Fd) -> int:
    """GET_VRING_BASE, which takes the kick away, and the ring's start, which brings one."""
    guest.request(Request.GET_VRING_BASE, wire.VringState(_RING, 0))
    status = guest.start_ring(guest.rings[_RING])
    guest.request(Request.GET_VRING_BASE, wire.VringState(_RING, 0))
    return status


_FAR = 1 << 40
# Each setter as it is granted (0) and as it is refused (1). Those that a running ring refuses are said of one that stands.
SETTERS: dict[str, tuple[int, Act]] = {
    "SET_FEATURES": (0, _number(Request.SET_FEATURES, DEFAULT_FEATURES | wire.F_PROTOCOL_FEATURES)),
    "SET_FEATURES, never offered": (1, _number(Request.SET_FEATURES, 1 << 63)),
    "SET_PROTOCOL_FEATURES": (0, _number(Request.SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES)),
    "SET_PROTOCOL_FEATURES, never offered": (1, _number(Request.SET_PROTOCOL_FEATURES, 1 << 62)),
    "SET_VRING_NUM": (0, _state(Request.SET_VRING_NUM, _RING, 128)),
    "SET_VRING_NUM, no such ring": (1, _state(Request.SET_VRING_NUM, 99, 128)),
    "SET_VRING_BASE": (0, _state(Request.SET_VRING_BASE, _RING, 0)),
    "SET_VRING_BASE, too large": (1, _state(Request.SET_VRING_BASE, _RING, 1 << 16)),
    "SET_VRING_ADDR": (0, _addresses(_RING)),
    "SET_VRING_ADDR, no such ring": (1, _addresses(99)),
    "SET_VRING_KICK": (0, _start),
    "SET_VRING_KICK, no eventfd": (1, _event(Request.SET_VRING_KICK, _RING, good=False)),
    "SET_VRING_KICK, no such ring": (1, _event(Request.SET_VRING_KICK, 99, good=True)),
    "SET_VRING_CALL": (0, _event(Request.SET_VRING_CALL, _RING, good=True)),
    "SET_VRING_CALL, none": (0, _event(Request.SET_VRING_CALL, _RING | wire.VRING_NO_FD, good=True)),
    "SET_VRING_CALL, no eventfd": (1, _event(Request.SET_VRING_CALL, _RING, good=False)),
    "SET_VRING_ERR": (0, _event(Request.SET_VRING_ERR, _RING, good=True)),
    "SET_VRING_ERR, no such ring": (1, _event(Request.SET_VRING_ERR, 99, good=True)),
    "SET_VRING_ENABLE": (0, _state(Request.SET_VRING_ENABLE, _RING, 1)),
    "SET_VRING_ENABLE, 2": (1, _state(Request.SET_VRING_ENABLE, _RING, 2)),
    "SET_MEM_TABLE": (0, _table(1)),
    "SET_MEM_TABLE, two descriptors for a region": (1, _table(2)),
    "ADD_MEM_REG": (0, _region(Request.ADD_MEM_REG, _FAR)),
    "ADD_MEM_REG, overlapping": (1, _region(Request.ADD_MEM_REG, _FAR)),
    "REM_MEM_REG": (0, _region(Request.REM_MEM_REG, _FAR)),
    "REM_MEM_REG, unknown": (1, _region(Request.REM_MEM_REG, _FAR)),
    "SET_BACKEND_REQ_FD": (0, _channel),
    "SET_BACKEND_REQ_FD, no socket": (1, _no_channel),
    "SET_CONFIG": (0, _config(4)),
    "SET_CONFIG, outside": (1, _config(16)),
    "RESET_OWNER": (0, lambda guest, _fd: status(guest, Request.RESET_OWNER, None)),
    **{request.name: (0, _ask(request)) for request in Request if request.name.startswith("GET_F")},
    **{
        request.name: (0, _ask(request))
        for request in (
            Request.GET_PROTOCOL_FEATURES,
            Request.GET_QUEUE_NUM,
            Request.GET_CONFIG,
            Request.GET_MAX_MEM_SLOTS,
        )
    },
}


@pytest.mark.parametrize(
    "rounds",
    [ROUNDS, pytest.param(FULL_ROUNDS, marks=[pytest.mark.full, pytest.mark.timeout(3600)])],
)
def test_case_09_every_setter_again_and_again(device: DeviceProcess, guest: Frontend, rounds: int) -> None:
    """Granted and refused, a round of all of them at a time; the rings run meanwhile and still do at the end."""
    # CVE-2019-14818: SET_VRING_NUM again allocated again, and descriptors that were not expected stayed open.
    # CVE-2021-3544: state of the device that grows with what is asked of it.
    guest.request(Request.GET_VRING_BASE, wire.VringState(_RING, 0))
    pids = (device.pid, *device.workers())
    with memfd(PAGE) as stranger:
        for turn in range(SETTLING + rounds):
            if turn == SETTLING:
                before = Holdings(*pids)
            for name, (wanted, act) in SETTERS.items():
                assert act(guest, stranger) == wanted, name
        Holdings(*pids).assert_as(before, slack(rounds))
    assert device.workers() == [pids[1]]
    still_serves(guest)


@pytest.mark.parametrize(
    "rounds", [40, pytest.param(FULL_ROUNDS, marks=[pytest.mark.full, pytest.mark.timeout(3600)])]
)
def test_case_09_sessions_without_end_on_one_connection(
    device: DeviceProcess, fresh: Frontend, rounds: int
) -> None:
    """SET_OWNER begins one, and memory and rings go: as when QEMU's device is unplugged and another is made."""
    fresh.start()
    pids = (device.pid, *device.workers())
    assert len(pids) == 2
    for turn in range(1, SETTLING + rounds):
        fresh.start()
        if turn == SETTLING:
            before = Holdings(*pids)
    Holdings(*pids).assert_as(before, slack(rounds))
    still_serves(fresh)


@pytest.mark.parametrize(
    "rounds", [ROUNDS, pytest.param(FULL_ROUNDS, marks=[pytest.mark.full, pytest.mark.timeout(3600)])]
)
def test_case_09_front_ends_without_end(tmp_path: Path, rounds: int) -> None:
    """Each with memory, and one in four goes in the middle of a message: of none is anything left."""
    # Its log would fill the pipe to this process.
    with program(tmp_path / "balloon.sock", "--log-level=error") as device:
        idle = len(descriptors(device.pid))
        for turn in range(SETTLING):
            _come_and_go(device, turn, idle)
        before = Holdings(device.pid)
        for turn in range(rounds):
            _come_and_go(device, turn, idle)
        Holdings(device.pid).assert_as(before, slack(rounds))
        with Frontend(device.connect()) as guest:
            guest.start()
            still_serves(guest)
        assert device.end()[0] == 0


def _come_and_go(device: Program, turn: int, idle: int) -> None:
    with Frontend(device.connect()) as guest:
        guest.request(Request.SET_PROTOCOL_FEATURES, wire.U64(PROTOCOL_FEATURES))
        guest.add_memory()
        if turn % 4 == 0:
            guest.send_raw(b"\1\0\0\0", [guest.memory.fd] * 8)
    wait_idle(device, idle)


# Too few, too many, and such as nobody asked for


@pytest.mark.parametrize(
    "rounds", [10, pytest.param(100, marks=[pytest.mark.full, pytest.mark.timeout(900)])]
)
def test_case_08_wrong_numbers_of_descriptors(device: DeviceProcess, guest: Frontend, rounds: int) -> None:
    """All are closed and the message is refused; of 17 and more the kernel drops some, at the keeper's reception."""
    # CVE-2019-14818: descriptors of messages that take fewer stayed open for ever.
    # CVE-2022-0669: those of messages that take none.
    pids = (device.pid, *device.workers())
    with memfd(PAGE) as stranger:
        before = Holdings(*pids)
        for request, shape in list(wire.MESSAGES.items()) * rounds:
            for count in {0, 1, 2, 8, 9, 16, 17, 40, 253} - {*shape.descriptors}:
                assert is_refused(guest, request, PAYLOADS[request], [stranger] * count), (request, count)
            assert guest.request(Request.GET_QUEUE_NUM) == 5
        Holdings(*pids).assert_as(before)
    still_serves(guest)


def test_case_08_an_unknown_request_with_descriptors(device: DeviceProcess, guest: Frontend) -> None:
    # CVE-2020-10726: GET_INFLIGHT_FD (31) made a descriptor and a mapping each time; it is not known here.
    pids = (device.pid, *device.workers())
    with memfd(PAGE) as stranger:
        before = Holdings(*pids)
        for request in (0, 6, 31, 32, 100, 2**32 - 1):
            for count in (1, 8, 40):
                assert is_refused(guest, request, bytes(24), [stranger] * count)
        Holdings(*pids).assert_as(before)
    still_serves(guest)


# MSG_CTRUNC: the host has no room for them


NEEDING = {
    Request.ADD_MEM_REG: wire.SINGLE_REGION.encode(
        wire.SingleRegion(0, wire.MemoryRegion(_FAR, PAGE, _FAR, 0))
    ),
    Request.SET_VRING_CALL: bytes(8),
    Request.SET_VRING_ERR: bytes(8),
    Request.SET_VRING_KICK: bytes(8),
    Request.SET_BACKEND_REQ_FD: b"",
    # With a descriptor nobody asked for: it is refused for that, lost or not.
    Request.SET_CONFIG: wire.CONFIG_ACCESS.encode(wire.ConfigAccess(4, 4, 0, b"\x07\0\0\0")),
    Request.GET_FEATURES: b"",
}


@pytest.mark.parametrize("whose", ["keeper", "worker"])
def test_case_08_a_process_at_its_limit_of_open_files(
    device: DeviceProcess, guest: Frontend, whose: str
) -> None:
    """The message is refused, nothing has changed, the stream is in step, and QEMU's connection lives."""
    # CVE-2020-10717: a guest drives the host to its limit of open files.
    (worker,) = device.workers()
    pid = device.pid if whose == "keeper" else worker
    before = Holdings(device.pid, worker)
    with limit_of_files(pid, 0):
        for request, payload in NEEDING.items():
            for _ in range(5):
                assert is_refused(guest, request, payload, [guest.rings[0].call])
            assert guest.request(Request.GET_QUEUE_NUM) == 5
        still_serves(guest)
    Holdings(device.pid, worker).assert_as(before)
    assert guest.read_config().actual == 0
    still_serves(guest)


@pytest.mark.parametrize("whose", ["keeper", "worker"])
@pytest.mark.parametrize("left", [0, 1, 3])
def test_case_08_room_for_some_of_them_is_room_for_none(
    device: DeviceProcess, guest: Frontend, left: int, whose: str
) -> None:
    """A memory table of four regions comes with three descriptors at the most: the table before stays in force."""
    (worker,) = device.workers()
    quarter = guest.memory.size // 4
    regions = tuple(
        wire.MemoryRegion(n * quarter, quarter, (1 << 46) + n * quarter, n * quarter) for n in range(4)
    )
    before = Holdings(device.pid, worker)
    with limit_of_files(device.pid if whose == "keeper" else worker, left):
        table = wire.MemoryTable(4, 0, regions)
        assert status(guest, Request.SET_MEM_TABLE, table, [guest.memory.fd] * 4) == 1
        still_serves(guest)
    Holdings(device.pid, worker).assert_as(before)
    still_serves(guest)


def test_case_08_what_is_lost_with_a_first_byte_is_lost_for_the_message(
    device: DeviceProcess, guest: Frontend
) -> None:
    """There is room again when the rest comes, with more descriptors: they are closed as well."""
    pids = (device.pid, *device.workers())
    before = Holdings(*pids)
    message = wire.message(Request.SET_VRING_CALL, FLAG_NEED_REPLY, bytes(8))
    with limit_of_files(device.pid, 0):
        guest.send_raw(message[:5], [guest.memory.fd])
        wait_for(lambda: is_read(guest.connection), "the keeper's reading")
    guest.send_raw(message[5:], [guest.rings[0].call])
    assert guest.receive()[1] == (1).to_bytes(8, "little")
    Holdings(*pids).assert_as(before)
    still_serves(guest)


def test_case_08_what_is_lost_is_lost_for_a_second_worker(device: DeviceProcess, guest: Frontend) -> None:
    """The first one dies with the message: its successor refuses it as well, though it has room."""
    (worker,) = device.workers()
    with Fd(os.pidfd_open(worker)) as ended:
        os.kill(worker, signal.SIGSTOP)
        with limit_of_files(device.pid, 0):
            guest.send_raw(
                wire.message(Request.SET_CONFIG, FLAG_NEED_REPLY, NEEDING[Request.SET_CONFIG]),
                [guest.memory.fd],
            )
            wait_for(lambda: is_read(guest.connection), "the keeper's reading")
        os.kill(worker, signal.SIGKILL)
        wait_ended(ended)
    assert guest.receive()[1] == (1).to_bytes(8, "little")
    assert guest.read_config() == Config()
    assert device.workers() != [worker]
    still_serves(guest)


def test_case_08_a_worker_that_cannot_map_what_it_is_given(device: DeviceProcess, guest: Frontend) -> None:
    """The descriptor comes, and there is none left for the mapping of it: refused."""
    (worker,) = device.workers()
    region = wire.SingleRegion(0, wire.MemoryRegion(_FAR, PAGE, _FAR, 0))
    before = Holdings(device.pid, worker)
    with limit_of_files(worker, 1):
        assert status(guest, Request.ADD_MEM_REG, region, [guest.memory.fd]) == 1
        still_serves(guest)
    Holdings(device.pid, worker).assert_as(before)
    assert status(guest, Request.ADD_MEM_REG, region, [guest.memory.fd]) == 0


def test_case_08_a_worker_that_cannot_watch_the_channel_it_is_given(
    device: DeviceProcess, guest: Frontend
) -> None:
    """Refused; the channel that there was stays, and the device is not inert for it."""
    (worker,) = device.workers()
    before = Holdings(device.pid, worker)
    with limit_of_files(worker, 1), Fd(os.dup(guest._theirs.fileno())) as theirs:
        assert status(guest, Request.SET_BACKEND_REQ_FD, None, [theirs]) == 1
    Holdings(device.pid, worker).assert_as(before)
    guest.write_config(Config(actual=5))
    still_serves(guest)


def test_case_08_a_report_needs_no_descriptor(device: DeviceProcess, guest: Frontend) -> None:
    (worker,) = device.workers()
    ring = guest.rings[REPORTING]
    with limit_of_files(worker, 0), limit_of_files(device.pid, 0):
        for _ in range(20):
            assert ring.wait_used(ring.offer([offered(FREE, PAGE)], indirect=True)) == 0
        pfns = guest.rings[0]
        assert pfns.wait_used(pfns.offer([Buffer(FREE, 4)])) == 0


def test_case_08_eventfds_are_no_descriptors_of_ours(device: DeviceProcess, guest: Frontend) -> None:
    """A front end that closes its end at once, and a thousand times: the device has one for each ring and no more."""
    pids = (device.pid, *device.workers())
    before = Holdings(*pids)
    for _ in range(1000):
        with eventfd() as call:
            assert status(guest, Request.SET_VRING_CALL, wire.U64(_RING), [call]) == 0
    Holdings(*pids).assert_as(before)
    still_serves(guest)
