"""What goes from one version of the keeper to the next, packed into datagrams with descriptors, and unpacked.

The layout is wire/handover.py's; when what is said is for handover.py, the side that goes, and takeover.py, the one that
comes. What is packed stays its owner's: a datagram carries duplicates.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from hostdev import fds
from hostdev.estate import Estate
from hostdev.fds import Fd
from hostdev.frozen import FrozenGuest, Message
from hostdev.wire import handover as wire
from hostdev.wire.handover import (
    Datagram,
    DescriptorState,
    GuestState,
    KeeperState,
    Kind,
    PlaceState,
    Tag,
    Use,
)
from hostdev.wire.layout import LayoutError
from hostdev.wire.record import unpack

_MAX_DEATHS = 255
# Seconds between two tries to send descriptors that there is no room for.
RETRY_SECONDS = 0.01

Identity = tuple[int, int] | None


@dataclass
class Parcel:
    """A datagram and its descriptors."""

    kind: int
    sections: list[tuple[int, bytes]] = field(default_factory=list)
    descriptors: list[Fd | socket.socket] = field(default_factory=list)

    def add(self, use: Use, descriptor: Fd | socket.socket, token: int = 0) -> None:
        """Put a descriptor in."""
        state = DescriptorState(use, token)
        self.sections.append((Tag.DESCRIPTOR, wire.DESCRIPTOR_STRUCT.pack(*state)))
        self.descriptors.append(descriptor)


class Line:
    """One end of the pair between two versions. Moments are of the monotonic clock."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel

    def send(self, parcel: Parcel, moment: float) -> None:
        """Send. Raises TimeoutError if that is not possible by then, OSError."""
        data = wire.encode(Kind(parcel.kind), parcel.sections)
        numbers = array.array("i", [each.fileno() for each in parcel.descriptors])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
        while True:
            self.channel.settimeout(max(0.001, moment - time.monotonic()))
            try:
                self.channel.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            except OSError as error:
                # Linux bounds the descriptors that are under way; they arrive while we wait.
                if error.errno != errno.ETOOMANYREFS or time.monotonic() >= moment:
                    raise
                time.sleep(RETRY_SECONDS)
            else:
                return

    def receive(self, moment: float | None) -> tuple[Datagram, list[Fd]]:
        """Receive, however long it takes if moment is None.

        Raises TimeoutError, EOFError if the other side has gone, LayoutError for what is no datagram, OSError.
        """
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        if not poll.poll(None if moment is None else max(0.0, moment - time.monotonic()) * 1000):
            raise TimeoutError("no answer in time")
        try:
            received = fds.receive(self.channel, wire.MAX_DATAGRAM, wire.MAX_DESCRIPTORS)
        except ConnectionResetError:
            # Said once, and first: it died with a word of ours unread. What it had said before is still there.
            received = fds.receive(self.channel, wire.MAX_DATAGRAM, wire.MAX_DESCRIPTORS)
        if not received.data:
            raise EOFError("the process has ended")
        return wire.decode(received.data), received.fds


# Packing


def pack_text(kind: Kind, text: str) -> Parcel:
    """Say something that needs no more than words."""
    return Parcel(kind, [(Tag.TEXT, text.encode())])


def pack_keeper(state: KeeperState, listener: socket.socket | None, signals: socket.socket) -> Parcel:
    """listener: of the control socket. signals: where what people say comes out."""
    parcel = Parcel(Kind.KEEPER, [(Tag.KEEPER, wire.KEEPER_STRUCT.pack(*state))])
    parcel.add(Use.SIGNALS, signals)
    if listener is not None:
        parcel.add(Use.LISTENER, listener)
    return parcel


def pack_place(
    name: str, path: str, listener: socket.socket | None, identity: Identity, *, leaving: bool
) -> Parcel:
    """identity: of the socket's file, None if it is not ours to remove."""
    state = PlaceState(*(identity or (0, 0)), int(leaving))
    sections = [
        (Tag.NAME, os.fsencode(name)),
        (Tag.PATH, os.fsencode(path)),
        (Tag.PLACE, wire.PLACE_STRUCT.pack(*state)),
    ]
    parcel = Parcel(Kind.PLACE, [*sections])
    if listener is not None:
        parcel.add(Use.LISTENER, listener)
    return parcel


