"""A front end against the device's real processes: what reaches the guest's memory, rings and eventfds."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostdev.driver import DEADLINE, Buffer, GuestMemory
from hostdev.fds import Fd
from hostdev.frontend import DeviceProcess, Frontend, start_device
from hostdev.options import Options
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import STATISTIC, Config, Role, Statistic
from hostdev.wire.vhost_user import Request
from tests.in_process import MIB, PAGE

pytestmark = pytest.mark.usefixtures("patience")

FREE, LIST = 0x800000, 0x180000


@pytest.fixture
def device() -> Iterator[DeviceProcess]:
    with start_device() as device:
        yield device


@pytest.fixture
def guest(device: DeviceProcess) -> Iterator[Frontend]:
    with Frontend(device.connect()) as guest:
        guest.start()
        yield guest


def offered(address: int, length: int) -> Buffer:
    return Buffer(address, length, writable=True)


@pytest.mark.parametrize("indirect", [False, True])
def test_reports(guest: Frontend, indirect: bool) -> None:
    ring = guest.rings[Role.REPORTING]
    for _ in range(20):
        guest.memory.write(FREE, b"\xaa" * 2 * MIB)
        held = guest.memory.footprint()
        assert (
            ring.wait_used(ring.offer([offered(FREE, MIB), offered(FREE + MIB, MIB)], indirect=indirect)) == 0
        )
        assert guest.memory.footprint() <= held - 2 * MIB + 4 * PAGE
        assert guest.memory.read(FREE, 2 * MIB) == bytes(2 * MIB)


def test_live_bytes_at_the_edges_survive(guest: Frontend) -> None:
    ring = guest.rings[Role.REPORTING]
    guest.memory.write(FREE, b"\xaa" * 8 * PAGE)
    ring.wait_used(ring.offer([offered(FREE + 1, 8 * PAGE - 2)]))
    image = guest.memory.read(FREE, 8 * PAGE)
    assert image == b"\xaa" * PAGE + bytes(6 * PAGE) + b"\xaa" * PAGE


def test_inflating_in_split_buffers(guest: Frontend) -> None:
    ring = guest.rings[Role.INFLATE]
    guest.memory.write(FREE, b"\xaa" * 4 * PAGE)
    data = struct.pack("<II", FREE // PAGE + 1, FREE // PAGE + 2)
    guest.memory.write(LIST, data[:3])
    guest.memory.write(LIST + 100, data[3:])
    assert ring.wait_used(ring.offer([Buffer(LIST, 3), Buffer(LIST + 100, 5)])) == 0
    assert guest.memory.read(FREE, 4 * PAGE) == b"\xaa" * PAGE + bytes(2 * PAGE) + b"\xaa" * PAGE


def test_many_chains_at_once_come_back_in_order(guest: Frontend) -> None:
    ring = guest.rings[Role.REPORTING]
    guest.memory.write(FREE, b"\xaa" * ring.size * PAGE)
    heads = [ring.add([offered(FREE + n * PAGE, PAGE)]) for n in range(ring.size)]
    ring.notify()
    ring.wait_used(heads[-1])
    assert ring.take_used() == [(head, 0) for head in heads[:-1]]
    assert guest.memory.read(FREE, ring.size * PAGE) == bytes(ring.size * PAGE)


def test_indices_wrap_around(guest: Frontend) -> None:
    ring = guest.rings[Role.REPORTING]
    guest.stop()
    ring.next_available = ring._seen = 0xFFF0
    ring.set_available_index(0xFFF0)
    guest.memory.write(ring.used + 2, struct.pack("<H", 0xFFF0))
    guest.resume(bases={Role.REPORTING: 0xFFF0})
    for _ in range(40):
        assert ring.wait_used(ring.offer([offered(FREE, PAGE)])) == 0
    assert guest.stop()[Role.REPORTING] == (0xFFF0 + 40) & 0xFFFF


def test_spurious_kicks_do_nothing(guest: Frontend) -> None:
    for _ in range(1000):
        guest.rings[Role.REPORTING].notify()
    ring = guest.rings[Role.INFLATE]
    assert ring.wait_used(ring.offer([Buffer(LIST, 4)])) == 0
    assert guest.rings[Role.REPORTING].used_index == 0


def test_work_that_was_offered_before_the_ring_was_enabled(device: DeviceProcess) -> None:
    """Linux queues its statistics buffer before DRIVER_OK, and nobody kicks for it again."""
    with Frontend(device.connect()) as guest:
        guest.negotiate()
        ring = guest.rings[Role.REPORTING]
        head = ring.add([offered(FREE, PAGE)])
        guest.resume(first=True)
        assert ring.wait_used(head) == 0


def test_a_held_statistics_buffer_over_a_stop(guest: Frontend) -> None:
    ring = guest.rings[Role.STATISTICS]
    guest.memory.write(LIST, STATISTIC.encode(Statistic(4, 1)))
    ring.offer([Buffer(LIST, 10)])
    guest.read_config()
    bases = guest.stop()
    assert bases[Role.STATISTICS] == 0
    guest.resume(bases=bases)
    second = ring.offer([Buffer(LIST, 10)])
    ring.wait_used(0)
    assert second == 1
    assert guest.stop()[Role.STATISTICS] == 1


@pytest.mark.parametrize("changed", [False, True])
def test_a_large_report_and_a_stop(changed: bool) -> None:
    """Wherever the stop falls: not answered and offered again, or answered and all of it released."""
    memory = GuestMemory(640 * MIB)
    with start_device() as device, Frontend(device.connect(), memory=memory) as guest:
        guest.start()
        ring = guest.rings[Role.REPORTING]
        block = b"\xaa" * (4 * MIB)
        for number in range(128):
            memory.write((64 + 4 * number) * MIB, block)
        full = memory.footprint()
        assert full > 512 * MIB
        ring.offer([offered((64 + 4 * number) * MIB, 4 * MIB) for number in range(128)])
        guest.write_config(Config(actual=1))
        if changed:
            region = wire.SingleRegion(0, wire.MemoryRegion(1 << 40, PAGE, 1 << 40, 0))
            guest.request(Request.ADD_MEM_REG, region, [GuestMemory(PAGE).fd], need_reply=True)
        bases = guest.stop()
        released = full - memory.footprint()
        assert bases[Role.REPORTING] == ring.used_index
        assert (released > 511 * MIB) == bool(ring.used_index)
        image = memory.read(ring.used, PAGE)
        guest.read_config()
        assert full - memory.footprint() == released
        assert memory.read(ring.used, PAGE) == image
        guest.resume(bases=bases)
        assert ring.wait_used(0) == 0
        assert memory.footprint() < 8 * MIB
        assert guest.stop()[Role.REPORTING] == 1


def test_a_broken_ring_tells_the_front_end(guest: Frontend) -> None:
    """VHOST_USER_SET_VRING_ERR: the descriptor is signalled when an error occurs."""
    ring = guest.rings[Role.REPORTING]
    with Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) as error:
        guest.request(Request.SET_VRING_ERR, wire.U64(Role.REPORTING), [error], need_reply=True)
        ring.set_available_index(ring.size + 1)
        ring.notify()
        poll = select.poll()
        poll.register(error.fileno(), select.POLLIN)
        assert poll.poll(DEADLINE * 1000)
    inflate = guest.rings[Role.INFLATE]
    assert inflate.wait_used(inflate.offer([Buffer(LIST, 4)])) == 0
    assert guest.stop()[Role.REPORTING] == 0


def test_the_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.prom"
    with start_device(Options(metrics_file=path)) as device, Frontend(device.connect()) as guest:
        guest.start()
        ring = guest.rings[Role.REPORTING]
        ring.wait_used(ring.offer([offered(FREE, MIB)]))
    text = path.read_text()
    assert 'released_bytes_total{cause="report",method="remove"} 1048576\n' in text
    assert 'chains_total{queue="reporting"} 1\n' in text
    assert 'messages_total{request="GET_FEATURES"} 2\n' in text
    assert "guest_memory_bytes 0\n" in text  # written last, after the front end had gone
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.prom"]


def test_discard_none_answers_and_releases_nothing() -> None:
    with start_device(Options(discard="none")) as device, Frontend(device.connect()) as guest:
        guest.start()
        guest.memory.write(FREE, b"\xaa" * MIB)
        ring = guest.rings[Role.REPORTING]
        assert ring.wait_used(ring.offer([offered(FREE, MIB)])) == 0
        assert guest.memory.read(FREE, MIB) == b"\xaa" * MIB
