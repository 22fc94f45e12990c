"""The vhost-user conversation: gates, descriptor counts, order, and the answer to everything that is refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from hostdev.driver import USER_BASE, GuestMemory
from hostdev.errors import StreamError
from hostdev.fds import Fd
from hostdev.frontend import PROTOCOL_FEATURES
from hostdev.memory import MAX_REGIONS
from hostdev.target import Target
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import DEFAULT_FEATURES, Config, Role
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, ProtocolFeature, Request
from tests.in_process import MIB, PAGE, InProcess

GATED = [request for request, shape in wire.MESSAGES.items() if shape.gate]
PAYLOADS: dict[Request, object] = {
    Request.GET_CONFIG: wire.ConfigAccess(0, 16, 0, bytes(16)),
    Request.SET_CONFIG: wire.ConfigAccess(0, 16, 0, bytes(16)),
    Request.ADD_MEM_REG: wire.SingleRegion(0, wire.MemoryRegion(0, PAGE, 0, 0)),
    Request.REM_MEM_REG: wire.SingleRegion(0, wire.MemoryRegion(0, PAGE, 0, 0)),
}


@pytest.fixture
def fresh() -> Iterator[InProcess]:
    """A front end that has said nothing yet."""
    with InProcess(GuestMemory(16 * MIB)) as guest:
        yield guest


@pytest.fixture
def guest(fresh: InProcess) -> InProcess:
    """A front end that has negotiated."""
    fresh.negotiate()
    return fresh


@pytest.fixture
def memfd() -> Iterator[Fd]:
    with Fd(os.memfd_create("ram", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), 4 * MIB)
        yield fd


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def replies(guest: InProcess) -> list[tuple[wire.Header, bytes]]:
    """All replies that were not asked for yet."""
    found = []
    while guest._replies:
        found.append(guest.receive())
    return found


# Gates


@pytest.mark.parametrize("request_", GATED, ids=lambda request: request.name)
def test_requests_need_their_protocol_feature(fresh: InProcess, request_: Request, memfd: Fd) -> None:
    shape = wire.MESSAGES[request_]
    assert shape.gate is not None
    fresh.request(Request.SET_PROTOCOL_FEATURES, wire.U64(PROTOCOL_FEATURES & ~shape.gate))
    ours, theirs = socket.socketpair()
    takes_socket = request_ is Request.SET_BACKEND_REQ_FD
    descriptors = [Fd(theirs.detach()) if takes_socket else memfd] * shape.descriptors.start
    fresh.request(request_, PAYLOADS.get(request_), descriptors, need_reply=True)
    assert fresh.metrics.value("refused_messages_total", request_.name) == 1
    assert not fresh.memory.regions or not fresh.session.memory.regions
    fresh.request(Request.SET_PROTOCOL_FEATURES, wire.U64(PROTOCOL_FEATURES))
    fresh.request(request_, PAYLOADS.get(request_), descriptors, need_reply=True)
    granted = fresh.metrics.value("messages_total", request_.name)
    assert granted == (0 if request_ is Request.REM_MEM_REG else 1)
    ours.close()
    theirs.close()


def test_refused_requests_that_must_answer_do(fresh: InProcess) -> None:
    """QEMU waits for these without a time-out."""
    assert fresh.request(Request.GET_QUEUE_NUM) == 0
    assert fresh.request(Request.GET_MAX_MEM_SLOTS) == 0
    assert fresh.request(Request.GET_CONFIG, PAYLOADS[Request.GET_CONFIG]) == wire.ConfigAccess(0, 0, 0, b"")
    assert fresh.request(Request.GET_VRING_BASE, wire.VringState(77, 0)) == wire.VringState(77, 0)


def test_features_are_offered(guest: InProcess) -> None:
    offered = guest.request(Request.GET_FEATURES)
    assert offered == DEFAULT_FEATURES | 1 << 30
    assert guest.request(Request.GET_PROTOCOL_FEATURES) == int(PROTOCOL_FEATURES)
    assert guest.request(Request.GET_QUEUE_NUM) == 5
    assert guest.request(Request.GET_MAX_MEM_SLOTS) == MAX_REGIONS


@pytest.mark.parametrize("bit", [0, 2, 24, 29, 33, 35, 63])
def test_features_that_were_not_offered_are_refused(guest: InProcess, bit: int) -> None:
    assert guest.status(Request.SET_FEATURES, wire.U64(DEFAULT_FEATURES)) == 0
    assert guest.status(Request.SET_FEATURES, wire.U64(DEFAULT_FEATURES | 1 << bit)) == 1
    assert guest.balloon.features == DEFAULT_FEATURES


@pytest.mark.parametrize("bit", [1, 2, 4, 12, 16, 63])
def test_protocol_features_that_were_not_offered_are_refused(guest: InProcess, bit: int) -> None:
    assert guest.status(Request.SET_PROTOCOL_FEATURES, wire.U64(1 << bit)) == 1
    assert guest.session.protocol_features == PROTOCOL_FEATURES


def test_no_reply_is_sent_without_reply_ack(fresh: InProcess) -> None:
    fresh.request(Request.SET_PROTOCOL_FEATURES, wire.U64(PROTOCOL_FEATURES & ~ProtocolFeature.REPLY_ACK))
    for request in (Request.SET_OWNER, Request.SET_FEATURES, 0x7777):
        fresh.send_raw(wire.message(request, FLAG_NEED_REPLY, b""))
    assert replies(fresh) == []


def test_a_get_request_is_answered_once(guest: InProcess) -> None:
    guest.send_raw(wire.message(Request.GET_FEATURES, FLAG_NEED_REPLY, b""))
    assert len(replies(guest)) == 1


def test_without_protocol_features_rings_begin_enabled(fresh: InProcess) -> None:
    fresh.request(Request.SET_FEATURES, wire.U64(DEFAULT_FEATURES))
    assert all(ring.enabled for ring in fresh.session.rings)


def test_with_protocol_features_rings_begin_disabled(guest: InProcess) -> None:
    guest.request(Request.SET_FEATURES, wire.U64(DEFAULT_FEATURES | 1 << 30))
    assert not any(ring.enabled for ring in guest.session.rings)


# Unknown and malformed


@pytest.mark.parametrize("number", [0, 6, 7, 19, 20, 23, 31, 39, 41, 1000, 2**32 - 1])
def test_unknown_requests(guest: InProcess, number: int) -> None:
    guest.send_raw(wire.message(number, 0, b"payload"))
    assert replies(guest) == []
    guest.send_raw(wire.message(number, FLAG_NEED_REPLY, b""))
    ((header, payload),) = replies(guest)
    assert (header.request, header.flags) == (number, wire.VERSION | wire.FLAG_REPLY)
    assert payload == (1).to_bytes(8, "little")
    assert guest.metrics.value("refused_messages_total", "unknown") == 2


@pytest.mark.parametrize("request_", wire.Request, ids=lambda request: request.name)
def test_payloads_of_another_length(guest: InProcess, request_: Request) -> None:
    """Refused, answered where an answer is due, and the stream goes on."""
    for payload in (b"", bytes(3), bytes(7), bytes(100), bytes(wire.MAX_PAYLOAD)):
        guest.send_raw(wire.message(request_, FLAG_NEED_REPLY, payload))
        assert len(replies(guest)) == 1
    assert guest.metrics.value("refused_messages_total", request_.name) >= 4
    assert guest.request(Request.GET_QUEUE_NUM) == 5


@pytest.mark.parametrize("flags", [0, 2, 3, 1 | 4, 1 | 16, 1 | 1 << 31])
def test_flags_that_show_a_broken_stream(guest: InProcess, flags: int, memfd: Fd) -> None:
    before = open_descriptors()
    with pytest.raises(StreamError):
        guest.send_raw(wire.HEADER.encode(wire.Header(Request.SET_OWNER, flags, 0)), [memfd])
    assert open_descriptors() == before


# Descriptors


@pytest.mark.parametrize("request_", wire.Request, ids=lambda request: request.name)
def test_wrong_numbers_of_descriptors_leak_none(guest: InProcess, request_: Request, memfd: Fd) -> None:
    shape = wire.MESSAGES[request_]
    payload = bytes(shape.payload.declaration.sizeof()) if request_ not in _VARIABLE else _VARIABLE[request_]
    before = open_descriptors()
    for count in (0, 1, 2, 8, 9, 16):
        if count not in shape.descriptors:
            guest.send_raw(wire.message(request_, FLAG_NEED_REPLY, payload), [memfd] * count)
            assert len(replies(guest)) == 1
    assert open_descriptors() == before
    assert guest.metrics.value("refused_messages_total", request_.name) >= 3


_VARIABLE = {
    Request.SET_MEM_TABLE: wire.MEMORY_TABLE.encode(
        wire.MemoryTable(1, 0, (wire.MemoryRegion(0, PAGE, 0, 0),))
    ),
    Request.GET_CONFIG: wire.CONFIG_ACCESS.encode(wire.ConfigAccess(0, 0, 0, b"")),
    Request.SET_CONFIG: wire.CONFIG_ACCESS.encode(wire.ConfigAccess(0, 0, 0, b"")),
}


def test_setters_repeated_keep_the_count_flat(guest: InProcess, memfd: Fd) -> None:
    guest.resume(first=True)
    before = open_descriptors()
    table = wire.MemoryTable(1, 0, guest.memory.regions)
    for _ in range(1000):
        guest.request(Request.SET_VRING_CALL, wire.U64(0), [guest.rings[0].call])
        guest.request(Request.SET_VRING_ERR, wire.U64(0), [guest.rings[0].call])
        guest.request(Request.SET_VRING_KICK, wire.U64(0), [guest.rings[0].kick])
    for _ in range(100):
        guest.request(Request.SET_MEM_TABLE, table, [guest.memory.fd])
        guest.request(Request.SET_VRING_CALL, wire.U64(9), [guest.rings[0].call])
        guest.request(Request.SET_VRING_KICK, wire.U64(0), [memfd])
        guest.request(Request.SET_BACKEND_REQ_FD, None, [memfd])
        with Fd(os.dup(guest._theirs.fileno())) as channel:
            guest.request(Request.SET_BACKEND_REQ_FD, None, [channel])
    assert open_descriptors() == before + 1  # the error descriptor of ring 0, which it did not have


def test_closing_gives_everything_back() -> None:
    before = open_descriptors()
    with InProcess(GuestMemory(16 * MIB)) as guest:
        guest.start()
        guest.request(Request.SET_VRING_ERR, wire.U64(0), [guest.rings[0].call])
    assert open_descriptors() == before


EVENTS = [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]


@pytest.mark.parametrize("request_", EVENTS, ids=lambda request: request.name)
@pytest.mark.parametrize("index", [5, 0xFF, 1 << 9, 1 << 32, 2**64 - 1, 5 | wire.VRING_NO_FD])
def test_rings_that_there_are_not(guest: InProcess, request_: Request, index: int) -> None:
    assert guest.status(request_, wire.U64(index), [guest.rings[0].call]) == 1


@pytest.mark.parametrize("request_", EVENTS, ids=lambda request: request.name)
def test_only_eventfds_are_taken(guest: InProcess, request_: Request, memfd: Fd) -> None:
    guest.resume(first=True)
    reading, writing = os.pipe()
    with Fd(reading) as one, Fd(writing) as other:
        for fd in (memfd, one, other):
            assert guest.status(request_, wire.U64(0), [fd]) == 1
    assert guest.status(request_, wire.U64(0)) == 1
    assert guest.session.rings[0].kick is not None


def test_no_descriptor_takes_the_old_one_away(guest: InProcess) -> None:
    before = open_descriptors()
    assert guest.status(Request.SET_VRING_CALL, wire.U64(wire.VRING_NO_FD)) == 0
    assert open_descriptors() == before - 1
    assert guest.session.rings[0].call is None
    assert guest.status(Request.SET_VRING_KICK, wire.U64(wire.VRING_NO_FD)) == 1


def test_one_kick_for_two_rings(guest: InProcess) -> None:
    guest.resume(first=True)
    for index in range(5):
        assert guest.status(Request.SET_VRING_KICK, wire.U64(index), [guest.rings[0].kick]) == 0


# Order


STATES = [Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE, Request.GET_VRING_BASE]


@pytest.mark.parametrize("request_", STATES, ids=lambda request: request.name)
@pytest.mark.parametrize("index", [5, 256, 2**31, 2**32 - 1])
def test_states_of_rings_that_there_are_not(guest: InProcess, request_: Request, index: int) -> None:
    guest.request(request_, wire.VringState(index, 1), need_reply=True)
    assert guest.metrics.value("refused_messages_total", request_.name) == 1


def test_a_ring_is_started_before_anything_else_of_it(guest: InProcess) -> None:
    assert guest.status(Request.SET_VRING_KICK, wire.U64(0), [guest.rings[0].kick]) == 1
    assert guest.start_ring(guest.rings[0]) == 1  # no memory yet
    guest.add_memory()
    assert guest.start_ring(guest.rings[0]) == 0


def test_a_running_ring_cannot_be_changed(guest: InProcess) -> None:
    guest.resume(first=True)
    address = wire.VringAddress(0, 0, USER_BASE, USER_BASE, USER_BASE, 0)
    assert guest.status(Request.SET_VRING_NUM, wire.VringState(0, 64)) == 1
    assert guest.status(Request.SET_VRING_BASE, wire.VringState(0, 9)) == 1
    assert guest.status(Request.SET_VRING_ADDR, address) == 1
    guest.stop()
    assert guest.status(Request.SET_VRING_NUM, wire.VringState(0, 64)) == 0
    assert guest.status(Request.SET_VRING_BASE, wire.VringState(0, 9)) == 0
    assert guest.status(Request.SET_VRING_ADDR, address) == 0


def test_bases(guest: InProcess) -> None:
    assert guest.request(Request.GET_VRING_BASE, wire.VringState(0, 0)) == wire.VringState(0, 0)
    assert guest.status(Request.SET_VRING_BASE, wire.VringState(0, 0xFFFF)) == 0
    assert guest.request(Request.GET_VRING_BASE, wire.VringState(0, 0)) == wire.VringState(0, 0xFFFF)
    assert guest.status(Request.SET_VRING_BASE, wire.VringState(0, 0x10000)) == 1
    assert guest.request(Request.GET_VRING_BASE, wire.VringState(0, 0)) == wire.VringState(0, 0xFFFF)


def test_enable_is_zero_or_one(guest: InProcess) -> None:
    assert guest.status(Request.SET_VRING_ENABLE, wire.VringState(0, 1)) == 0
    assert guest.status(Request.SET_VRING_ENABLE, wire.VringState(0, 2)) == 1
    assert guest.session.rings[0].enabled


@pytest.mark.parametrize(
    "repeat",
    [
        lambda guest: guest.status(Request.SET_OWNER, None),
        lambda guest: guest.status(Request.RESET_OWNER, None),
        lambda guest: guest.status(Request.SET_FEATURES, wire.U64(DEFAULT_FEATURES)),
        lambda guest: guest.status(Request.SET_VRING_ENABLE, wire.VringState(0, 0)),
    ],
)
def test_twice_is_like_once(guest: InProcess, repeat: Callable[[InProcess], int]) -> None:
    assert [repeat(guest), repeat(guest)] == [0, 0]


# Memory


def test_a_bad_table_leaves_the_old_one(guest: InProcess) -> None:
    guest.resume(first=True)
    before, files = guest.session.memory, open_descriptors()
    good = wire.MemoryRegion(0, MIB, USER_BASE, 0)
    for second in (
        wire.MemoryRegion(0, MIB, 0, 0),
        wire.MemoryRegion(MIB, MIB, USER_BASE, 0),
        wire.MemoryRegion(MIB, 0, 0, 0),
        wire.MemoryRegion(MIB, 17 * MIB, 0, 0),
        wire.MemoryRegion(MIB, MIB, 0, 1),
    ):
        table = wire.MemoryTable(2, 0, (good, second))
        assert guest.status(Request.SET_MEM_TABLE, table, [guest.memory.fd, guest.memory.fd]) == 1
        if second != wire.MemoryRegion(0, MIB, 0, 0):
            assert guest.status(Request.ADD_MEM_REG, wire.SingleRegion(0, second), [guest.memory.fd]) == 1
    assert guest.session.memory is before
    assert open_descriptors() == files


@pytest.mark.parametrize(("regions", "descriptors"), [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1)])
def test_regions_and_descriptors_must_agree(guest: InProcess, regions: int, descriptors: int) -> None:
    each = tuple(wire.MemoryRegion(n * MIB, MIB, n * MIB, 0) for n in range(regions))
    table = wire.MemoryTable(regions, 0, each)
    assert guest.status(Request.SET_MEM_TABLE, table, [guest.memory.fd] * descriptors) == 1


def test_as_many_slots_as_are_advertised(guest: InProcess) -> None:
    for number in range(MAX_REGIONS + 1):
        region = wire.MemoryRegion(number * MIB, PAGE, number * MIB, 0)
        status = guest.status(Request.ADD_MEM_REG, wire.SingleRegion(0, region), [guest.memory.fd])
        assert status == (number == MAX_REGIONS)


def test_removing_regions(guest: InProcess) -> None:
    guest.add_memory()
    known = guest.memory.regions[0]
    other = wire.SingleRegion(0, wire.MemoryRegion(PAGE, PAGE, USER_BASE, 0))
    assert guest.status(Request.REM_MEM_REG, other) == 1
    files = open_descriptors()
    assert guest.status(Request.REM_MEM_REG, wire.SingleRegion(0, known), [guest.memory.fd]) == 0
    assert open_descriptors() == files - 2  # ours and the mapping's
    assert guest.status(Request.REM_MEM_REG, wire.SingleRegion(0, known)) == 1


# Config space


@pytest.mark.parametrize(("offset", "size"), [(0, 16), (0, 4), (4, 4), (12, 4), (15, 1), (0, 0), (16, 0)])
def test_reading_config_space(guest: InProcess, offset: int, size: int) -> None:
    guest.write_config(Config(actual=0x04030201, poison_val=0x08070605))
    image = bytes.fromhex("00000000 01020304 00000000 05060708")
    ask = wire.ConfigAccess(offset, size, 0, bytes(size))
    reply = guest.request(Request.GET_CONFIG, ask)
    assert reply == wire.ConfigAccess(offset, size, 0, image[offset : offset + size])


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 17), (16, 1), (1, 16), (2**32 - 1, 1), (2**32 - 16, 16), (0, 256)]
)
def test_config_space_ends(guest: InProcess, offset: int, size: int) -> None:
    """A read out of range gives size 0, a write is refused: neither changes anything."""
    ask = wire.ConfigAccess(offset, size, 0, b"\xff" * size)
    assert guest.request(Request.GET_CONFIG, ask).size == 0
    assert guest.status(Request.SET_CONFIG, ask) == 1
    assert guest.read_config() == Config()


def test_a_ring_runs_after_all_that(guest: InProcess) -> None:
    guest.resume(first=True)
    assert guest.stop() == dict.fromkeys(Role, 0)


# The back end's own channel, and a second session on the connection


@pytest.mark.parametrize("kind", ["file", "datagram", "eventfd"])
def test_a_channel_that_is_none_is_refused(guest: InProcess, memfd: Fd, kind: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    given = {"file": memfd, "datagram": Fd(theirs.detach()), "eventfd": guest.rings[0].call}[kind]
    before = guest.session.backend_channel
    assert guest.status(Request.SET_BACKEND_REQ_FD, None, [given]) == 1
    assert guest.session.backend_channel is before
    ours.close()


def test_a_second_session_finds_no_memory_and_no_rings(guest: InProcess) -> None:
    """As when QEMU's device is unplugged and another is made on the same chardev."""
    guest.resume(first=True)
    guest.balloon.space.set_target(Target(percent=50), guest.balloon.memory.span())
    guest.negotiate()
    assert guest.session.memory.regions == ()
    assert not guest.balloon.is_running
    guest.resume(first=True)
    assert [ring.started for ring in guest.session.rings] == [True] * 5
    assert guest.read_config().num_pages == 8 * MIB // PAGE
