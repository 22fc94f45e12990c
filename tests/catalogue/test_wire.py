"""Cases 1 to 15: what arrives on the socket, and how it ends.

Descriptors, of cases 8 and 9, are counted in test_descriptors.py.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import select
import socket
from pathlib import Path

import pytest

from hostdev import balloon, giver
from hostdev.discard import Discarder
from hostdev.driver import DEADLINE, Buffer, FrontendError, GuestMemory
from hostdev.fds import Fd
from hostdev.frontend import PROTOCOL_FEATURES, DeviceProcess, Frontend, start_device
from hostdev.memory import Region
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import CONFIG, DEFAULT_FEATURES, Config, Feature
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, ProtocolFeature, Request
from tests.catalogue.acts import (
    FREE,
    INFLATE,
    PAYLOADS,
    REPORTING,
    eventfd,
    fill,
    is_empty,
    is_filled,
    is_read,
    is_refused,
    offered,
    report,
    say,
    status,
    still_inflates,
    still_serves,
    wait_idle,
)
from tests.device_program import Program, children, descriptors, program, wait_ended, wait_for
from tests.in_process import MIB, PAGE

GET_FEATURES = wire.message(Request.GET_FEATURES, 0, b"")
_U64 = wire.U64_PAYLOAD.encode


def next_is_served(device: Program) -> None:
    with Frontend(device.connect()) as guest:
        guest.start()
        still_serves(guest)


# 1. A header of 0 to 11 bytes, and the end


@pytest.mark.parametrize("size", range(12))
def test_case_01_the_end_within_a_header(size: int) -> None:
    """A clean close: the device that serves one front end ends with 0, as after any other."""
    with start_device() as device:
        with device.connect() as connection:
            connection.sendall(GET_FEATURES[:size])
        assert device.wait() == 0


def test_case_01_the_next_front_end_is_served(listening: Program) -> None:
    for size in range(12):
        with listening.connect() as connection:
            connection.sendall(GET_FEATURES[:size])
    next_is_served(listening)


# 2. A message in pieces


def conversation() -> list[bytes]:
    """Messages that build on each other, each with a reply."""
    config = CONFIG.encode(Config(actual=7, poison_val=9))
    access = wire.CONFIG_ACCESS.encode(wire.ConfigAccess(0, 16, 0, config))
    said = [
        (Request.GET_FEATURES, b""),
        (Request.SET_PROTOCOL_FEATURES, _U64(wire.U64(PROTOCOL_FEATURES))),
        (Request.GET_QUEUE_NUM, b""),
        (Request.SET_CONFIG, access),
        (Request.GET_CONFIG, access),
        (Request.SET_VRING_BASE, wire.VRING_STATE.encode(wire.VringState(1, 5))),
        (Request.GET_VRING_BASE, wire.VRING_STATE.encode(wire.VringState(1, 0))),
        (Request.SET_VRING_BASE, bytes(7)),
        (Request.GET_PROTOCOL_FEATURES, b""),
    ]
    return [wire.message(request, FLAG_NEED_REPLY, payload) for request, payload in said]


def answers(pieces: list[bytes]) -> list[tuple[wire.Header, bytes]]:
    """Say this to a device of its own, each piece only once the one before was read."""
    with start_device() as device, Frontend(device.connect()) as guest:
        for piece in pieces:
            guest.send_raw(piece)
            wait_for(lambda: is_read(guest.connection), "the keeper's reading")
        return [guest.receive() for _ in conversation()]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(places), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(edges) if start < end]


def test_case_02_a_message_in_pieces_is_the_same_message() -> None:
    """Whole, byte by byte, cut at random, and all in one."""
    whole = answers(conversation())
    stream = b"".join(conversation())
    assert whole[4][1] == PAYLOADS[Request.GET_CONFIG][:12] + CONFIG.encode(Config(actual=7, poison_val=9))
    # CVE-2022-2132: a header that is spread over more pieces than were thought of.
    assert answers([bytes([byte]) for byte in stream]) == whole
    assert answers([stream]) == whole
    for seed in range(5):
        places = random.Random(seed).sample(range(len(stream)), 20)
        assert answers(cut(stream, places)) == whole


@pytest.mark.parametrize("at", [1, 11, 12, 13, 19])
def test_case_02_a_descriptor_comes_with_any_piece(guest: Frontend, at: int) -> None:
    message = wire.message(Request.SET_VRING_CALL, FLAG_NEED_REPLY, _U64(wire.U64(REPORTING)))
    with eventfd() as call:
        guest.send_raw(message[:at])
        guest.send_raw(message[at:], [call])
        assert guest.receive()[1] == bytes(8)
        guest.rings[REPORTING].offer([offered(FREE, PAGE)])
        poll = select.poll()
        poll.register(call.fileno(), select.POLLIN)
        assert poll.poll(DEADLINE * 1000)


# 3. A size that no message has


def test_case_03_a_size_beyond_all_messages(listening: Program) -> None:
    """Closed at once, without waiting for so much, and without memory for it."""
    before, at_first = len(descriptors(listening.pid)), peak(listening.pid)
    for size in (wire.MAX_PAYLOAD + 1, 1 << 20, 2**31, 2**32 - 1):
        with listening.connect() as connection:
            connection.sendall(wire.HEADER.encode(wire.Header(Request.SET_FEATURES, wire.VERSION, size)))
            connection.settimeout(DEADLINE)
            assert connection.recv(1) == b""
        wait_idle(listening, before)
    assert peak(listening.pid) - at_first < 16 * MIB
    next_is_served(listening)


def peak(pid: int) -> int:
    """Bytes of address space that a process has had at the most."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmPeak:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmPeak")


