"""How a worker goes on where its predecessor was killed: what the record says is put back, and what it hints at is mended.

Used by worker.py, once, before it serves.
"""

from __future__ import annotations

import struct

from hostdev import snapshot
from hostdev.errors import RecordError
from hostdev.estate import Estate
from hostdev.fds import close_all
from hostdev.journal import recall
from hostdev.options import Start
from hostdev.record import Record
from hostdev.snapshot import Done, Parts
from hostdev.wire.record import InHand

# Deaths by SIGBUS after which it is guest memory, and no other mapping, that they are of: after the first there is no trace
# any more, and a file that has become shorter is seen.
MAX_BUS_ERRORS = 2
# Deaths with one chain that the record has room for; the third is the last that counts.
MAX_COUNTED = 0xFFFF


def succeed(parts: Parts, estate: Estate, record: Record, start: Start) -> Done:
    """Make a new device what its predecessor's was. Returns the last message that took effect.

    record: this worker's own. Raises whatever is wrong: the record is as it was, and what is missing now (memory,
    descriptors) another successor may find.
    """
    source = record if estate.source is None else Record(estate.source)
    done = Done()
    if source.state:
        image = snapshot.parse(source.state)
        done = image.done
        try:
            _restore(parts, image, estate, source, keeps_off=start.bus_errors >= MAX_BUS_ERRORS)
            _note_deaths(parts, source, record, blamed=start.blamed)
        except (ArithmeticError, ValueError, struct.error) as error:
            # Numbers that no worker writes, such as a time that is none.
            raise RecordError("the record of a guest is damaged") from error
    _close_the_rest(parts, estate)
    return done


def _restore(parts: Parts, image: snapshot.Image, estate: Estate, source: Record, *, keeps_off: bool) -> None:
    snapshot.restore(parts, image, estate.known, keeps_off=keeps_off)
    used = {index: ring.queue.used_index for index, ring in parts.balloon.rings.started.items()}
    counts = recall(source, image.session.number, used)
    parts.metrics.restore(dict(zip(image.samples, counts, strict=False)))
    channel = parts.session.backend_channel
    if source.telling and channel is not None:
        # QEMU may wait for the rest of a message, under its big lock.
        channel.recover()
        parts.balloon.space.changed = True


def _note_deaths(parts: Parts, source: Record, record: Record, *, blamed: bool) -> None:
    """Count a death against the chains that the predecessor had in hand. One that it only held is none."""
    for index, ring in parts.balloon.rings.started.items():
        known, position = source.in_hand(index), ring.queue.base
        if known is not None and known.position == position != ring.answered_to:
            record.note_in_hand(index, InHand(position, min(known.deaths + blamed, MAX_COUNTED)))
    parts.balloon.judge_deaths()


def _close_the_rest(parts: Parts, estate: Estate) -> None:
    """Close what came with a message that did not take effect, and the records: their mappings have descriptors of their own."""
    held = parts.session.held()
    close_all(fd for token, fd in estate.known.items() if token not in held)
    close_all(fd for fd in (estate.record, estate.source) if fd is not None)
