"""The side that comes, when one version of the keeper takes over from another: a process that the old one has started.

It is imported and ready before anything of the old one stands still. It shows what it is worth with workers that take over
and wait; only when the old one has said GO is anything read, answered or served, so that up to then the old one can go on
as if nothing had been. Used by launch.py; the other side is handover.py.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from hostdev import __version__
from hostdev.errors import BalloonError, SetupError, UpgradeError
from hostdev.frozen import FrozenGuest
from hostdev.guest import Guest
from hostdev.parcels import Contents, Identity, Line, Parcel, pack_text, unpack_guest, unpack_name
from hostdev.place import Place
from hostdev.record import check_header
from hostdev.wire import handover as wire
from hostdev.wire.handover import Datagram, KeeperState, Kind, PlaceState, Tag, Use, VersionsState

# Seconds that workers may take to be ready. The old version's patience (handover.SERVE_SECONDS) is what counts.
READY_SECONDS = 4.0
# Seconds in which a word to the old version must go: its buffer is empty.
_SEND_SECONDS = 4.0


@dataclass
class Left:
    """What the old version leaves. term_at: when it was to end, by the monotonic clock."""

    signals: socket.socket | None = None
    control: socket.socket | None = None
    control_identity: Identity = None
    control_folder: bool = False
    term_at: float | None = None
    crashed: bool = False
    places: list[Place] = field(default_factory=list)
    guests: dict[str, FrozenGuest] = field(default_factory=dict)


class Predecessor:
    """The old version. In its context what goes wrong is said to it before it is raised."""

    def __init__(self, number: int) -> None:
        """number: of the inherited descriptor. Raises SetupError if that is none of a keeper's."""
        try:
            channel = socket.socket(fileno=number)
        except (OSError, OverflowError) as error:
            raise SetupError(f"--take-over={number}: for the device's own use") from error
        channel.set_inheritable(False)
        self._line = Line(channel)

    def __enter__(self) -> Predecessor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._line.channel, contextlib.suppress(OSError):  # the old version has gone
            if isinstance(error, BalloonError):
                self._say(pack_text(Kind.REFUSED, str(error)))

    def _say(self, parcel: Parcel) -> None:
        self._line.send(parcel, time.monotonic() + _SEND_SECONDS)

    def _hear(self) -> tuple[Datagram, Contents]:
        try:
            datagram, received = self._line.receive(None)
        except EOFError:
            raise UpgradeError("the version that was to be replaced has gone") from None
        return datagram, Contents(datagram, received)

    def agree(self) -> None:
        """Look at its versions, and say that it can begin. Raises UpgradeError, RecordError or LayoutError if it cannot."""
        hello, _contents = self._hear()
        versions = VersionsState(*hello.numbers(Tag.VERSIONS, wire.VERSIONS_STRUCT))
        if hello.kind != Kind.HELLO or versions.readable_by > wire.VERSION:
            raise UpgradeError(
                f"version {__version__} cannot take over from one that hands over by version {versions.version}"
            )
        for header in hello.all(Tag.RECORD):
            check_header(header)
        self._say(pack_text(Kind.READY, __version__))

    def receive(self) -> Left:
        """Receive what it leaves. Raises UpgradeError or LayoutError."""
        left = Left()
        while (heard := self._hear())[0].kind != Kind.END:
            datagram, contents = heard
            if datagram.kind == Kind.KEEPER:
                _take_keeper(left, datagram, contents)
            elif datagram.kind == Kind.PLACE:
                left.places.append(_place(datagram, contents))
            elif datagram.kind == Kind.GUEST:
                left.guests[unpack_name(datagram)] = unpack_guest(datagram, contents)
        if left.signals is None:
            raise UpgradeError("what is left is not whole")
        return left

    def relieve(self, guests: Sequence[Guest]) -> None:
        """Say that all is ready, and wait until it has let go. Raises UpgradeError if a worker does not get ready."""
        moment = time.monotonic() + READY_SECONDS
        for guest in guests:
            guest.prepare()
        for guest in guests:
            guest.await_ready(moment)
        # It kills us when it changes its mind: if it has gone, all that it had is ours alone.
        with contextlib.suppress(UpgradeError, OSError):
            self._say(pack_text(Kind.SERVING, __version__))
            self._hear()


def _take_keeper(left: Left, datagram: Datagram, contents: Contents) -> None:
    state = KeeperState(*datagram.numbers(Tag.KEEPER, wire.KEEPER_STRUCT))
    left.signals = contents.take_socket(Use.SIGNALS)
    left.control = contents.listener()
    left.control_identity = _identity(state.device, state.inode)
    left.control_folder = bool(state.folder)
    left.term_at = state.term_at / wire.NANOSECONDS if state.term_at else None
    left.crashed = bool(state.crashed)


def _place(datagram: Datagram, contents: Contents) -> Place:
    state = PlaceState(*datagram.numbers(Tag.PLACE, wire.PLACE_STRUCT))
    path = datagram.first(Tag.PATH).decode(errors="surrogateescape")
    place = Place.adopted(
        unpack_name(datagram), path, contents.listener(), _identity(state.device, state.inode)
    )
    place.is_leaving = bool(state.leaving)
    return place


def _identity(device: int, inode: int) -> Identity:
    return (device, inode) if device or inode else None