# 4. A size that this message does not have


def test_case_04_shorter_and_longer_than_the_type(guest: Frontend) -> None:
    """Refused, exactly so many bytes are taken, and the stream is in step."""
    # CVE-2020-10724: a length that is trusted because it came in the message.
    for request, right in PAYLOADS.items():
        for payload in (right[:-1], right + b"\0", right + bytes(100), b"\xff" * wire.MAX_PAYLOAD):
            if len(payload) != len(right):
                assert is_refused(guest, request, payload), request
        assert guest.request(Request.GET_QUEUE_NUM) == 5
    still_serves(guest)


# 5. Not this protocol


@pytest.mark.parametrize(
    "flags",
    [0, 2, 3, 1 | wire.FLAG_REPLY, *(1 | 1 << bit for bit in (4, 5, 8, 16, 31))],
    ids=hex,
)
def test_case_05_another_version_a_reply_and_reserved_flags(flags: int) -> None:
    """Closed: the bytes that follow mean nothing."""
    # CVE-2025-43859: a parser that let pass what is not allowed, and was out of step from there on.
    with start_device() as device:
        with device.connect() as connection:
            connection.sendall(wire.HEADER.encode(wire.Header(Request.GET_FEATURES, flags, 0)))
            connection.settimeout(DEADLINE)
            assert connection.recv(1) == b""
        assert device.wait() == 0


def test_case_05_the_next_front_end_is_served(listening: Program) -> None:
    with listening.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        connection.settimeout(DEADLINE)
        with contextlib.suppress(ConnectionResetError):  # what it did not read of ours
            assert connection.recv(1) == b""
    next_is_served(listening)


# 6. Requests that are not known


def test_case_06_an_unknown_request(guest: Frontend) -> None:
    """Taken to its end and refused; without NEED_REPLY nothing is said."""
    # CVE-2021-3839: the number of queues in SET_INFLIGHT_FD (32), which is not known here, went past an array.
    # CVE-2019-14835: the length of the log, SET_LOG_BASE (6), which is not either, was believed.
    for number in {*range(48), 255, 256, 2**31, 2**32 - 1} - {*Request}:
        for payload in (b"", b"\xff" * 24, b"\xff" * wire.MAX_PAYLOAD):
            guest.send_raw(wire.message(number, 0, payload))
            assert say(guest, number, payload) == _U64(wire.U64(1))
    still_serves(guest)


