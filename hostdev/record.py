"""The record of a guest in memory: whole at whatever instruction its worker is killed.

A memfd that the keeper makes and every worker of the guest maps. What is written is written beside what counts, and then
one aligned store makes it count: on x86-64 whoever maps the memory sees stores in their order (virtqueue.py), and a
process that is killed leaves those that it made. What is in it is snapshot.py's and journal.py's; the layout is declared in
wire/record.py. Used by worker.py through journal.py, by estate.py and by those who take a device over.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import zlib
from collections.abc import Iterator
from itertools import pairwise

from hostdev.errors import RecordError
from hostdev.fds import Fd
from hostdev.wire import record as wire
from hostdev.wire.layout import LayoutError
from hostdev.wire.record import InHand, RecordHeader, TallyHeader, Word

# 32 regions, 5 rings, a reply, 256 statistics and the names of 512 counters of 100 bytes: 60 KiB.
STATE_SIZE = 64 << 10
# The header and 512 counters.
TALLY_SIZE = 8 << 10
MAX_COUNTERS = 512

_HEADER = RecordHeader(
    magic=wire.MAGIC,
    version=wire.VERSION,
    readable_by=wire.READABLE_BY,
    words_at=512,
    state_at=4096,
    state_size=STATE_SIZE,
    tally_at=4096 + 2 * STATE_SIZE,
    tally_size=TALLY_SIZE,
)
RECORD_SIZE = _HEADER.tally_at + 2 * _HEADER.tally_size
# What each record of this version begins with: what another version is asked if it can read.
OWN_HEADER = wire.RECORD_HEADER.encode(_HEADER)

_PRESENT = 1
# More images than anybody ever writes.
_LAST_IMAGE = 1 << 63
# And more than anything is ever counted to: what is added to it still has room.
_MOST_COUNTED = 1 << 63


def make_record() -> Fd:
    """Make an empty record, in memory of which only what is used is taken. Raises OSError."""
    fd = Fd(os.memfd_create("vhost-user-balloon-record", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd.fileno(), RECORD_SIZE)
    # A worker that goes wrong is not to leave its successors one that cannot be mapped, or is cut off.
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    os.pwrite(fd.fileno(), OWN_HEADER, 0)
    return fd


def read_header(fd: Fd) -> RecordHeader:
    """Read a record's header. Raises RecordError if there is none, or it says that this version cannot read the rest."""
    header = check_header(os.pread(fd.fileno(), wire.RECORD_HEADER_SIZE, 0))
    parts = _parts(header)
    if _end(header) > os.fstat(fd.fileno()).st_size:
        raise RecordError("the record of a guest is cut short")
    has_overlap = any(end > start for (_start, end), (start, _end) in pairwise(parts))
    if has_overlap or min(header.state_size, header.tally_size) < wire.IMAGE_STRUCT.size:
        raise RecordError("the record of a guest is damaged")
    return header


def _parts(header: RecordHeader) -> list[tuple[int, int]]:
    """Where each part begins and ends, in order."""
    return sorted(
        (
            (0, wire.RECORD_HEADER_SIZE),
            (header.words_at, header.words_at + 8 * wire.WORDS),
            (header.state_at, header.state_at + 2 * header.state_size),
            (header.tally_at, header.tally_at + 2 * header.tally_size),
        )
    )


def _end(header: RecordHeader) -> int:
    return max(end for _start, end in _parts(header))


def check_header(data: bytes) -> RecordHeader:
    """Decode a record's header. Raises RecordError as read_header()."""
    try:
        header = wire.RECORD_HEADER.decode(data[: wire.RECORD_HEADER_SIZE])
    except LayoutError as error:
        raise RecordError("the record of a guest is cut short") from error
    if header.magic != wire.MAGIC:
        raise RecordError("the record of a guest is damaged")
    if header.readable_by > wire.VERSION:
        raise RecordError(
            f"the record of a guest is of version {header.version}, which versions below {header.readable_by} "
            f"cannot read; this one is {wire.VERSION}"
        )
    return header


