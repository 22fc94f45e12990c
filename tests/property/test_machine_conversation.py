"""The vhost-user conversation as a state machine: good and bad messages in any order, against a model of its own.

After each message:
1. It was answered exactly once if it has a reply, or asks for one and REPLY_ACK was negotiated; else not at all. The status
   is what the model says, and so is each reply's content.
2. Features, regions, rings and eventfds are what the model says. What was refused has changed nothing.
3. The descriptors that are open are those of what is in use, and no others.
At any moment a successor goes on by the record, and nothing of this can tell that it did.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hostdev import fds
from hostdev.driver import USER_BASE, GuestMemory
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import CONFIG, CONFIG_SIZE, DEFAULT_FEATURES, QUEUE_COUNT, Config
from hostdev.wire.vhost_user import F_PROTOCOL_FEATURES, ProtocolFeature, Request
from tests.in_process import MIB, PAGE
from tests.steps import count_step
from tests.succeeding import Succeeding

pytestmark = pytest.mark.usefixtures("nothing_is_left_of_others")

OFFERED = int(DEFAULT_FEATURES) | F_PROTOCOL_FEATURES
PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
NONE = ProtocolFeature(0)
SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS
GATES = {
    Request.GET_QUEUE_NUM: ProtocolFeature.MQ,
    Request.SET_BACKEND_REQ_FD: ProtocolFeature.BACKEND_REQ,
    Request.GET_CONFIG: ProtocolFeature.CONFIG,
    Request.SET_CONFIG: ProtocolFeature.CONFIG,
    Request.GET_MAX_MEM_SLOTS: SLOTS,
    Request.ADD_MEM_REG: SLOTS,
    Request.REM_MEM_REG: SLOTS,
}
FILE = 4 * MIB
LOW = wire.MemoryRegion(0, 2 * MIB, USER_BASE, 0)
HIGH = wire.MemoryRegion(2 * MIB, MIB, USER_BASE + 8 * MIB, 3 * MIB)
GOOD = (LOW, HIGH)
BAD = (
    wire.MemoryRegion(4 * MIB, 0, USER_BASE + 32 * MIB, 0),
    wire.MemoryRegion(4 * MIB, FILE, USER_BASE + 32 * MIB, PAGE),
    wire.MemoryRegion(4 * MIB, MIB, USER_BASE + 32 * MIB, 512),
    wire.MemoryRegion(4 * MIB + 1, MIB, USER_BASE + 32 * MIB, 0),
    wire.MemoryRegion(2**64 - PAGE, 2 * PAGE, USER_BASE + 32 * MIB, 0),
)
# In the guest's space it overlaps LOW, in the front end's HIGH.
OVERLAPS = (
    wire.MemoryRegion(MIB, MIB, USER_BASE + 32 * MIB, 0),
    wire.MemoryRegion(16 * MIB, MIB, USER_BASE + 8 * MIB + PAGE, 0),
)
INDICES = st.integers(0, QUEUE_COUNT)
# A ring takes less than a page; where it is, and whether it is aligned.
PLACES = st.sampled_from(["low", "low", "low", "high", "outside", "crooked", "across"])
STARTS = {
    "low": USER_BASE + MIB,
    "high": HIGH.user_address,
    "outside": USER_BASE + 64 * MIB,
    "crooked": USER_BASE + MIB + 1,
    "across": USER_BASE + LOW.size - 16,
}


def _start(index: int, place: str) -> int:
    """The front end's address of a ring."""
    return STARTS[place] + (0 if place == "across" else index * 0x4000)


def _holds(region: wire.MemoryRegion, start: int, length: int) -> bool:
    return region.user_address <= start and start + length <= region.user_address + region.size


@dataclass
class Ring:
    """What the model knows of a ring. place: where SET_VRING_ADDR put it."""

    size: int = 0
    base: int = 0
    place: str | None = None
    enabled: bool = False
    started: bool = False
    kick: bool = False
    call: bool = False
    error: bool = False

    def fits(self, index: int, regions: list[wire.MemoryRegion]) -> bool:
        """True if its size and addresses may be, and each of its parts is in one of these regions."""
        if self.place is None or self.size not in (8, 128) or self.place == "crooked":
            return False
        start = _start(index, self.place)
        parts = (
            (start, 16 * self.size),
            (start + 0x1000, 8 * self.size + 6),
            (start + 0x2000, 2 * self.size + 6),
        )
        return all(any(_holds(region, *part) for region in regions) for part in parts)