# 7. Requests whose feature was not negotiated


@pytest.mark.parametrize(
    "request_",
    [request for request, shape in wire.MESSAGES.items() if shape.gate],
    ids=lambda request: request.name,
)
def test_case_07_a_request_without_its_feature(fresh: Frontend, request_: Request) -> None:
    """Refused, and granted once the feature is there."""
    shape = wire.MESSAGES[request_]
    assert shape.gate is not None
    fresh.request(Request.SET_PROTOCOL_FEATURES, wire.U64(PROTOCOL_FEATURES & ~shape.gate))
    region = wire.SINGLE_REGION.encode(wire.SingleRegion(0, wire.MemoryRegion(0, PAGE, 0, 0)))
    payload = region if request_ in (Request.ADD_MEM_REG, Request.REM_MEM_REG) else PAYLOADS[request_]
    given = [fresh.memory.fd] * shape.descriptors.start
    with Fd(os.dup(fresh._theirs.fileno())) as channel:
        if request_ is Request.SET_BACKEND_REQ_FD:
            given = [channel]
        assert is_refused(fresh, request_, payload, given)
        fresh.request(Request.SET_PROTOCOL_FEATURES, wire.U64(PROTOCOL_FEATURES))
        if request_ is Request.REM_MEM_REG:
            assert say(fresh, Request.ADD_MEM_REG, payload, [fresh.memory.fd]) == bytes(8)
        assert not is_refused(fresh, request_, payload, given)
    if request_ in (Request.ADD_MEM_REG, Request.REM_MEM_REG):
        fresh.request(Request.SET_OWNER)
    fresh.start()
    still_serves(fresh)


def test_case_07_without_reply_ack_nothing_is_acknowledged(fresh: Frontend) -> None:
    without = PROTOCOL_FEATURES & ~ProtocolFeature.REPLY_ACK
    fresh.request(Request.SET_PROTOCOL_FEATURES, wire.U64(without))
    for payload in (bytes(8), bytes(7)):
        fresh.send_raw(wire.message(Request.SET_VRING_ENABLE, FLAG_NEED_REPLY, payload))
    # The next answer is this one's.
    assert fresh.request(Request.GET_QUEUE_NUM) == 5
    fresh.start()
    still_serves(fresh)


# 10. Out of order


def test_case_10_rings_before_the_memory(fresh: Frontend) -> None:
    fresh.negotiate()
    ring = fresh.rings[REPORTING]
    assert fresh.start_ring(ring) == 1
    fresh.resume(first=True)
    still_serves(fresh)


def test_case_10_a_base_before_the_start(fresh: Frontend) -> None:
    fresh.negotiate()
    for ring in fresh.rings:
        assert fresh.request(Request.GET_VRING_BASE, wire.VringState(ring.index, 0)).num == 0
    fresh.resume(first=True)
    still_serves(fresh)


def test_case_10_an_owner_twice(guest: Frontend) -> None:
    """A second session: memory and rings are gone, for its front end names all of them again."""
    guest.request(Request.SET_OWNER, need_reply=True)
    ring = guest.rings[REPORTING]
    ring.notify()
    assert guest.start_ring(ring) == 1
    guest.resume(first=True)
    still_serves(guest)


def test_case_10_features_twice(guest: Frontend) -> None:
    """Those that were set last hold, for the rings that run as well as for those to come."""
    bits = guest.features | wire.F_PROTOCOL_FEATURES
    for features in (bits & ~Feature.PAGE_POISON, bits, bits):
        assert status(guest, Request.SET_FEATURES, wire.U64(features)) == 0
    guest.write_config(Config(poison_val=0xAA))
    fill(guest, FREE, PAGE)
    assert report(guest, offered(FREE, PAGE)) == 0
    assert is_filled(guest, FREE, PAGE)
    guest.write_config(Config())
    still_serves(guest)


