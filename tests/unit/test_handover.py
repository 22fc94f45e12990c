"""What two versions say to each other: written and read back, by versions that know more or less, and cut short."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostdev.errors import RecordError, SetupError, UpgradeError
from hostdev.estate import Estate
from hostdev.fds import Fd
from hostdev.frozen import FrozenGuest, Message
from hostdev.parcels import (
    Contents,
    Line,
    Parcel,
    pack_guest,
    pack_place,
    pack_text,
    unpack_guest,
    unpack_name,
)
from hostdev.record import OWN_HEADER, read_header
from hostdev.takeover import Predecessor
from hostdev.wire import handover as wire
from hostdev.wire import record
from hostdev.wire.handover import Kind, Tag, Use
from hostdev.wire.layout import LayoutError

SECTIONS = st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(max_size=100)), max_size=10)
STRUCTS = [
    (wire.VERSIONS_STRUCT, wire.VersionsState),
    (wire.DESCRIPTOR_STRUCT, wire.DescriptorState),
    (wire.KEEPER_STRUCT, wire.KeeperState),
    (wire.PLACE_STRUCT, wire.PlaceState),
    (wire.GUEST_STRUCT, wire.GuestState),
]


@given(st.sampled_from(Kind), SECTIONS)
def test_what_is_written_is_read_back(kind: Kind, sections: list[tuple[int, bytes]]) -> None:
    assert wire.decode(wire.encode(kind, sections)) == wire.Datagram(kind, tuple(sections))


@given(st.sampled_from(Kind), SECTIONS, st.data())
def test_what_is_cut_short_is_an_error_or_has_fewer_sections(
    kind: Kind, sections: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    """Never a section that was not written."""
    whole = wire.encode(kind, sections)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        found = wire.decode(cut)
    except LayoutError:
        return
    assert found.sections == tuple(sections[: len(found.sections)])
    assert len(found.sections) < len(sections)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_datagram_or_an_error(data: bytes) -> None:
    try:
        found = wire.decode(data)
    except LayoutError:
        return
    assert sum(6 + len(payload) for _tag, payload in found.sections) + 2 == len(data)


@pytest.mark.parametrize(("layout", "state"), STRUCTS)
def test_a_state_has_the_fields_of_its_layout(layout: struct.Struct, state: type[tuple[int, ...]]) -> None:
    count = len(state.__annotations__)
    assert len(layout.unpack(bytes(layout.size))) == count


def test_a_longer_section_is_read_as_far_as_known_and_a_missing_one_is_zero() -> None:
    longer = wire.GUEST_STRUCT.pack(5, 1, 2, 0, 3, 1, 0) + b"more"
    found = wire.decode(wire.encode(Kind.GUEST, [(999, b"unknown"), (Tag.GUEST, longer)]))
    assert found.numbers(Tag.GUEST, wire.GUEST_STRUCT) == (5, 1, 2, 0, 3, 1, 0)
    assert found.numbers(Tag.PLACE, wire.PLACE_STRUCT) == (0, 0, 0)
    shorter = wire.decode(wire.encode(Kind.GUEST, [(Tag.GUEST, longer[:8])]))
    assert shorter.numbers(Tag.GUEST, wire.GUEST_STRUCT) == (5, 0, 0, 0, 0, 0, 0)


# Parcels


@pytest.fixture
def lines() -> Iterator[tuple[Line, Line]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield Line(ours), Line(theirs)


def soon() -> float:
    return time.monotonic() + 5


def eventfd(token: int) -> Fd:
    return Fd(os.eventfd(token), token)


def value(fd: Fd) -> int:
    return os.eventfd_read(fd.fileno())


def test_a_guest_arrives_as_it_was(lines: tuple[Line, Line]) -> None:
    """With each descriptor in its place: an eventfd's count says which it is."""
    ours, theirs = socket.socketpair()
    estate = Estate(held={token: eventfd(token) for token in (256, 257)}, arrived=[eventfd(1280)])
    sent = FrozenGuest(
        ours, estate, 5, Message(5, b"message", 2), b"beg", [Fd(os.eventfd(9))], b"rest", True, "why", 3
    )
    lines[0].send(pack_guest("v\udcff", sent), soon())
    datagram, received = lines[1].receive(soon())
    sent.close()
    found = unpack_guest(datagram, Contents(datagram, received))
    with theirs:
        found.connection.send(b"x")
        assert theirs.recv(1) == b"x"
    assert unpack_name(datagram) == "v\udcff"
    assert (found.number, found.message, found.begun) == (5, Message(5, b"message", 2), b"beg")
    assert (found.outgoing, found.closing, found.why_inert, found.restarts) == (b"rest", True, "why", 3)
    assert {token: value(fd) for token, fd in found.estate.held.items()} == {256: 256, 257: 257}
    assert [(fd.token, value(fd)) for fd in found.estate.arrived] == [(1280, 1280)]
    assert [value(fd) for fd in found.begun_with] == [9]
    assert read_header(found.estate.record).version == record.VERSION
    found.close()


