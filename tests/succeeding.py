"""A device in this process whose worker may end between any two steps, and whose successor goes on by the record.

What the keeper does is done here with the keeper's own parts: an estate that holds descriptors by token, a record, a journal.
What is left out is the process: a successor is new objects over duplicates of the descriptors. Not a test.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from hostdev import fds
from hostdev.driver import GuestMemory
from hostdev.estate import Estate
from hostdev.journal import RecordJournal
from hostdev.metrics import Sample
from hostdev.options import Start
from hostdev.record import Record
from hostdev.snapshot import Done, Parts, gather
from hostdev.succession import succeed
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import DEFAULT_FEATURES, Config, Feature
from hostdev.wire.channel import token
from tests.in_process import InProcess


@dataclass(frozen=True, slots=True)
class VisibleRing:
    """What the front end and the driver can tell of a ring. base: what GET_VRING_BASE would answer, None if unused."""

    size: int
    has_addresses: bool
    enabled: bool
    started: bool
    descriptors: tuple[bool, bool, bool]
    base: int | None


@dataclass(frozen=True, slots=True)
class Visible:
    """What can be told of a device from outside."""

    features: int
    protocol_features: int
    regions: tuple[tuple[int, int, int, int], ...]
    rings: tuple[VisibleRing, ...]
    has_channel: bool
    config: Config
    inert: bool
    inhibited: bool
    statistics: tuple[tuple[int, int], ...]
    counters: tuple[tuple[Sample, int], ...]


class Succeeding(InProcess):
    """An InProcess with a record. successions: how many there were."""

    def __init__(
        self,
        memory: GuestMemory | None = None,
        *,
        features: Feature = DEFAULT_FEATURES,
        offered: Feature = DEFAULT_FEATURES,
        ring_size: int = 128,
        rings_at: int = 0x10000,
    ) -> None:
        super().__init__(memory, features=features, offered=offered, ring_size=ring_size, rings_at=rings_at)
        self.successions = 0
        self._estate = Estate()
        self._number = 0
        self._done = Done()
        self._write_to(Record(self._estate.record))

    def _write_to(self, record: Record) -> None:
        self._record = record
        self._journal = RecordJournal(record, self.metrics, lambda: gather(self.parts, self._done))
        self.balloon.journal = self.session.journal = self._journal

    @property
    def parts(self) -> Parts:
        """The objects of the device."""
        return Parts(self.session, self.balloon, self.commands, self.metrics)

    def send_raw(self, data: bytes, descriptors: Sequence[fds.Fd] = ()) -> None:
        self._number += 1
        named = [(fd, token(self._number, place)) for place, fd in enumerate(descriptors)]
        self._estate.arrived = [fds.Fd(os.dup(fd.fileno()), name) for fd, name in named]
        given = [fds.Fd(os.dup(fd.fileno()), name) for fd, name in named]
        header = wire.HEADER.decode(data[: wire.HEADER_SIZE])
        reply = self.session.handle(header, data[wire.HEADER_SIZE :], given)
        self._done = Done(self._number, reply)
        self._journal.handled(self._number)
        self._estate.settle(self.session.held())
        if reply:
            self._replies.append(reply)

    def succeed(self) -> None:
        """The worker ends where it stands; another goes on."""
        self.successions += 1
        self._journal.suspend()
        ended, ended_record = self.session, self._record
        inherited = Estate(self._copy(self._estate.record))
        inherited.held = {name: self._copy(fd) for name, fd in self._estate.held.items()}
        self._make_device()
        self._write_to(Record(inherited.record))
        self._done = succeed(self.parts, inherited, self._record, Start())
        self._journal.handled(self._done.number)
        ended.close()
        ended_record.close()
        # adopt() has the discarder know the regions of the one that goes on, again.
        self.discarder.adopt(self.session.memory.regions)

    @staticmethod
    def _copy(fd: fds.Fd) -> fds.Fd:
        return fds.Fd(os.dup(fd.fileno()), fd.token)

    def visible(self) -> Visible:
        """What can be told of the device now. A chain in hand is not answered, so its counts do not count."""
        session, balloon = self.session, self.balloon
        counters = {name: count for name, count in self.metrics.samples.items() if count}
        return Visible(
            features=session.features,
            protocol_features=int(session.protocol_features),
            regions=tuple(
                (each.guest_address, each.size, each.user_address, each.file_offset)
                for each in session.memory.regions
            ),
            rings=tuple(self._ring(index) for index in range(len(session.rings))),
            has_channel=session.backend_channel is not None,
            config=balloon.config,
            inert=balloon.inert,
            inhibited=balloon.giver.inhibited,
            statistics=tuple(sorted(balloon.statistics.values.items())),
            counters=tuple(sorted(counters.items())),
        )

    def _ring(self, index: int) -> VisibleRing:
        ring, rings = self.session.rings[index], self.balloon.rings
        base = None
        if index in rings.started:
            base = rings.started[index].queue.base
        elif index in rings.stranded:
            base = rings.stranded[index][1]
        elif ring.started:
            base = rings.standing(index).base
        return VisibleRing(
            size=ring.size,
            has_addresses=ring.addresses is not None,
            enabled=ring.enabled,
            started=ring.started,
            descriptors=(ring.kick is not None, ring.call is not None, ring.error is not None),
            base=ring.base if base is None else base,
        )

    def owned(self) -> int:
        """Descriptors that device and keeper have.

        Besides what both hold: of each region its mapping's, of the back end's channel an epoll's, of the record two.
        """
        has_channel = self.session.backend_channel is not None
        return 2 * len(self.session.held()) + len(self.session.memory.regions) + has_channel + 2

    def close(self) -> None:
        super().close()
        self._record.close()
        self._estate.close()
