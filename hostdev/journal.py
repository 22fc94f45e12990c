"""When a device writes down what its successor needs: before each act that the guest or the front end can see.

The order is what makes a worker's death harmless:

- A message's effect and its reply are written before the answer is sent: given the message again, a successor either finds
  it done, and repeats the reply, or does it for the first time.
- A chain's counters are written before its used index is published, with that index: if it was not, the image before
  counts (`recall()`), and the successor takes the chain up again. What was released of it is released once more, which is
  harmless as long as the chain is not answered; a used index is never taken back.
- That a chain is taken up is noted before it is looked at: a chain that workers die with is known by that.

Used by worker.py and balloon.py through the Journal class, which writes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from hostdev.metrics import Metrics
from hostdev.record import MAX_COUNTERS, Record
from hostdev.wire.record import NO_RING, InHand, TallyHeader

_INDEX_MASK = 0xFFFF


class Journal:
    """What can be written down. This one writes nothing: a device without a keeper has it."""

    def take_up(self, index: int, position: int) -> int:
        """A ring's chain at this available index is about to be taken. Returns how many workers died with it."""
        return 0

    def survived(self, index: int, position: int) -> None:
        """A chain that was taken up and is held has done no harm."""

    def begin_ring(self, index: int) -> None:
        """A ring begins, at whatever index: none of its chains has been taken up."""

    def put_back(self, index: int, used: int) -> None:
        """A chain is about to be returned: used will be the ring's used index."""

    def changed(self) -> None:
        """Something changed that no message did."""

    def telling(self, *, begins: bool) -> None:
        """A message to the front end is about to be begun, or has been sent to its end."""


class RecordJournal(Journal):
    """A journal that is kept in a record."""

    def __init__(self, record: Record, metrics: Metrics, gather: Callable[[], bytes]) -> None:
        """gather: the image of the state as it is now."""
        self._record = record
        self._metrics = metrics
        self._gather = gather
        self._number = 0
        self._named = 0
        # False until this worker has taken over: before, it does not know enough to write anything.
        self._begun = False
        self._suspended = False

    def suspend(self) -> None:
        """Write nothing: what is in the record is better than what this worker knows."""
        self._suspended = True

    def handled(self, number: int) -> None:
        """A message took effect: the state has its reply."""
        if self._suspended:
            return
        self._begun = True
        self._number = number
        self._write_tally(NO_RING, 0)
        self._write_state()

    def changed(self) -> None:
        """Something changed that no message did."""
        if self._begun:
            self._write_state()
            self._write_tally(NO_RING, 0)

    def take_up(self, index: int, position: int) -> int:
        """A ring's chain at this available index is about to be taken. Returns how many workers died with it."""
        known = self._record.in_hand(index)
        if known is not None and known.position == position:
            return known.deaths
        self.survived(index, position)
        return 0

    def survived(self, index: int, position: int) -> None:
        """A chain that was taken up and is held has done no harm."""
        self._record.note_in_hand(index, InHand(position, 0))

    def begin_ring(self, index: int) -> None:
        """A ring begins, at whatever index: none of its chains has been taken up."""
        self._record.forget_in_hand(index)

    def put_back(self, index: int, used: int) -> None:
        """A chain is about to be returned: used will be the ring's used index."""
        if len(self._metrics.samples) != self._named:
            self._write_state()
        self._write_tally(index, used & _INDEX_MASK)

    def telling(self, *, begins: bool) -> None:
        """A message to the front end is about to be begun, or has been sent to its end."""
        self._record.telling = begins

    def _write_state(self) -> None:
        self._record.write_state(self._gather())
        self._named = len(self._metrics.samples)

    def _write_tally(self, ring: int, used: int) -> None:
        counts = list(self._metrics.samples.values())[:MAX_COUNTERS]
        header = TallyHeader(self._number, ring, used, len(counts))
        self._record.write_tally(header, struct.pack(f"<{len(counts)}Q", *counts))


def recall(record: Record, number: int, used: Mapping[int, int]) -> tuple[int, ...]:
    """Return the counters that count: those written last, unless what they were written for did not happen.

    number: of the last message that took effect. used: each started ring's used index.
    """
    for header, counters in record.tallies():
        published = header.ring == NO_RING or used.get(header.ring, header.used) == header.used
        if header.number <= number and published:
            return counters
    return ()
