"""One round of free page hinting: the command ids, and how much the guest has hinted.

virtio 1.3, 5.5.6.4 and 5.5.6.5; ids and states as QEMU has them. In a round the guest takes all of its free memory in
blocks of its largest order, names each, and keeps it until it reads DONE. QEMU uses that to leave free pages out of a
migration; here it only tells how much could be reclaimed now. Hinted pages are never released: they are not free, and
the guest may take one back (its shrinker does) before the device sees the hint.

Because the guest is left without free memory until DONE, every round has a deadline and ends with DONE whatever
happens. No I/O. balloon.py feeds it, commands.py asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

# QEMU, include/standard-headers/linux/virtio_balloon.h and hw/virtio/virtio-balloon.c (VIRTIO_BALLOON_FREE_PAGE_HINT_CMD_ID_MIN).
ID_STOP = 0
ID_DONE = 1
ID_MIN = 0x8000_0000
ID_MAX = 0xFFFF_FFFF
# Seconds. A guest of 1 GiB takes 0.2 s (Firecracker), under emulation 1 s; longer than this its programs notice.
ROUND_SECONDS = 2.0


class State(StrEnum):
    """Where a round is."""

    STOP = "stop"
    REQUESTED = "requested"
    START = "start"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a round has brought. seconds: from the request to the end. complete: the guest came to the end by itself."""

    bytes: int
    blocks: int
    seconds: float
    complete: bool


class Hinting:
    """The state of the current round, or of the last one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._id = ID_MIN
        self.state = State.STOP
        self.deadline: float | None = None
        self._bytes = 0
        self._blocks = 0
        self._begun = 0.0
        # The last round that has ended.
        self.result: Estimate | None = None

    @property
    def is_open(self) -> bool:
        """True from the request until the end: the guest may hold its free memory."""
        return self.deadline is not None

    @property
    def shown_id(self) -> int:
        """What the config space shows.

        The round's id while it runs, too: QEMU shows 0 then, so that a driver which reads it again, because the target
        changed meanwhile, would stop.
        """
        if self.is_open:
            return self._id
        return ID_DONE if self.state is State.DONE else ID_STOP

    @property
    def last_id(self) -> int:
        """The id of the open round, or of the last one."""
        return self._id

    def restore(self, last_id: int) -> None:
        """Go on after a round that this id was given to: it has ended, if there was one."""
        self._id = last_id
        self.state = State.STOP if last_id == ID_MIN else State.DONE

    def begin(self) -> None:
        """Open a round with an id that no round before it had. There must be none open."""
        assert not self.is_open
        self._id = self._id + 1 if self._id < ID_MAX else ID_MIN
        self.state = State.REQUESTED
        self._begun = self._clock()
        self.deadline = self._begun + ROUND_SECONDS
        self._bytes = self._blocks = 0

    def take_id(self, value: int) -> None:
        """Take an id from the guest: this round's starts it, once; any other ends one that was started."""
        if value == self._id:
            if self.state is State.REQUESTED:
                self.state = State.START
        elif self.state is State.START:
            self.state = State.STOP

    def take_block(self, size: int) -> None:
        """Count a block of so many bytes of guest memory, if the guest has started the round."""
        if self.state is State.START:
            self._bytes += size
            self._blocks += 1

    def is_over(self) -> bool:
        """True if the open round is to be ended: the guest is through with it, or its time is."""
        if self.deadline is None:
            return False
        return self.state is State.STOP or self._clock() >= self.deadline

    def end(self) -> None:
        """End the open round, if there is one: the guest gets its memory back when it reads DONE."""
        if not self.is_open:
            return
        complete = self.state is State.STOP
        self.result = Estimate(self._bytes, self._blocks, self._clock() - self._begun, complete)
        self.state = State.DONE
        self.deadline = None