def pack_guest(name: str, guest: FrozenGuest) -> Parcel:
    """Everything of one front end. name: of its place."""
    message = guest.message
    deaths = 0 if message is None else min(message.deaths, _MAX_DEATHS)
    state = GuestState(
        guest.number,
        int(message is not None),
        deaths,
        int(guest.closing),
        guest.restarts,
        int(message is not None and message.curtailed),
        int(guest.begun_curtailed),
    )
    sections = [
        (Tag.NAME, os.fsencode(name)),
        (Tag.GUEST, wire.GUEST_STRUCT.pack(*state)),
        (Tag.MESSAGE, b"" if message is None else message.data),
        (Tag.BEGUN, guest.begun),
        (Tag.OUTGOING, guest.outgoing),
        (Tag.WHY_INERT, guest.why_inert.encode()),
    ]
    parcel = Parcel(Kind.GUEST, [*sections])
    parcel.add(Use.CONNECTION, guest.connection)
    parcel.add(Use.RECORD, guest.estate.record)
    for token, fd in guest.estate.held.items():
        parcel.add(Use.HELD, fd, token)
    for fd in guest.estate.arrived:
        parcel.add(Use.ARRIVED, fd, fd.token)
    for fd in guest.begun_with:
        parcel.add(Use.BEGUN, fd)
    return parcel


# Unpacking


class Contents:
    """The descriptors of a datagram by their use; what nobody takes is closed with it."""

    def __init__(self, datagram: Datagram, received: Sequence[Fd]) -> None:
        """Raises LayoutError if descriptors were lost."""
        states = [
            DescriptorState(*unpack(wire.DESCRIPTOR_STRUCT, each)) for each in datagram.all(Tag.DESCRIPTOR)
        ]
        if len(states) != len(received):
            raise LayoutError(f"{len(received)} descriptors where {len(states)} were sent")
        self._found: dict[int, list[Fd]] = {}
        for state, fd in zip(states, received, strict=True):
            fd.token = state.token
            self._found.setdefault(state.use, []).append(fd)

    def all(self, use: Use) -> list[Fd]:
        """Take all of this use."""
        return self._found.pop(use, [])

    def one(self, use: Use) -> Fd:
        """Take the one of this use. Raises LayoutError if there is none."""
        found = self.all(use)
        if not found:
            raise LayoutError(f"no descriptor of use {use.name.lower()}")
        return found[0]

    def take_socket(self, use: Use) -> socket.socket:
        """Take the socket of this use. Raises LayoutError if there is none, OSError if it is something else."""
        fd = self.one(use)
        sock = socket.socket(fileno=fd.fileno())
        fd.detach()
        return sock

    def listener(self) -> socket.socket | None:
        """Take the listening socket, if there is one."""
        return self.take_socket(Use.LISTENER) if Use.LISTENER in self._found else None


def unpack_name(datagram: Datagram) -> str:
    """Return the name of a place."""
    return os.fsdecode(datagram.first(Tag.NAME))


def unpack_guest(datagram: Datagram, contents: Contents) -> FrozenGuest:
    """Return one front end. Raises LayoutError, OSError."""
    state = GuestState(*datagram.numbers(Tag.GUEST, wire.GUEST_STRUCT))
    estate = Estate(
        contents.one(Use.RECORD),
        held={fd.token: fd for fd in contents.all(Use.HELD)},
        arrived=contents.all(Use.ARRIVED),
    )
    data = datagram.first(Tag.MESSAGE)
    return FrozenGuest(
        contents.take_socket(Use.CONNECTION),
        estate,
        state.number,
        Message(state.number, data, state.deaths, bool(state.curtailed)) if state.pending else None,
        datagram.first(Tag.BEGUN),
        contents.all(Use.BEGUN),
        datagram.first(Tag.OUTGOING),
        bool(state.closing),
        datagram.first(Tag.WHY_INERT).decode(errors="replace"),
        state.restarts,
        bool(state.begun_curtailed),
    )
