"""The record of a guest, damaged: a worker that is to go on by it does, or says that it cannot, and is sane in either case.

An input says what is wrong with a record that a device at work has written: sections left out, doubled, reordered, cut, with other
fields; images whose checksum does not fit; words and header. The checksum is right most of the time, for what is behind it is
what another version may write.

- Nothing is raised but RecordError, RequestError and KeyError (a descriptor that is missing), of which a worker dies in order.
- A device that goes on writes a record that can be read, and answers and serves whatever comes.
- No descriptor is left open.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from hostdev import snapshot
from hostdev.errors import RecordError, RequestError
from hostdev.estate import Estate
from hostdev.fds import Fd
from hostdev.options import Start
from hostdev.record import OWN_HEADER, RECORD_SIZE, STATE_SIZE, TALLY_SIZE, make_record, read_header
from hostdev.succession import succeed
from hostdev.target import Target
from hostdev.wire import record as wire
from hostdev.wire import vhost_user
from hostdev.wire.balloon import QUEUE_COUNT, Role
from hostdev.wire.record import Tag
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, Request
from tests.fuzz import served
from tests.fuzz.descriptors import open_descriptors, wares
from tests.fuzz.served import Served
from tests.fuzz.source import Source

MAX_CHANGES = 12
_STATE_AT, _TALLY_AT, _WORDS_AT = 4096, 4096 + (128 << 10), 512
# Of the header: what is behind its magic.
_HEADER_FIELDS = tuple((at, 4) for at in range(8, wire.RECORD_HEADER_SIZE, 4))
_VALUES = (
    0,
    1,
    2,
    3,
    4,
    5,
    255,
    256,
    0x1000,
    0x7F,
    0xFFFF,
    0x10000,
    1 << 31,
    (1 << 32) - 1,
    1 << 63,
    (1 << 64) - 1,
)


@dataclass(frozen=True)
class _Original:
    """A record as a device wrote it. held: which ware each token is."""

    header: bytes
    sections: tuple[tuple[int, bytes], ...]
    tally: bytes
    held: Mapping[int, Fd]


def _fields(layout: struct.Struct) -> tuple[tuple[int, int], ...]:
    """Return offset and size of each field."""
    widths = [struct.calcsize(f"<{code}") for code in layout.format[1:]]
    return tuple(zip(accumulate(widths, initial=0), widths, strict=False))


_FIELDS: Mapping[int, tuple[tuple[int, int], ...]] = {
    Tag.SESSION: _fields(wire.SESSION_STRUCT),
    Tag.REGION: _fields(wire.REGION_STRUCT),
    Tag.RING: _fields(wire.RING_STRUCT),
    Tag.DEVICE: _fields(wire.DEVICE_STRUCT),
    Tag.STATISTICS: _fields(wire.STATISTICS_STRUCT),
}


@functools.cache
def _original() -> _Original:
    """Write one: a guest with statistics and a report in hand, a target, poison, and a reply."""
    ware = wares()
    ware.reset()
    ours, theirs = socket.socketpair()
    with ours, theirs, make_record() as fd:
        device = Served(fd, theirs)
        held = device.set_up(ware)
        served.offer(ware, Role.STATISTICS, 0x20000, 30, writable=False)
        served.offer(ware, Role.REPORTING, 0x100000, 0x80000, writable=True)
        device.balloon.space.set_target(Target(percent=50), 0)
        device.balloon.statistics.set_interval(5)
        device.run()
        device.journal.changed()
        tally = next(device.record.tallies())
        raw = wire.TALLY_STRUCT.pack(*tally[0]) + b"".join(each.to_bytes(8, "little") for each in tally[1])
        sections = tuple(wire.sections(device.record.state))
        header = os.pread(fd.fileno(), wire.RECORD_HEADER_SIZE, 0)
        device.close()
    return _Original(header, sections, raw, held)


@functools.cache
def _memory() -> Fd:
    """As make_record() has it, but for the seals: its size may be anything."""
    fd = Fd(os.memfd_create("record", os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), RECORD_SIZE)
    os.pwrite(fd.fileno(), OWN_HEADER, 0)
    return fd


def check(data: bytes) -> None:
    """Act out one input."""
    source = Source(data)
    original = _original()
    _memory()
    wares().reset()
    before = open_descriptors()
    _write(source, original)
    held = {number: Fd(os.dup(fd.fileno()), number) for number, fd in original.held.items()}
    if source.one_in(8):
        held.popitem()
    estate = Estate(Fd(os.dup(_memory().fileno())), held=held)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _take_over(source, estate, theirs)
    estate.close()
    assert open_descriptors() <= before, "descriptors are left open"


def _take_over(source: Source, estate: Estate, channel: socket.socket) -> None:
    """Be the next worker."""
    try:
        device = Served(estate.record, channel)
    except RecordError:
        return
    header = read_header(_memory())
    has_room = header.state_size >= STATE_SIZE and header.tally_size >= TALLY_SIZE
    try:
        device.messages.done = succeed(device.parts, estate, device.record, Start(blamed=source.flag()))
    except (RecordError, RequestError, KeyError):
        pass
    else:
        if has_room:
            _serve(device)
    device.close()


def _serve(device: Served) -> None:
    """Go on: what is written can be read, each message is answered, and each ring serves and stops."""
    number = device.messages.done.number
    device.journal.handled(number)
    image = snapshot.parse(device.record.state)
    assert [each.token for each in image.regions] == [each.fd.token for each in device.session.memory.regions]
    assert image.done == device.messages.done
    device.run()
    for index in range(QUEUE_COUNT):
        payload = vhost_user.VRING_STATE.encode(vhost_user.VringState(index, 0))
        stream = vhost_user.message(Request.GET_VRING_BASE, FLAG_NEED_REPLY, payload)
        header = vhost_user.HEADER.decode(stream[: vhost_user.HEADER_SIZE])
        reply = device.session.handle(header, payload, [])
        assert len(reply) == vhost_user.HEADER_SIZE + 8
    assert not device.balloon.is_running


def _write(source: Source, original: _Original) -> None:
    """Write the record that the input wants, in the memory that there is for it."""
    fd = _memory().fileno()
    os.ftruncate(fd, 0)
    os.ftruncate(fd, RECORD_SIZE)
    header, sections, tally, words = bytearray(original.header), list(original.sections), original.tally, {}
    for _ in range(source.below(MAX_CHANGES)):
        kind = source.below(8)
        if kind < 5:
            _change_sections(source, sections)
        elif kind == 5:
            words[8 * source.below(13)] = _word(source)
        elif kind == 6:
            tally = _overwritten(source, tally)
        else:
            header = bytearray(_overwritten(source, bytes(header), _HEADER_FIELDS))
    os.pwrite(fd, header, 0)
    image = b"".join(wire.SECTION_STRUCT.pack(tag, len(each) & 0xFFFF) + each for tag, each in sections)
    os.pwrite(fd, _image(source, image), _STATE_AT)
    os.pwrite(fd, _image(source, tally), _TALLY_AT)
    # Images of even numbers are the first ones.
    os.pwrite(fd, (2).to_bytes(8, "little") * 2, _WORDS_AT)
    for at, value in words.items():
        os.pwrite(fd, value.to_bytes(8, "little"), _WORDS_AT + at)
    if source.one_in(16):
        os.ftruncate(fd, source.pick((0, 36, 512, 1000, 4096, _TALLY_AT, RECORD_SIZE - 1)))


def _image(source: Source, data: bytes) -> bytes:
    checksum = zlib.crc32(data) if source.below(16) else source.number(4)
    length = len(data) if source.below(16) else source.number(4)
    return wire.IMAGE_STRUCT.pack(length, checksum) + data


def _change_sections(source: Source, sections: list[tuple[int, bytes]]) -> None:
    if not sections:
        return
    at = source.below(len(sections))
    tag, payload = sections[at]
    match source.below(8):
        case 0:
            del sections[at]
        case 1:
            sections.append((tag, payload))
        case 2:
            sections[at] = tag, payload[: source.below(len(payload) + 1)]
        case 3:
            sections[at] = source.pick((*Tag, 0, 99)), payload
        case 4:
            sections[at] = tag, source.take(source.below(100))
        case _:
            sections[at] = tag, _overwritten(source, payload, _FIELDS.get(tag, ()))


def _overwritten(source: Source, data: bytes, fields: Sequence[tuple[int, int]] = ()) -> bytes:
    """Put a number somewhere into it: in one of the fields (offset, bytes) most of the time, if there are any."""
    if not data:
        return data
    if fields and source.below(8):
        at, width = source.pick(fields)
    else:
        at, width = source.below(len(data)), source.pick((1, 2, 4, 8))
    value = (_value(source) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return (data[:at] + value + data[at + width :])[: len(data)]


def _word(source: Source) -> int:
    """A number, or a chain in hand that workers died with."""
    if source.below(4) == 0:
        return _value(source)
    return 1 << 32 | source.below(5) << 16 | source.below(3)


def _value(source: Source) -> int:
    return source.pick(_VALUES) if source.below(8) else source.number(8)