@dataclass
class Model:
    """What a front end may expect."""

    features: int = 0
    protocol: ProtocolFeature = NONE
    regions: list[wire.MemoryRegion] = field(default_factory=list)
    rings: list[Ring] = field(default_factory=lambda: [Ring() for _ in range(QUEUE_COUNT)])
    has_channel: bool = False
    config: Config = field(default_factory=Config)

    def may_add(self, region: wire.MemoryRegion) -> bool:
        """True if a region is good, and free of those that there are."""
        return region not in BAD and not any(_overlap(region, each) for each in self.regions)


def _overlap(one: wire.MemoryRegion, other: wire.MemoryRegion) -> bool:
    def meet(first: int, second: int) -> bool:
        return first < second + other.size and second < first + one.size

    return meet(one.guest_address, other.guest_address) or meet(one.user_address, other.user_address)


class Conversation(RuleBasedStateMachine):
    """A front end that does everything in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.before = _open_descriptors()
        self.guest = Succeeding(GuestMemory(FILE))
        self.event = fds.Fd(os.eventfd(0))
        self.others = _open_descriptors() - self.guest.owned()
        self.model = Model()

    def say(
        self, request: Request, value: object, granted: bool, descriptors: list[fds.Fd] | None = None
    ) -> object:
        """Send a message that asks for a reply, and see that the answer is the one due. Returns a reply's value."""
        count_step("conversation")
        gate = GATES.get(request)
        if gate is not None and gate not in self.model.protocol:
            granted = False
        shape = wire.MESSAGES[request]
        acknowledges = ProtocolFeature.REPLY_ACK in self.model.protocol
        self.guest.send_raw(
            wire.message(request, wire.FLAG_NEED_REPLY, shape.payload.encode(value)), descriptors or []
        )
        self.granted = granted
        replies, self.guest._replies = self.guest._replies, []
        if request is Request.SET_PROTOCOL_FEATURES and granted:
            assert isinstance(value, wire.U64)
            acknowledges = bool(value.value & ProtocolFeature.REPLY_ACK)
        assert len(replies) == int(shape.has_reply or acknowledges)
        if not replies:
            return None
        return self._decoded(request, replies[0])

    def _decoded(self, request: Request, reply: bytes) -> object:
        header = wire.HEADER.decode(reply[: wire.HEADER_SIZE])
        assert (header.request, header.flags) == (request, wire.VERSION | wire.FLAG_REPLY)
        assert header.size == len(reply) - wire.HEADER_SIZE
        payload, shape = reply[wire.HEADER_SIZE :], wire.MESSAGES[request]
        if not shape.has_reply:
            assert payload == int(not self.granted).to_bytes(8, "little")
            return None
        layout = wire.U64_PAYLOAD if shape.payload is wire.NOTHING else shape.payload
        return layout.decode(payload)

    # Features

    @rule(
        bits=st.sampled_from(
            [OFFERED, int(DEFAULT_FEATURES), F_PROTOCOL_FEATURES, 0, 1 << 1 | F_PROTOCOL_FEATURES]
        )
    )
    def set_features(self, bits: int) -> None:
        self.say(Request.SET_FEATURES, wire.U64(bits), granted=True)
        self.model.features = bits
        if not bits & F_PROTOCOL_FEATURES:
            for ring in self.model.rings:
                ring.enabled = True

    @rule(bit=st.sampled_from([0, 2, 29, 33, 63]))
    def set_features_never_offered(self, bit: int) -> None:
        self.say(Request.SET_FEATURES, wire.U64(OFFERED | 1 << bit), granted=False)

    @rule(without=st.sampled_from([0, 0, 0, *(int(each) for each in PROTOCOL)]))
    def set_protocol_features(self, without: int) -> None:
        bits = int(PROTOCOL) & ~without
        self.say(Request.SET_PROTOCOL_FEATURES, wire.U64(bits), granted=True)
        self.model.protocol = ProtocolFeature(bits)

    @rule(bit=st.sampled_from([1, 12, 40, 63]))
    def set_protocol_features_never_offered(self, bit: int) -> None:
        self.say(Request.SET_PROTOCOL_FEATURES, wire.U64(int(PROTOCOL) | 1 << bit), granted=False)

    @rule()
    def ask(self) -> None:
        for request, expected in (
            (Request.GET_FEATURES, OFFERED),
            (Request.GET_PROTOCOL_FEATURES, int(PROTOCOL)),
            (Request.GET_QUEUE_NUM, QUEUE_COUNT),
            (Request.GET_MAX_MEM_SLOTS, 32),
        ):
            value = self.say(request, wire.Nothing(), granted=True)
            assert value == wire.U64(expected if self.granted else 0)

    @rule(reset=st.booleans())
    def set_owner(self, reset: bool) -> None:
        self.say(Request.RESET_OWNER if reset else Request.SET_OWNER, wire.Nothing(), granted=True)
        if not reset:
            self.model.regions = []
            for ring in self.model.rings:
                ring.started = ring.enabled = ring.kick = False

    @rule(right=st.booleans())
    def set_backend_channel(self, right: bool) -> None:
        with fds.Fd(os.dup(self.guest._theirs.fileno())) as theirs:
            self.say(Request.SET_BACKEND_REQ_FD, wire.Nothing(), right, [theirs if right else self.event])
        self.model.has_channel |= self.granted

    # Memory

    @rule(region=st.sampled_from(GOOD + GOOD + GOOD + BAD + OVERLAPS))
    def add_region(self, region: wire.MemoryRegion) -> None:
        may = self.model.may_add(region)
        self.say(Request.ADD_MEM_REG, wire.SingleRegion(0, region), may, [self.guest.memory.fd])
        if self.granted:
            self.model.regions.append(region)

    @rule(number=st.integers(0, 5), stray=st.booleans())
    def remove_region(self, number: int, stray: bool) -> None:
        """One of those that are there, mostly."""
        region = [*self.model.regions, *GOOD, *OVERLAPS][number % (len(self.model.regions) + 2)]
        there = region in self.model.regions
        self.say(Request.REM_MEM_REG, wire.SingleRegion(0, region), there, [self.event] if stray else [])
        if self.granted:
            self.model.regions.remove(region)

    @rule(
        regions=st.lists(st.sampled_from(GOOD + GOOD + BAD + OVERLAPS), min_size=1, max_size=3),
        missing=st.booleans(),
    )
    def set_table(self, regions: list[wire.MemoryRegion], missing: bool) -> None:
        wanted = Model()
        for region in regions:
            if wanted.may_add(region):
                wanted.regions.append(region)
        count = len(regions) - (missing and len(regions) > 1)
        may = wanted.regions == regions and count == len(regions)
        table = wire.MemoryTable(len(regions), 0, tuple(regions))
        self.say(Request.SET_MEM_TABLE, table, may, [self.guest.memory.fd] * count)
        if may:
            self.model.regions = regions

    # Rings

    def stopped(self, index: int) -> Ring | None:
        """The ring with this number if there is one, and it may be set up."""
        if index >= QUEUE_COUNT or self.model.rings[index].started:
            return None
        return self.model.rings[index]

    @rule(index=INDICES, size=st.sampled_from([8, 8, 128, 0, 3, 1 << 16]))
    def set_size(self, index: int, size: int) -> None:
        ring = self.stopped(index)
        self.say(Request.SET_VRING_NUM, wire.VringState(index, size), ring is not None)
        if ring is not None:
            ring.size = size

    @rule(index=INDICES, base=st.sampled_from([0, 1, 0xFFFF, 0x10000]))
    def set_base(self, index: int, base: int) -> None:
        ring = self.stopped(index)
        self.say(Request.SET_VRING_BASE, wire.VringState(index, base), ring is not None and base <= 0xFFFF)
        if ring is not None and base <= 0xFFFF:
            ring.base = base

    @rule(index=INDICES, place=PLACES)
    def set_addresses(self, index: int, place: str) -> None:
        ring, start = self.stopped(index), _start(index, place)
        address = wire.VringAddress(index, 0, start, start + 0x1000, start + 0x2000, 0)
        self.say(Request.SET_VRING_ADDR, address, ring is not None)
        if ring is not None:
            ring.place = place

    @initialize(usual=st.booleans())
    def negotiate(self, usual: bool) -> None:
        """What comes first in most conversations."""
        if usual:
            self.set_protocol_features(0)
            self.set_features(OFFERED)

    @rule(
        place=st.sampled_from(["low", "high"]),
        some=st.sets(st.integers(0, QUEUE_COUNT - 1), min_size=1),
        base=st.sampled_from([0, 0, 1, 0xFFFF]),
    )
    def start(self, place: str, some: set[int], base: int) -> None:
        """All that it takes to start some rings, so that there are any."""
        self.set_protocol_features(0)
        self.add_region(LOW if place == "low" else HIGH)
        for index in some:
            self.set_size(index, 8)
            self.set_base(index, base)
            self.set_addresses(index, place)
            self.set_kick(index, "event")
            self.set_call_or_error(index, "event", which=True)
            self.set_enable(index, 1)

    @rule(index=INDICES, how=st.sampled_from(["event", "event", "event", "pipe", "none", "missing"]))
    def set_kick(self, index: int, how: str) -> None:
        may = how == "event" and index < QUEUE_COUNT
        ring = self.model.rings[index] if may else Ring()
        may = may and (ring.started or ring.fits(index, self.model.regions))
        self.say(Request.SET_VRING_KICK, _named(index, how), may, self._descriptors(how))
        if may:
            ring.started = ring.kick = True

    @rule(
        index=INDICES, how=st.sampled_from(["event", "event", "pipe", "none", "missing"]), which=st.booleans()
    )
    def set_call_or_error(self, index: int, how: str, which: bool) -> None:
        may = how in ("event", "none") and index < QUEUE_COUNT
        request = Request.SET_VRING_CALL if which else Request.SET_VRING_ERR
        self.say(request, _named(index, how), may, self._descriptors(how))
        if may:
            setattr(self.model.rings[index], "call" if which else "error", how == "event")

    def _descriptors(self, how: str) -> list[fds.Fd]:
        """Not an eventfd, where one is wanted: the guest's memory."""
        return {"event": [self.event], "pipe": [self.guest.memory.fd]}.get(how, [])

    @rule(index=INDICES, value=st.sampled_from([0, 1, 1, 2]))
    def set_enable(self, index: int, value: int) -> None:
        may = index < QUEUE_COUNT and value <= 1
        self.say(Request.SET_VRING_ENABLE, wire.VringState(index, value), may)
        if may:
            self.model.rings[index].enabled = bool(value)

    @rule(index=INDICES)
    def stop(self, index: int) -> None:
        value = self.say(Request.GET_VRING_BASE, wire.VringState(index, 0), index < QUEUE_COUNT)
        if index >= QUEUE_COUNT:
            assert value == wire.VringState(index, 0)
            return
        ring = self.model.rings[index]
        assert value == wire.VringState(index, ring.base)
        ring.started = ring.kick = False

    @rule(index=st.integers(0, QUEUE_COUNT - 1))
    def serve(self, index: int) -> None:
        """Nothing was offered, as long as the base is where the driver's index is."""
        if self.model.rings[index].base == 0:
            self.guest.run(index)

    # Config space

    @rule(actual=st.integers(0, 3), poison=st.integers(0, 1), pages=st.integers(0, 3))
    def write_config(self, actual: int, poison: int, pages: int) -> None:
        data = CONFIG.encode(Config(pages, actual, 0, poison))
        self.say(Request.SET_CONFIG, wire.ConfigAccess(0, len(data), 0, data), granted=True)
        if self.granted:
            self.model.config = Config(0, actual, 0, poison)

    @rule(offset=st.integers(0, CONFIG_SIZE + 1), size=st.integers(0, CONFIG_SIZE + 1))
    def read_config(self, offset: int, size: int) -> None:
        inside = offset + size <= CONFIG_SIZE
        value = self.say(Request.GET_CONFIG, wire.ConfigAccess(offset, size, 0, bytes(size)), inside)
        data = CONFIG.encode(self.model.config)[offset : offset + size]
        assert isinstance(value, wire.ConfigAccess)
        assert value == (
            wire.ConfigAccess(offset, size, 0, data) if self.granted else wire.ConfigAccess(0, 0, 0, b"")
        )

    # A successor

    @rule()
    def succeed(self) -> None:
        before = self.guest.visible()
        self.guest.succeed()
        assert self.guest.visible() == before

    # What is to be seen

    @invariant()
    def is_what_the_model_says(self) -> None:
        seen, model = self.guest.visible(), self.model
        assert (seen.features, seen.protocol_features) == (model.features, int(model.protocol))
        assert seen.has_channel == model.has_channel
        assert seen.config == model.config
        assert not seen.inert
        regions = sorted(
            (each.guest_address, each.size, each.user_address, each.mmap_offset) for each in model.regions
        )
        assert list(seen.regions) == regions
        for ring, known in zip(seen.rings, model.rings, strict=True):
            assert ring.descriptors == (known.kick, known.call, known.error)
            assert (ring.size, ring.has_addresses) == (known.size, known.place is not None)
            assert (ring.enabled, ring.started, ring.base) == (known.enabled, known.started, known.base)

    @invariant()
    def rings_run_where_memory_holds_them(self) -> None:
        rings = self.guest.balloon.rings
        for index, known in enumerate(self.model.rings):
            fits = known.started and known.fits(index, self.model.regions)
            assert (index in rings.started) <= fits
            assert (index in rings.stranded) <= (known.started and not fits)

    @invariant()
    def no_descriptor_is_lost(self) -> None:
        assert _open_descriptors() == self.others + self.guest.owned()

    def teardown(self) -> None:
        self.guest.close()
        self.event.close()
        assert _open_descriptors() == self.before


def _named(index: int, how: str) -> wire.U64:
    return wire.U64(index | (wire.VRING_NO_FD if how == "none" else 0))


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


Conversation.TestCase.settings = settings(stateful_step_count=50)
# With --full ten times as many examples.
TestConversation = pytest.mark.timeout(600)(Conversation.TestCase)