def test_case_10_enabled_before_its_addresses(fresh: Frontend) -> None:
    fresh.negotiate()
    fresh.enable()
    fresh.resume(first=True)
    still_serves(fresh)


def test_case_10_a_kick_before_its_addresses(fresh: Frontend) -> None:
    fresh.negotiate()
    fresh.add_memory()
    ring = fresh.rings[REPORTING]
    assert status(fresh, Request.SET_VRING_KICK, wire.U64(ring.index), [ring.kick]) == 1
    fresh.resume()
    still_serves(fresh)


def test_case_10_another_layout_while_the_ring_runs(guest: Frontend) -> None:
    """Refused until GET_VRING_BASE has stopped it: what runs goes on as it was."""
    # CVE-2026-5747: queue registers that were changed after the queue had been activated.
    ring, user = guest.rings[REPORTING], guest.memory.user_address(0)
    address = wire.VringAddress(ring.index, 0, user, user, user, 0)
    assert status(guest, Request.SET_VRING_NUM, wire.VringState(ring.index, 4)) == 1
    assert status(guest, Request.SET_VRING_BASE, wire.VringState(ring.index, 9)) == 1
    assert status(guest, Request.SET_VRING_ADDR, address) == 1
    still_serves(guest)
    assert guest.stop()[REPORTING] == 1


# 11. Features that were never offered


def test_case_11_features_never_offered(guest: Frontend) -> None:
    """Refused, and the old set stays in force: here one without indirect tables."""
    old = DEFAULT_FEATURES & ~Feature.RING_INDIRECT_DESC | wire.F_PROTOCOL_FEATURES
    assert status(guest, Request.SET_FEATURES, wire.U64(old)) == 0
    bases = guest.stop()
    guest.features = DEFAULT_FEATURES & ~Feature.RING_INDIRECT_DESC
    guest.resume(bases=bases)
    for bit in (0, 2, 6, 24, 29, 33, 34, 35, 38, 40, 63):
        assert status(guest, Request.SET_FEATURES, wire.U64(DEFAULT_FEATURES | 1 << bit)) == 1
    fill(guest, FREE, PAGE)
    assert report(guest, offered(FREE, PAGE), indirect=True) == 0
    assert is_filled(guest, FREE, PAGE)
    still_serves(guest)


def test_case_11_protocol_features_never_offered(guest: Frontend) -> None:
    for bit in (1, 2, 4, 6, 8, 12, 16, 17, 40, 63):
        assert status(guest, Request.SET_PROTOCOL_FEATURES, wire.U64(1 << bit)) == 1
    assert guest.request(Request.GET_QUEUE_NUM) == 5
    still_serves(guest)


def test_case_11_what_was_not_negotiated_is_not_done() -> None:
    """Offered is not enough: without REPORTING a ring of reports is a ring without a meaning."""
    with start_device() as device, Frontend(device.connect(), features=Feature.VERSION_1) as guest:
        guest.start()
        fill(guest, FREE, PAGE)
        assert report(guest, offered(FREE, PAGE)) == 0
        assert is_filled(guest, FREE, PAGE)
        still_inflates(guest)


# 12. Config space


BEYOND = [(0, 17), (1, 16), (16, 1), (17, 0), (15, 2), (0, 256), (2**32 - 1, 1), (2**32 - 16, 16), (2**31, 4)]


def test_case_12_config_space_ends(guest: Frontend) -> None:
    """A reply of no length to who reads, a refusal to who writes, and nothing has changed."""
    # CVE-2020-10722: offset and size whose sum wraps.
    for offset, size in BEYOND:
        access = wire.ConfigAccess(offset, size, 0, b"\xff" * size)
        reply = guest.request(Request.GET_CONFIG, access)
        assert (reply.size, reply.data) == (0, b"")
        assert status(guest, Request.SET_CONFIG, access) == 1
    assert guest.read_config() == Config()
    still_serves(guest)


