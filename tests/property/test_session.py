"""Properties of the session, after reliability rule "whatever arrives".

1. Any bytes with any descriptors yield a reply, no reply, or StreamError: never another exception, never a descriptor
   that stays open without an owner.
2. A request that always has a reply, or that asks for one, is answered exactly once; no other request is answered.
3. In any order of sensible and senseless requests: the rings that run are those that the model says, the memory table
   is the last one granted, the base after a stop is the one that counts what was returned, and each report that was
   offered on a running ring is returned exactly once.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hostdev.driver import USER_BASE, Buffer, GuestMemory
from hostdev.errors import StreamError
from hostdev.fds import Fd
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import Role
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, Request
from tests.in_process import MIB, PAGE, InProcess

pytestmark = pytest.mark.usefixtures("nothing_is_left_of_others")

REPLIES = {request for request, shape in wire.MESSAGES.items() if shape.has_reply}
FREE = 0x800000


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def owned_descriptors(guest: InProcess) -> int:
    """What the session holds: two for each region, three at most for each ring, and the back channel."""
    session = guest.session
    rings = sum(fd is not None for ring in session.rings for fd in (ring.kick, ring.call, ring.error))
    return 2 * len(session.memory.regions) + rings + (session.backend_channel is not None)


REQUESTS = st.one_of(st.sampled_from(list(Request)), st.integers(0, 50), st.integers(0, 2**32 - 1))
FLAGS = st.one_of(st.sampled_from([1, 1 | FLAG_NEED_REPLY]), st.integers(0, 63))
SMALL = st.sampled_from([0, 1, 4, 5, 128, PAGE, MIB, USER_BASE, USER_BASE + PAGE])
WORDS = st.one_of(SMALL, st.integers(0, 2**64 - 1)).map(lambda number: number.to_bytes(8, "little"))
PAYLOADS = st.one_of(
    st.binary(max_size=64),
    st.lists(WORDS, max_size=6).map(b"".join),
    st.tuples(st.integers(0, 9), st.lists(WORDS, max_size=36)).map(
        lambda pair: pair[0].to_bytes(8, "little") + b"".join(pair[1])
    ),
)
MESSAGES = st.lists(
    st.tuples(REQUESTS, FLAGS, PAYLOADS, st.lists(st.sampled_from(["ram", "event", "pipe"]), max_size=9)),
    max_size=20,
)


@settings(max_examples=200)
@given(MESSAGES, st.booleans())
def test_whatever_arrives(messages: list[tuple[int, int, bytes, list[str]]], started: bool) -> None:
    with InProcess(GuestMemory(4 * MIB)) as guest, Fd(os.eventfd(0)) as event:
        reading, writing = os.pipe()
        with Fd(reading) as pipe, Fd(writing):
            sources = {"ram": guest.memory.fd, "event": event, "pipe": pipe}
            if started:
                guest.start()
            else:
                guest.negotiate()
            others = open_descriptors() - owned_descriptors(guest)
            for request, flags, payload, kinds in messages:
                header = wire.HEADER.encode(wire.Header(request, flags, len(payload)))
                acknowledges = wire.ProtocolFeature.REPLY_ACK in guest.session.protocol_features
                try:
                    guest.send_raw(header + payload, [sources[kind] for kind in kinds])
                except StreamError:
                    assert flags & ~FLAG_NEED_REPLY != wire.VERSION
                    break
                finally:
                    assert open_descriptors() == others + owned_descriptors(guest)
                _assert_answered(guest, request, flags, acknowledges=acknowledges)
                for index in Role:
                    guest.run(index)


def _assert_answered(guest: InProcess, request: int, flags: int, *, acknowledges: bool) -> None:
    replies = guest._replies[:]
    guest._replies.clear()
    # SET_PROTOCOL_FEATURES itself may turn REPLY_ACK on or off.
    if request == Request.SET_PROTOCOL_FEATURES:
        assert len(replies) <= 1
        return
    asked = bool(flags & FLAG_NEED_REPLY) and acknowledges
    assert len(replies) == int(request in REPLIES or asked)
    for reply in replies:
        header = wire.HEADER.decode(reply[: wire.HEADER_SIZE])
        assert (header.request, header.flags) == (request, wire.VERSION | wire.FLAG_REPLY)
        assert header.size == len(reply) - wire.HEADER_SIZE


class Conversation(RuleBasedStateMachine):
    """A front end that does everything in any order, and a model of what the device then must be."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = InProcess(GuestMemory(16 * MIB), ring_size=8)
        self.guest.negotiate()
        self.guest.request(Request.SET_FEATURES, wire.U64(self.guest.features | wire.F_PROTOCOL_FEATURES))
        self.has_memory = False
        self.running: set[int] = set()
        self.offered: list[int] = []
        self.returned = 0

    indices = st.sampled_from(list(Role))

    @rule()
    def add_memory(self) -> None:
        region = wire.SingleRegion(0, self.guest.memory.regions[0])
        status = self.guest.status(Request.ADD_MEM_REG, region, [self.guest.memory.fd])
        assert status == int(self.has_memory)
        self.has_memory = True

    @rule()
    def set_memory(self) -> None:
        table = wire.MemoryTable(1, 0, self.guest.memory.regions)
        assert self.guest.status(Request.SET_MEM_TABLE, table, [self.guest.memory.fd]) == 0
        self.has_memory = True

    @rule()
    def remove_memory(self) -> None:
        region = wire.SingleRegion(0, self.guest.memory.regions[0])
        assert self.guest.status(Request.REM_MEM_REG, region) == int(not self.has_memory)
        self.has_memory = False

    @rule(index=indices)
    def start_ring(self, index: int) -> None:
        if index in self.running:
            num = wire.VringState(index, 4)
            assert self.guest.status(Request.SET_VRING_NUM, num) == 1
            return
        base = self.returned if index == Role.REPORTING else 0
        status = self.guest.start_ring(self.guest.rings[index], base & 0xFFFF)
        assert status == int(not self.has_memory)
        if status == 0:
            self.running.add(index)

    @rule(index=indices)
    def stop_ring(self, index: int) -> None:
        base = self.guest.request(Request.GET_VRING_BASE, wire.VringState(index, 0)).num
        if index in self.running:
            assert base == (self.returned if index == Role.REPORTING else 0)
        self.running.discard(index)

    @precondition(lambda self: len(self.offered) < 8)
    @rule(page=st.integers(0, 63), pages=st.integers(1, 20), indirect=st.booleans())
    def offer(self, page: int, pages: int, indirect: bool) -> None:
        """A report of pages that the driver fills first, as a guest that had used them."""
        start, length = FREE + page * PAGE, pages * PAGE
        self.guest.memory.write(start, b"\xaa" * length)
        buffer = Buffer(start, length, writable=True)
        self.offered.append(self.guest.rings[Role.REPORTING].add([buffer], indirect=indirect))

    @rule(steps=st.integers(1, 3))
    def serve(self, steps: int) -> None:
        for _ in range(steps):
            self.guest.step(Role.REPORTING)

    @rule(payload=PAYLOADS, request_=st.sampled_from(sorted(set(range(40)) - set(Request))))
    def nonsense(self, payload: bytes, request_: int) -> None:
        self.guest.send_raw(wire.message(request_, FLAG_NEED_REPLY, payload))
        assert self.guest.receive()[1] == (1).to_bytes(8, "little")

    @invariant()
    def returned_once_and_in_order(self) -> None:
        used = self.guest.rings[Role.REPORTING].take_used()
        assert [head for head, _length in used] == self.offered[: len(used)]
        assert {length for _head, length in used} <= {0}
        del self.offered[: len(used)]
        self.returned += len(used)
        assert not used or Role.REPORTING in self.running

    @invariant()
    def rings_are_those_of_the_model(self) -> None:
        assert {index for index, ring in enumerate(self.guest.session.rings) if ring.started} == self.running
        held = self.guest.balloon.rings.started.keys() | self.guest.balloon.rings.stranded.keys()
        assert held == self.running
        assert bool(self.guest.balloon.rings.started) == (self.has_memory and bool(self.running))

    @invariant()
    def released_pages_are_of_the_reports(self) -> None:
        assert all(
            start >= FREE and start + length <= FREE + 83 * PAGE
            for start, length in self.guest.discarder.released
        )
        assert not self.guest.balloon.inert

    def teardown(self) -> None:
        self.guest.close()


Conversation.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestConversation = Conversation.TestCase