class Record:
    """A mapped record."""

    def __init__(self, fd: Fd) -> None:
        """Raises RecordError if it cannot be read."""
        self._header = read_header(fd)
        try:
            self._mapping = mmap.mmap(fd.fileno(), _end(self._header))
        except (OSError, ValueError) as error:
            raise RecordError(f"the record of a guest cannot be mapped: {error}") from error
        start = self._header.words_at
        self._words = memoryview(self._mapping)[start : start + 8 * wire.WORDS].cast("Q")
        if max(self._words[Word.STATE], self._words[Word.TALLY]) >= _LAST_IMAGE:
            self.close()
            raise RecordError("the record of a guest is damaged")

    def close(self) -> None:
        """Unmap it."""
        self._words.release()
        self._mapping.close()

    @property
    def state(self) -> bytes:
        """The image of the state that counts, empty before the first. Raises RecordError if it is damaged."""
        return self._image(self._words[Word.STATE], self._header.state_at, self._header.state_size)

    def write_state(self, image: bytes) -> None:
        """Write a new image of the state, and make it count."""
        self._write(Word.STATE, self._header.state_at, self._header.state_size, image)

    def tallies(self) -> Iterator[tuple[TallyHeader, tuple[int, ...]]]:
        """Yield the images of the tally that there are: the one written last, then the one before. Raises RecordError.

        The second is whole only if the first is not to count: otherwise its writer may have been killed in the next one.
        """
        generation = self._words[Word.TALLY]
        at, size = self._header.tally_at, self._header.tally_size
        for number in (generation, generation - 1):
            if number > 0:
                yield _tally(self._image(number, at, size))

    def write_tally(self, header: TallyHeader, counters: bytes) -> None:
        """Write a new image of the tally, and make it the last one. counters: 8 bytes each."""
        image = wire.TALLY_STRUCT.pack(*header) + counters
        self._write(Word.TALLY, self._header.tally_at, self._header.tally_size, image)

    def _image(self, generation: int, start: int, size: int) -> bytes:
        if generation == 0:
            return b""
        at = start + (generation & 1) * size
        length, crc = wire.IMAGE_STRUCT.unpack_from(self._mapping, at)
        at += wire.IMAGE_STRUCT.size
        image = self._mapping[at : at + min(length, size)]
        if zlib.crc32(image) != crc:
            raise RecordError("the record of a guest is damaged")
        return image

    def _write(self, word: Word, start: int, size: int, image: bytes) -> None:
        """Two images take turns: the one that counts is never written to."""
        data = wire.IMAGE_STRUCT.pack(len(image), zlib.crc32(image)) + image
        if len(data) > size:
            raise RecordError(f"an image of {len(data)} bytes where there is room for {size}")
        generation = self._words[word] + 1
        at = start + (generation & 1) * size
        self._mapping[at : at + len(data)] = data
        self._words[word] = generation

    @property
    def telling(self) -> bool:
        """True while a message to the front end may have been sent in part."""
        return bool(self._words[Word.TELLING])

    @telling.setter
    def telling(self, telling: bool) -> None:
        self._words[Word.TELLING] = int(telling)

    def in_hand(self, index: int) -> InHand | None:
        """Return what was noted last of a ring."""
        word = self._words[Word.IN_HAND + index]
        position, deaths, present = wire.IN_HAND_STRUCT.unpack(word.to_bytes(8, "little"))
        return InHand(position, deaths) if present else None

    def note_in_hand(self, index: int, chain: InHand) -> None:
        """Note that this chain is taken up now."""
        word = wire.IN_HAND_STRUCT.pack(*chain, _PRESENT)
        self._words[Word.IN_HAND + index] = int.from_bytes(word, "little")

    def forget_in_hand(self, index: int) -> None:
        """Note that none of a ring's chains has been taken up."""
        self._words[Word.IN_HAND + index] = 0


def _tally(image: bytes) -> tuple[TallyHeader, tuple[int, ...]]:
    if len(image) < wire.TALLY_STRUCT.size or (len(image) - wire.TALLY_STRUCT.size) % 8:
        raise RecordError("the record of a guest is damaged")
    header = TallyHeader(*wire.TALLY_STRUCT.unpack_from(image))
    counters = memoryview(image)[wire.TALLY_STRUCT.size :].cast("Q")
    if max(counters, default=0) > _MOST_COUNTED:
        raise RecordError("the record of a guest is damaged")
    return header, tuple(counters[: header.counters])