@pytest.mark.parametrize("curtailed", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_what_was_lost_stays_lost(lines: tuple[Line, Line], curtailed: bool, begun: bool) -> None:
    """A message whose descriptors did not all come is refused by the next version too, also if half of it is still to come."""
    ours, theirs = socket.socketpair()
    message = Message(1, b"message", curtailed=curtailed)
    sent = FrozenGuest(ours, Estate(), 1, message, b"beg", begun_curtailed=begun)
    lines[0].send(pack_guest("name", sent), soon())
    datagram, received = lines[1].receive(soon())
    sent.close()
    theirs.close()
    found = unpack_guest(datagram, Contents(datagram, received))
    assert (found.message, found.begun_curtailed) == (message, begun)
    found.close()


def test_the_most_that_a_guest_can_have_goes(lines: tuple[Line, Line]) -> None:
    ours, theirs = socket.socketpair()
    held = {token: eventfd(token) for token in range(1, wire.MAX_DESCRIPTORS - 1)}
    sent = FrozenGuest(ours, Estate(held=held), 1, Message(1, bytes(5000)), bytes(5000), (), bytes(5000))
    lines[0].send(pack_guest("name", sent), soon())
    datagram, received = lines[1].receive(soon())
    sent.close()
    theirs.close()
    assert len(received) == wire.MAX_DESCRIPTORS
    found = unpack_guest(datagram, Contents(datagram, received))
    assert len(found.estate.held) == len(held)
    found.close()


def test_descriptors_that_were_lost_or_are_missing() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        parcel = pack_place("vm1", "/vm1.sock", listener, (1, 2), leaving=False)
    datagram = wire.decode(wire.encode(Kind.PLACE, parcel.sections))
    with pytest.raises(LayoutError, match="0 descriptors where 1"):
        Contents(datagram, [])
    with pytest.raises(LayoutError, match="no descriptor of use connection"):
        Contents(wire.decode(wire.encode(Kind.GUEST)), []).one(Use.CONNECTION)


def test_a_socket_that_is_none_is_closed() -> None:
    with Fd(os.memfd_create("none")) as fd:
        number = os.dup(fd.fileno())
    state = wire.DESCRIPTOR_STRUCT.pack(Use.CONNECTION, 0)
    contents = Contents(wire.Datagram(Kind.GUEST, ((Tag.DESCRIPTOR, state),)), [Fd(number)])
    with pytest.raises(OSError, match="socket"):
        contents.take_socket(Use.CONNECTION)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_line_that_has_ended_or_is_silent(lines: tuple[Line, Line]) -> None:
    with pytest.raises(TimeoutError):
        lines[1].receive(time.monotonic())
    lines[0].channel.close()
    with pytest.raises(EOFError):
        lines[1].receive(soon())


# The side that comes


def predecessor(line: Line) -> Predecessor:
    return Predecessor(os.dup(line.channel.fileno()))


def hello(*versions: int, header: bytes = b"") -> Parcel:
    sections = [(Tag.VERSIONS, wire.VERSIONS_STRUCT.pack(*versions)), (Tag.RECORD, header)]
    return Parcel(Kind.HELLO, [*sections[: 2 if header else 1]])


def test_a_newer_one_that_this_can_read_is_agreed_to(lines: tuple[Line, Line]) -> None:
    lines[0].send(hello(99, wire.VERSION, header=OWN_HEADER + b"more"), soon())
    with predecessor(lines[1]) as other:
        other.agree()
    assert lines[0].receive(soon())[0].kind == Kind.READY


def test_a_newer_one_that_this_cannot_read_is_refused(lines: tuple[Line, Line]) -> None:
    lines[0].send(hello(99, wire.VERSION + 1), soon())
    with pytest.raises(UpgradeError, match="hands over by version 99"), predecessor(lines[1]) as other:
        other.agree()
    refusal, _none = lines[0].receive(soon())
    assert (refusal.kind, b"version 99" in refusal.first(Tag.TEXT)) == (Kind.REFUSED, True)


def test_a_record_that_this_cannot_read_is_refused(lines: tuple[Line, Line]) -> None:
    states = record.RecordHeader(record.MAGIC, 99, record.VERSION + 1, 512, 4096, 1, 8192, 1)
    lines[0].send(hello(1, 1, header=record.RECORD_HEADER.encode(states)), soon())
    with pytest.raises(RecordError, match="versions below"), predecessor(lines[1]) as other:
        other.agree()
    assert lines[0].receive(soon())[0].kind == Kind.REFUSED


def test_another_word_than_hello_is_refused(lines: tuple[Line, Line]) -> None:
    lines[0].send(pack_text(Kind.READY, ""), soon())
    with pytest.raises(UpgradeError), predecessor(lines[1]) as other:
        other.agree()
    assert lines[0].receive(soon())[0].kind == Kind.REFUSED


def test_a_descriptor_that_is_none_of_a_keepers() -> None:
    with pytest.raises(SetupError, match="for the device's own use"):
        Predecessor(999)
