"""The record: whole at any moment, read across versions, refused when it cannot be; and what is put into it comes out."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest

from hostdev import record as module
from hostdev import snapshot
from hostdev.driver import Buffer
from hostdev.errors import RecordError
from hostdev.fds import Fd
from hostdev.journal import RecordJournal, recall
from hostdev.metrics import Metrics
from hostdev.record import MAX_COUNTERS, RECORD_SIZE, STATE_SIZE, Record, make_record, read_header
from hostdev.snapshot import Done, Parts
from hostdev.target import Target
from hostdev.wire import record as wire
from hostdev.wire.balloon import DEFAULT_FEATURES, STATISTIC_STRUCT, Config, Feature, Role
from hostdev.wire.record import NO_RING, InHand, Tag, TallyHeader
from tests.in_process import MIB, InProcess
from tests.stepping import at_each_line


@pytest.fixture
def fd() -> Iterator[Fd]:
    with make_record() as fd:
        yield fd


@pytest.fixture
def record(fd: Fd) -> Iterator[Record]:
    record = Record(fd)
    yield record
    record.close()


# Images


def test_the_last_image_counts(fd: Fd, record: Record) -> None:
    assert record.state == b""
    for image in (b"one", b"two, longer", b"3", b""):
        record.write_state(image)
        assert record.state == image
        other = Record(fd)
        assert other.state == image
        other.close()


def test_what_is_written_does_not_touch_what_counts(fd: Fd, record: Record) -> None:
    """Killed anywhere before the one store that makes an image count, it is the old one that is found."""
    record.write_state(b"old")
    before = os.pread(fd.fileno(), RECORD_SIZE, 0)
    record.write_state(b"new")
    after = os.pread(fd.fileno(), RECORD_SIZE, 0)
    header = read_header(fd)
    changed = [at for at in range(RECORD_SIZE) if before[at] != after[at]]
    word = header.words_at + 8 * wire.Word.STATE
    places = [at for at in changed if at != word]
    for cut in range(len(places) + 1):
        torn = bytearray(before)
        for at in places[:cut]:
            torn[at] = after[at]
        with Fd(os.memfd_create("torn")) as copy:
            os.write(copy.fileno(), torn)
            found = Record(copy)
            assert found.state == b"old"
            found.close()
    assert word in changed
    assert all(at >= header.state_at for at in places)


@pytest.mark.parametrize("kind", ["state", "tally"])
def test_whoever_looks_while_it_is_written_finds_the_old_or_the_new(
    fd: Fd, record: Record, kind: str
) -> None:
    """Before each line of the writer: a successor may come after any of them."""
    found: list[bytes] = []

    def write(number: int) -> None:
        if kind == "state":
            record.write_state(b"state %d" % number)
        else:
            record.write_tally(TallyHeader(number, NO_RING, 0, 1), number.to_bytes(8, "little"))

    def look() -> None:
        reader = Record(fd)
        if kind == "state":
            found.append(reader.state)
        else:
            found.append(b"state %d" % next(iter(reader.tallies()))[1][0])
        reader.close()

    for number in range(1, 4):
        write(number)
    with at_each_line(Record._write, look) as lines:
        write(4)
    changes = [at for at in range(1, len(found)) if found[at] != found[at - 1]]
    assert (found[0], found[-1], len(changes)) == (b"state 3", b"state 4", 1)
    assert len(set(lines)) > 5


def test_an_image_that_has_no_room_is_refused(record: Record) -> None:
    record.write_state(bytes(STATE_SIZE - wire.IMAGE_STRUCT.size))
    with pytest.raises(RecordError, match="room"):
        record.write_state(bytes(STATE_SIZE - wire.IMAGE_STRUCT.size + 1))
    assert len(record.state) == STATE_SIZE - wire.IMAGE_STRUCT.size


@pytest.mark.parametrize("kind", ["state", "tally"])
def test_one_byte_that_is_not_as_it_was_written(fd: Fd, record: Record, kind: str) -> None:
    """Anywhere in an image, its length and its checksum included: it is refused, and right again once the byte is."""
    counters = struct.pack("<QQ", 1, 2)
    record.write_state(b"a state")
    record.write_tally(TallyHeader(1, NO_RING, 0, 2), counters)
    header = read_header(fd)
    is_state = kind == "state"
    # The first image is the second of the two.
    start = header.state_at + header.state_size if is_state else header.tally_at + header.tally_size
    length = wire.IMAGE_STRUCT.size + (
        len(b"a state") if is_state else wire.TALLY_STRUCT.size + len(counters)
    )
    for at in range(start, start + length):
        (byte,) = os.pread(fd.fileno(), 1, at)
        for bit in (1, 0x80):
            os.pwrite(fd.fileno(), bytes([byte ^ bit]), at)
            with pytest.raises(RecordError, match="damaged"):
                _ = record.state if is_state else list(record.tallies())
        os.pwrite(fd.fileno(), bytes([byte]), at)
    assert record.state == b"a state"
    assert list(record.tallies()) == [(TallyHeader(1, NO_RING, 0, 2), (1, 2))]


def test_both_tallies_are_there(record: Record) -> None:
    assert list(record.tallies()) == []
    for number in range(4):
        record.write_tally(TallyHeader(number, NO_RING, 0, 2), struct.pack("<QQ", number, 7))
    assert list(record.tallies()) == [
        (TallyHeader(3, NO_RING, 0, 2), (3, 7)),
        (TallyHeader(2, NO_RING, 0, 2), (2, 7)),
    ]


def test_as_many_counters_as_there_may_be(record: Record) -> None:
    counters = struct.pack(f"<{MAX_COUNTERS}Q", *range(MAX_COUNTERS))
    record.write_tally(TallyHeader(1, 255, 65535, MAX_COUNTERS), counters)
    assert next(record.tallies())[1] == tuple(range(MAX_COUNTERS))


def test_words(fd: Fd, record: Record) -> None:
    assert record.in_hand(4) is None
    record.note_in_hand(4, InHand(65535, 3))
    record.telling = True
    other = Record(fd)
    assert (other.in_hand(4), other.in_hand(3), other.telling) == (InHand(65535, 3), None, True)
    other.close()


# Which counters count


def test_a_tally_that_was_being_written_is_not_looked_at(fd: Fd, record: Record) -> None:
    """The image before the last is where the next one goes: killed there, its writer leaves it torn."""
    for count in (1, 2):
        record.write_tally(TallyHeader(5, NO_RING, 0, 1), struct.pack("<Q", count))
    header = read_header(fd)
    os.pwrite(fd.fileno(), b"\xff" * 64, header.tally_at + header.tally_size)
    assert recall(record, 5, {}) == (2,)
    with pytest.raises(RecordError, match="damaged"):
        recall(record, 4, {})


def test_counters_of_a_chain_that_was_not_returned_do_not_count(record: Record) -> None:
    record.write_tally(TallyHeader(5, NO_RING, 0, 1), struct.pack("<Q", 1))
    record.write_tally(TallyHeader(5, 4, 10, 1), struct.pack("<Q", 2))
    assert recall(record, 5, {4: 10}) == (2,)
    assert recall(record, 5, {4: 9}) == (1,)


def test_counters_of_a_message_that_did_not_take_effect_do_not_count(record: Record) -> None:
    record.write_tally(TallyHeader(5, NO_RING, 0, 1), struct.pack("<Q", 1))
    record.write_tally(TallyHeader(6, NO_RING, 0, 1), struct.pack("<Q", 2))
    assert recall(record, 6, {}) == (2,)
    assert recall(record, 5, {}) == (1,)


def test_no_counters_at_all(record: Record) -> None:
    assert recall(record, 0, {}) == ()


def test_a_journal_writes_nothing_before_it_knows_what_there_was(record: Record) -> None:
    journal = RecordJournal(record, Metrics(), lambda: b"state")
    journal.changed()
    assert (record.state, list(record.tallies())) == (b"", [])
    journal.handled(3)
    assert (record.state, next(record.tallies())[0].number) == (b"state", 3)


# Versions


def write_header(fd: Fd, **changes: object) -> None:
    header = {name: getattr(read_header(fd), name) for name in wire.RecordHeader.__slots__}
    os.pwrite(fd.fileno(), wire.RECORD_HEADER.encode(wire.RecordHeader(**(header | changes))), 0)


def test_a_newer_version_that_can_be_read(fd: Fd) -> None:
    write_header(fd, version=wire.VERSION + 1)
    record = Record(fd)
    record.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"readable_by": wire.VERSION + 1, "version": wire.VERSION + 1}, "cannot read"),
        ({"magic": b"vubtrace"}, "damaged"),
        ({"state_size": RECORD_SIZE}, "cut short"),
        ({"tally_at": 1 << 31}, "cut short"),
        ({"words_at": RECORD_SIZE - 8}, "cut short"),
        ({"words_at": 4}, "damaged"),
        ({"state_at": 600}, "damaged"),
        ({"state_size": 7}, "damaged"),
    ],
)
def test_what_cannot_be_read_is_refused(fd: Fd, changes: dict[str, object], message: str) -> None:
    write_header(fd, **changes)
    with pytest.raises(RecordError, match=message):
        read_header(fd)


@pytest.mark.parametrize("word", [wire.Word.STATE, wire.Word.TALLY])
def test_a_number_that_no_image_has_is_refused(fd: Fd, word: wire.Word) -> None:
    os.pwrite(fd.fileno(), b"\xff" * 8, read_header(fd).words_at + 8 * word)
    with pytest.raises(RecordError, match="damaged"):
        Record(fd)


@pytest.mark.parametrize("size", [0, wire.TALLY_STRUCT.size - 1, wire.TALLY_STRUCT.size + 9])
def test_a_tally_that_is_none_is_refused(record: Record, size: int) -> None:
    record._write(wire.Word.TALLY, record._header.tally_at, record._header.tally_size, bytes(size))
    with pytest.raises(RecordError, match="damaged"):
        next(record.tallies())


def test_a_worker_that_goes_wrong_cannot_spoil_its_size(fd: Fd) -> None:
    for act in (lambda: os.ftruncate(fd.fileno(), 0), lambda: os.pwrite(fd.fileno(), b"x", 1 << 48)):
        with pytest.raises(PermissionError):
            act()
    Record(fd).close()


def test_a_record_that_cannot_be_mapped_is_none(monkeypatch: pytest.MonkeyPatch, fd: Fd) -> None:
    def no_memory(*_arguments: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("hostdev.record.mmap.mmap", no_memory)
    with pytest.raises(RecordError, match="cannot be mapped"):
        Record(fd)


def test_an_empty_file_is_refused() -> None:
    with Fd(os.memfd_create("empty")) as fd, pytest.raises(RecordError, match="cut short"):
        read_header(fd)


def test_fields_and_sections_of_other_versions() -> None:
    """A field that is not there yet is 0; one that is not known yet, or a section, is passed over; a cut end is left out."""
    section = wire.section
    device = wire.DEVICE_STRUCT.pack(*range(1, len(wire.DeviceRecord._fields) + 1))
    image = (
        section(Tag.SESSION, wire.SESSION_STRUCT.pack(1, 2, 3, 4, 0) + b"and more")
        + wire.SECTION_STRUCT.pack(999, 5)
        + b"later"
        + section(Tag.DEVICE, device[:12])
        + section(Tag.STATISTICS, b"")[:3]
    )
    parsed = snapshot.parse(image)
    assert parsed.session == (1, 2, 3, 4, 0)
    assert parsed.device[:3] == (1, 2, 3)
    assert set(parsed.device[3:]) == {0}
    assert parsed.statistics == (0, 0, 0, 0)


def test_an_image_without_the_main_thing() -> None:
    with pytest.raises(RecordError, match="damaged"):
        snapshot.parse(wire.section(Tag.INERT, b"why"))


# A device, gathered and put back


def parts_of(guest: InProcess) -> Parts:
    return Parts(guest.session, guest.balloon, guest.commands, guest.metrics)


def descriptors(guest: InProcess) -> dict[int, Fd]:
    """What the keeper would have kept: a copy of each, by its token."""
    own = [region.fd for region in guest.session.memory.regions]
    for ring in guest.session.rings:
        own += [fd for fd in (ring.kick, ring.call, ring.error) if fd is not None]
    for number, fd in enumerate(own, 1):
        fd.token = number
    return {fd.token: Fd(os.dup(fd.fileno()), fd.token) for fd in own}


@pytest.mark.parametrize("percent", [None, 50])
def test_a_device_put_back_is_the_same(percent: int | None) -> None:
    with InProcess() as guest, InProcess(memory=guest.memory) as other:
        guest.start()
        guest.write_config(Config(0, 77, 0, 0))
        guest.command("set-target", size=60 * MIB)
        guest.command("qom-set", path="balloon0", property="guest-stats-polling-interval", value=9)
        guest.command("inhibit")
        guest.memory.write(MIB, STATISTIC_STRUCT.pack(4, 99) + STATISTIC_STRUCT.pack(55, 1))
        guest.rings[Role.STATISTICS].offer([Buffer(MIB, 20)])
        guest.run(Role.STATISTICS)
        guest.rings[Role.REPORTING].offer([Buffer(8 * MIB, MIB, writable=True)])
        guest.run(Role.REPORTING)
        guest.balloon.begin_hinting()
        guest.balloon.end_hinting()
        if percent is not None:
            guest.balloon.space.pending = Target(percent=percent)
        guest.balloon.make_inert("for once")
        held = descriptors(guest)
        image = snapshot.gather(parts_of(guest), Done(12, b"reply", closing=True))
        parsed = snapshot.parse(image)
        snapshot.restore(parts_of(other), parsed, held)
        other.metrics.restore(guest.metrics.samples)
        assert parsed.done == Done(12, b"reply", closing=True)
        assert snapshot.gather(parts_of(other), parsed.done) == image
        assert other.session.held() == tuple(token for token in guest.session.held() if token)
        assert other.balloon.statistics.named() == guest.balloon.statistics.named()
        assert other.balloon.config == guest.balloon.config
        # The statistics buffer is held again, and says nothing new.
        updates = other.balloon.statistics.updates
        other.run(Role.STATISTICS)
        _index, ring = other.balloon.rings.find(Role.STATISTICS) or pytest.fail("no ring")
        assert ring.held is not None
        assert other.balloon.statistics.updates == updates


@pytest.mark.parametrize("change", ["one too many", "twice", "nowhere"])
def test_rings_that_cannot_be_are_refused(change: str) -> None:
    with InProcess() as guest:
        image = snapshot.parse(snapshot.gather(parts_of(guest), Done()))
        first = image.rings[0]
        other = {"one too many": first._replace(ring=5), "twice": first, "nowhere": first._replace(place=4)}
        rings = (*image.rings[int(change != "twice") :], other[change])
        with pytest.raises(RecordError, match="damaged"):
            snapshot.restore(parts_of(guest), replace(image, rings=rings), {})


def test_a_descriptor_that_is_missing_is_named() -> None:
    with InProcess() as guest, InProcess() as other:
        guest.start()
        held = descriptors(guest)
        image = snapshot.parse(snapshot.gather(parts_of(guest), Done()))
        held.pop(1).close()
        with pytest.raises(KeyError):
            snapshot.restore(parts_of(other), image, held)
        for fd in held.values():
            fd.close()


def test_the_largest_state_there_can_be_has_room() -> None:
    """32 regions, 5 rings, 256 statistics, the longest reply and names for every counter."""
    size = (
        32 * (4 + wire.REGION_STRUCT.size)
        + 5 * (4 + wire.RING_STRUCT.size)
        + 4 + 256 * STATISTIC_STRUCT.size
        + 4 + 12 + 12 + 256
        + 4 + MAX_COUNTERS * 80
        + 1024
    )  # fmt: skip
    assert size <= STATE_SIZE
    assert 4 + wire.TALLY_STRUCT.size + 8 * MAX_COUNTERS <= module.TALLY_SIZE


def test_a_successor_sees_the_rings_as_its_predecessor_did() -> None:
    """Of a driver that numbers as the text does, with one ring out of use: a ring of hints must not be taken for reports."""
    features = DEFAULT_FEATURES & ~Feature.STATS_VQ
    with InProcess(features=features) as guest, InProcess(memory=guest.memory, features=features) as other:
        guest.start([0, 1, 3, 4])
        guest.balloon.rings.give_up(4)
        assert guest.balloon.rings.role(3) is Role.FREE_PAGE_HINT
        held = descriptors(guest)
        image = snapshot.gather(parts_of(guest), Done())
        snapshot.restore(parts_of(other), snapshot.parse(image), held)
        assert [other.balloon.rings.role(index) for index in range(5)] == [
            guest.balloon.rings.role(index) for index in range(5)
        ]


def test_statistics_go_on_for_as_long_as_indices_run() -> None:
    """What a predecessor was told is an index, and they come round again: it is forgotten before any could be taken for it."""
    positions = (0, 1, *range(2**15 - 4, 2**15 + 5), *range(2**16 - 4, 2**16 + 4))
    with InProcess() as guest:
        guest.start()
        guest.memory.write(MIB, STATISTIC_STRUCT.pack(4, 99))
        statistics, started = guest.rings[Role.STATISTICS], guest.balloon.rings.started[Role.STATISTICS]
        started.answered_to = 0
        for answers, position in enumerate(positions):
            # As if all those in between had come and gone.
            statistics.next_available = started.queue.next_available = position & 0xFFFF
            statistics.offer([Buffer(MIB, 10)])
            guest.run(Role.STATISTICS)
            statistics.take_used()
            assert guest.balloon.statistics.updates == answers


def test_a_section_that_is_cut_off_is_left_out() -> None:
    whole = wire.section(Tag.INERT, b"why")
    assert list(wire.sections(whole + wire.SECTION_STRUCT.pack(Tag.REPLY, 9) + b"cut")) == [
        (Tag.INERT, b"why")
    ]


def test_the_last_numbers_there_are_can_be_written_again() -> None:
    """Of a record that somebody made up: of these no worker may die."""
    with InProcess() as guest:
        statistics = guest.balloon.statistics
        statistics.restore(b"", interval=1, due=(2**64 - 1) / 10**9, last_update=2**64 - 1, updates=2**64 - 1)
        statistics.updates += 1
        image = snapshot.parse(snapshot.gather(parts_of(guest), Done()))
        assert image.statistics == (1, 2**64 - 1, 2**64 - 1, 0)


@pytest.mark.parametrize("twice", ["region", "channel", "kick"])
def test_a_descriptor_that_two_would_own(twice: str) -> None:
    """No worker writes such a record: what one owner closes the other would use."""
    with InProcess() as guest, InProcess(memory=guest.memory) as other:
        guest.start()
        held = descriptors(guest)
        image = snapshot.parse(snapshot.gather(parts_of(guest), Done()))
        first = image.regions[0].token
        if twice == "region":
            image = replace(image, regions=(*image.regions, image.regions[0]))
        elif twice == "channel":
            image = replace(image, session=image.session._replace(channel=first))
        else:
            image = replace(image, rings=(image.rings[0]._replace(kick=first), *image.rings[1:]))
        with pytest.raises(RecordError, match="damaged"):
            snapshot.restore(parts_of(other), image, held)
        assert not any(fd.closed for fd in held.values())
        for fd in held.values():
            fd.close()


def test_a_counter_that_nothing_counts_to(record: Record) -> None:
    for count in ((1 << 63) + 1, (1 << 64) - 1):
        record.write_tally(TallyHeader(1, NO_RING, 0, 1), struct.pack("<Q", count))
        with pytest.raises(RecordError, match="damaged"):
            next(iter(record.tallies()))
