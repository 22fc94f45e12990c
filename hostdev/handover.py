"""The side that goes, when the keeper is replaced by the version that is installed now, under its guests.

First the new version is started beside us, by the same command, and says whether it can read what we would leave; nothing
has been disturbed until then. Then all stands still: workers are killed, as crash-only processes may be, and everything is
sent over. When its own workers are ready it says so, and with GO the guests are its. Whatever goes wrong before that, by a
version that is broken in any way, we kill it and go on: our records were not written to, our connections not read.

Used by keeper.py; the other side is takeover.py.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import selectors
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from hostdev import __version__
from hostdev.child import Child
from hostdev.errors import UpgradeError
from hostdev.frozen import FrozenGuest
from hostdev.isolation import isolate
from hostdev.parcels import Line, Parcel, pack_guest, pack_keeper, pack_place
from hostdev.record import OWN_HEADER
from hostdev.waiting_parent import adopt_orphans, children
from hostdev.wire import handover as wire
from hostdev.wire.control import Envelope, refusal, result
from hostdev.wire.handover import KeeperState, Kind, Tag, VersionsState
from hostdev.wire.layout import LayoutError

if TYPE_CHECKING:
    from hostdev.keeper import Keeper

log = logging.getLogger(__name__)

# Seconds that a new version has to start: it takes a fifth of one, and nobody waits for it.
START_SECONDS = 10.0
# Seconds that it has to take over. It takes some 10 ms and 10 more a guest; QEMU waits if it wants something meanwhile.
SERVE_SECONDS = 5.0
TAKE_OVER = "--take-over"


class Handover:
    """One attempt at a time to have another version take over."""

    def __init__(self, keeper: Keeper, selector: selectors.BaseSelector) -> None:
        self._keeper = keeper
        self._selector = selector
        self._line: Line | None = None
        self._child: Child | None = None
        self._agreed = False
        self._deadline = 0.0
        self._asked: list[Envelope] = []
        self._frozen: dict[str, FrozenGuest] = {}
        # Our children before there was another version: orphans that we get are others.
        self.others: frozenset[int] = frozenset()
        # True once it serves, and nothing is ours any more.
        self.is_done = False

    def ask(self, envelope: Envelope | None = None) -> None:
        """Begin, unless that is under way. envelope: whom to answer once the new version serves, or is refused."""
        if envelope is not None:
            self._asked.append(envelope)
        if self._child is not None:
            return
        try:
            self._start()
        except (UpgradeError, OSError) as error:
            self._fail(f"it cannot be started: {error}")

    def _start(self) -> None:
        adopt_orphans()
        self.others = children() - self._processes()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._child = Child("new version", functools.partial(_execute, theirs))
        self._line = Line(ours)
        self._agreed = False
        self._deadline = time.monotonic() + START_SECONDS
        self._selector.register(ours, selectors.EVENT_READ, self._listen)
        log.info("an upgrade is asked for: the new version is process %d", self._child.pid)
        self._say(self._hello(), self._deadline)

    def _hello(self) -> Parcel:
        versions = VersionsState(wire.VERSION, wire.READABLE_BY)
        fields: list[tuple[int, bytes]] = [
            (Tag.VERSIONS, wire.VERSIONS_STRUCT.pack(*versions)),
            (Tag.RECORD, OWN_HEADER),
        ]
        return Parcel(Kind.HELLO, fields)

    def due(self) -> float | None:
        """When tick() is to be called at the latest, by the monotonic clock; None for never."""
        return None if self._child is None else self._deadline

    def tick(self) -> None:
        """Hand over once both sides can, and give up in time."""
        if self._child is None:
            return
        if self._agreed and all(guest.is_settled for guest in self._keeper.guests):
            self._hand_over()
        elif time.monotonic() >= self._deadline:
            self._fail(
                "a worker of ours is not ready" if self._agreed else "it does not say that it is ready"
            )

    def abandon(self, why: str) -> None:
        """Give up an attempt that is under way."""
        if self._child is not None:
            self._fail(why)

    # What it says

    def _listen(self) -> None:
        try:
            self._expect(Kind.READY, time.monotonic())
        except UpgradeError as error:
            self._fail(str(error))
            return
        self._agreed = True

    def _expect(self, kind: Kind, moment: float) -> None:
        """Take the one word that can come next. Raises UpgradeError if it is another, or there is none by then."""
        assert self._line is not None
        try:
            datagram, _received = self._line.receive(moment)
        except (EOFError, TimeoutError, LayoutError, OSError) as error:
            raise UpgradeError(str(error)) from error
        if datagram.kind == Kind.REFUSED:
            raise UpgradeError(datagram.first(Tag.TEXT).decode(errors="replace"))
        # READY is what comes first, and never again.
        if datagram.kind != kind or self._agreed == (kind == Kind.READY):
            raise UpgradeError(f"it says {datagram.kind} where {kind.name} was expected")

    # Handing over

    def _hand_over(self) -> None:
        """Stand still and hand over; go on if that fails, for whatever reason."""
        why = "an unexpected error"
        try:
            self._give_all(time.monotonic() + SERVE_SECONDS)
            why = ""
        except (UpgradeError, OSError, LayoutError) as error:
            why = str(error)
        finally:
            # An error that was not expected is raised further, when all goes on as before.
            if why:
                self._fail(why)
            else:
                self._leave()

    def _give_all(self, moment: float) -> None:
        self._freeze()
        keeper = self._keeper
        if keeper.is_stopping:
            raise UpgradeError("the device is ending")
        self._say(pack_keeper(self._state(), keeper.control.listener, keeper.signals.line), moment)
        for place in keeper.places.values():
            listener = None if place.acceptor is None else place.acceptor.listener
            parcel = pack_place(place.name, place.path, listener, place.identity, leaving=place.is_leaving)
            self._say(parcel, moment)
        for name, guest in self._frozen.items():
            self._say(pack_guest(name, guest), moment)
        self._say(Parcel(Kind.END), moment)
        self._expect(Kind.SERVING, moment)
        self._say(Parcel(Kind.GO), moment)

    def _say(self, parcel: Parcel, moment: float) -> None:
        assert self._line is not None
        try:
            self._line.send(parcel, moment)
        except (BrokenPipeError, ConnectionResetError):
            self._expect(Kind.SERVING, moment)  # or why it has ended
            raise

    def _state(self) -> KeeperState:
        keeper, control = self._keeper, self._keeper.control.socket
        term_at = 0 if keeper.term_at is None else int(keeper.term_at * wire.NANOSECONDS)
        device, inode = (None if control is None else control.identity) or (0, 0)
        folder = control is not None and control.folder_made
        return KeeperState(term_at, int(keeper.crashed), device, inode, int(folder))

    def _freeze(self) -> None:
        for guest in self._keeper.guests:
            guest.stop_worker()
        frozen = {guest.setting.name: guest.freeze() for guest in self._keeper.guests}
        # Some may have been seen off while others were being frozen.
        served = {guest.setting.name for guest in self._keeper.guests if guest.is_served}
        self._frozen = {name: guest for name, guest in frozen.items() if guest is not None and name in served}

    def _leave(self) -> None:
        """All is the other's: let go of it, and remove nothing."""
        child, self._child = self._child, None
        assert child is not None
        log.info("process %d serves from now on", child.pid)
        child.pidfd.close()
        self._close()
        self.is_done = True
        control = self._keeper.control
        control.refuse_all("the device has just been upgraded: ask again")
        for each in self._asked:
            control.answer(result(each.id, {}))
        for guest in self._frozen.values():
            guest.close()
        self._keeper.leave()

    # Going on

    def _fail(self, why: str) -> None:
        """Have nothing be left of it, and go on."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.bury(expected=True)
            self._bury_orphans()
        # Last: one that lives takes the line's end for ours, and all for its own.
        self._close()
        log.error("the upgrade is refused, version %s serves on: %s", __version__, why)
        for guest in self._keeper.guests:
            guest.thaw()
        asked, self._asked = self._asked, []
        for each in asked:
            self._keeper.control.answer(refusal(each.id, f"version {__version__} serves on: {why}"))

    def _close(self) -> None:
        if self._line is not None:
            self._selector.unregister(self._line.channel)
            self._line.channel.close()
            self._line = None

    def _processes(self) -> set[int]:
        """Our workers, and the control process."""
        link = self._keeper.control.link
        found = [guest.worker for guest in self._keeper.guests] + [None if link is None else link.pid]
        return {pid for pid in found if pid is not None}

    def _bury_orphans(self) -> None:
        """End the workers that it started: they are our children now, and no two may serve one guest."""
        for pid in children() - self.others - self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _execute(channel: socket.socket) -> int:
    """Become the version that is installed now, in a freshly forked process. Raises OSError."""
    isolate(channel)
    channel.set_inheritable(True)
    words = [each for each in sys.orig_argv[1:] if not each.startswith(f"{TAKE_OVER}=")]
    os.execv(sys.executable, [sys.executable, *words, f"{TAKE_OVER}={channel.fileno()}"])