def test_case_12_a_size_that_the_message_does_not_have(guest: Frontend) -> None:
    # CVE-2021-3546: a size beyond what the answer's buffer holds.
    for size in (255, 257, 4000, 2**31, 2**32 - 1):
        payload = (0).to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(4 + 256)
        assert is_refused(guest, Request.GET_CONFIG, payload)
        assert is_refused(guest, Request.SET_CONFIG, payload)
    assert guest.read_config() == Config()
    still_serves(guest)


def test_case_12_no_bytes(guest: Frontend) -> None:
    for offset in (0, 4, 15, 16):
        access = wire.ConfigAccess(offset, 0, 0, b"")
        assert guest.request(Request.GET_CONFIG, access) == access
        assert status(guest, Request.SET_CONFIG, access) == 0
    assert guest.read_config() == Config()
    still_serves(guest)


def test_case_12_a_driver_writes_its_own_fields_alone(guest: Frontend) -> None:
    guest.write_config(Config(num_pages=99, actual=3, free_page_hint_cmd_id=98, poison_val=0))
    assert guest.read_config() == Config(actual=3)
    still_serves(guest)


# 13. A front end that does not read


def test_case_13_a_front_end_that_does_not_read(device: DeviceProcess) -> None:
    """It is not read from either, for as long as it likes, and its guest's rings are served meanwhile.

    There is no deadline after which it is closed: that would end the VM (docs/design.md, rule 5).
    """
    with Frontend(device.connect()) as guest:
        guest.start()
        sent = fill_up(guest.connection)
        for turn in range(20):
            still_serves(guest, FREE + 2 * turn * PAGE)
            still_inflates(guest)
        assert children(device.pid) == device.workers()
        whole, rest = divmod(sent, len(GET_FEATURES))
        answers = {guest.receive() for _ in range(whole)}
        guest.connection.settimeout(DEADLINE)
        guest.connection.sendall(GET_FEATURES[rest:])
        assert guest.receive() in answers
        still_serves(guest)


def fill_up(connection: socket.socket) -> int:
    """Ask until there is no room: the device has a reply that it cannot write, or has not read. Returns the bytes sent."""
    sent = 0
    # A few bytes of buffer are soon full.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    stream = GET_FEATURES * 100
    while poll.poll(300) or is_read(connection):
        with contextlib.suppress(BlockingIOError):
            sent += connection.send(stream[sent % len(GET_FEATURES) :], socket.MSG_DONTWAIT)
    return sent


# 14. A second front end


def test_case_14_a_second_front_end(listening: Program) -> None:
    """Turned away, whatever it says first; the first one is not disturbed."""
    with Frontend(listening.connect()) as guest:
        guest.start()
        worker = listening.worker()
        for _ in range(10):
            with listening.connect() as second:
                second.settimeout(DEADLINE)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    second.sendall(GET_FEATURES)
                with contextlib.suppress(ConnectionResetError):  # what it did not read of ours
                    assert second.recv(1) == b""
        still_serves(guest)
        assert listening.worker() == worker
    next_is_served(listening)


# 15. A front end that goes


def test_case_15_it_goes_in_the_middle_of_a_message(listening: Program) -> None:
    """With descriptors that came with it already."""
    before = len(descriptors(listening.pid))
    for size in (1, 12, 13, 19, 20):
        with Frontend(listening.connect()) as guest:
            guest.start()
            message = wire.message(Request.SET_VRING_CALL, 0, _U64(wire.U64(0)))
            guest.send_raw(message[:size], [guest.rings[0].call])
        wait_idle(listening, before)
    next_is_served(listening)


@pytest.mark.parametrize("what", ["a batch", "a punch"])
def test_case_15_it_goes_while_rings_are_served(tmp_path: Path, what: str) -> None:
    """The slice at hand is finished, the worker ends, and the memory is the kernel's again."""
    memory = GuestMemory(320 * MIB)
    with program(tmp_path / "balloon.sock") as device:
        before = len(descriptors(device.pid))
        with Frontend(device.connect(), memory=memory) as guest:
            guest.start()
            ring = guest.rings[REPORTING]
            with Fd(os.pidfd_open(device.worker())) as worker:
                size, count = (256 * MIB, 1) if what == "a punch" else (PAGE, ring.size)
                fill(guest, 32 * MIB, size * count)
                places = {}
                for number in range(count):
                    places[ring.add([offered(32 * MIB + number * size, size)])] = 32 * MIB + number * size
                ring.notify()
                guest.connection.close()
                wait_ended(worker)
            # However far it came: what was answered has been done, and nothing was done out of turn.
            done = [places.pop(head) for head, _length in ring.take_used()]
            assert all(is_empty(guest, place, size) for place in done)
            assert all(is_filled(guest, place, size) for place in [*places.values()][1:])
        wait_idle(device, before)
        next_is_served(device)
        status, said = device.end()
        assert (status, "Traceback" in said) == (0, False)


SLICE, SLICES = 2 * MIB, 16


def test_case_15_it_goes_in_the_middle_of_a_punch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun is finished to the byte, nothing more is, the chain is not returned, and all of the guest is let go of."""
    begun, is_gone = (
        mmap.mmap(-1, mmap.PAGESIZE),
        mmap.mmap(-1, 1),
    )  # shared with the worker, which opens no file
    release = Discarder.release

    def released(self: Discarder, region: Region, offset: int, length: int) -> None:
        begun[:8] = (offset + length).to_bytes(8, "little")
        release(self, region, offset, length)
        while offset >= start + 4 * SLICE and not is_gone[0]:
            select.poll().poll(1)

    for module in (balloon, giver):
        monkeypatch.setattr(module, "SLICE_BYTES", SLICE)
    monkeypatch.setattr(Discarder, "release", released)
    start, size = 32 * MIB, SLICES * SLICE
    with start_device() as device, Frontend(device.connect(), memory=GuestMemory(96 * MIB)) as guest:
        guest.start()
        held = len(descriptors(device.pid))
        fill(guest, start, size)
        full = guest.memory.footprint()
        guest.rings[REPORTING].offer([offered(start, size)])
        wait_for(lambda: guest.memory.footprint() <= full - 5 * SLICE, "the fifth slice's punch")
        with Fd(os.pidfd_open(*device.workers())) as ended:
            guest.connection.close()
            # The connection and the channel to the worker, which can find its end from then on.
            wait_for(lambda: len(descriptors(device.pid)) <= held - 2, "the keeper's closing")
            is_gone[0] = 1
            wait_ended(ended)
        assert device.wait() == 0
        end = int.from_bytes(begun[:8], "little")
        assert end == start + 5 * SLICE
        assert is_empty(guest, start, end - start)
        assert is_filled(guest, end, start + size - end)
        assert guest.memory.footprint() == full - (end - start)
        assert guest.rings[REPORTING].take_used() == []
        assert holders(guest.memory.fd) == [os.getpid()]


def holders(memory: Fd) -> list[int]:
    """Which of this process and its descendants has a file open or mapped."""
    inode = os.fstat(memory.fileno()).st_ino
    found, pids = [], [os.getpid()]
    for pid in pids:
        pids += children(pid)
        opened = [Path(f"/proc/{pid}/fd/{number}").stat().st_ino for number in descriptors(pid)]
        mapped = [int(line.split()[4]) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        found += [pid] if inode in (*opened, *mapped) else []
    return found


def test_case_15_with_once_it_ends(tmp_path: Path) -> None:
    with program(tmp_path / "balloon.sock", "--once") as device:
        with Frontend(device.connect()) as guest:
            guest.start()
            guest.rings[INFLATE].offer([Buffer(FREE, 4)])
            guest.send_raw(GET_FEATURES[:7])
        assert device.wait()[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_case_15_a_front_end_that_only_shuts_its_side(listening: Program) -> None:
    """No more messages can come: that is its end."""
    with Frontend(listening.connect()) as guest:
        guest.start()
        guest.connection.shutdown(socket.SHUT_WR)
        with pytest.raises((FrontendError, ConnectionError)):
            guest.receive()
    next_is_served(listening)
