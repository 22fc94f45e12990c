"""The device model on real memory: what each queue's buffers do to guest pages, and what they must never do."""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence

import pytest

from hostdev.balloon import SLICE_CALLS
from hostdev.chains import MAX_PFN_BYTES, MAX_STATISTICS
from hostdev.driver import USER_BASE, Buffer, DriverRing, GuestMemory
from hostdev.errors import HostError, RingError
from hostdev.giver import MAX_HOST_ERRORS, SLICE_BYTES
from hostdev.memory import MemoryTable, Part
from hostdev.roles import ring_roles
from hostdev.target import Target
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import DEFAULT_FEATURES, STATISTIC, Config, Feature, Role, Statistic
from hostdev.wire.vhost_user import Request
from hostdev.wire.virtqueue import Descriptor
from tests.in_process import MIB, PAGE, InProcess

INFLATE, DEFLATE, STATISTICS, HINT, REPORTING = Role
FREE = 0x200000  # the first page that the tests give away
LIST = 0x180000  # where PFN lists and statistics lie


@pytest.fixture
def guest() -> Iterator[InProcess]:
    with InProcess(GuestMemory(16 * MIB)) as guest:
        guest.start()
        yield guest


def fill(guest: InProcess, address: int, length: int) -> None:
    guest.memory.write(address, b"\xaa" * length)


def report(guest: InProcess, *buffers: Buffer, indirect: bool = False) -> None:
    head = guest.rings[REPORTING].add(buffers, indirect=indirect)
    guest.run(REPORTING)
    assert guest.rings[REPORTING].take_used() == [(head, 0)]


def offered(address: int, length: int) -> Buffer:
    return Buffer(address, length, writable=True)


def send_pfns(guest: InProcess, ring: Role, pfns: Sequence[int], cuts: Sequence[int] = ()) -> int:
    """Send frame numbers, the list cut into buffers at the given bytes, which lie apart. Returns the head."""
    data = struct.pack(f"<{len(pfns)}I", *pfns)
    buffers = []
    for number, (start, end) in enumerate(zip((0, *cuts), (*cuts, len(data)), strict=True)):
        at = LIST + number * 0x10007
        guest.memory.write(at, data[start:end])
        buffers.append(Buffer(at, end - start))
    head = guest.rings[ring].add(buffers)
    guest.run(ring)
    return head


# Reporting


@pytest.mark.parametrize("indirect", [False, True])
def test_a_report_gives_pages_back(guest: InProcess, indirect: bool) -> None:
    fill(guest, FREE, 2 * MIB)
    assert guest.memory.footprint() >= 2 * MIB
    report(guest, offered(FREE, MIB), offered(FREE + MIB, MIB), indirect=indirect)
    assert guest.memory.footprint() <= 4 * PAGE  # the ring
    assert os.lseek(guest.memory.fd.fileno(), FREE, os.SEEK_HOLE) == FREE
    assert guest.metrics.value("released_bytes_total", "report", "remove") == 2 * MIB
    assert guest.metrics.value("chains_total", "reporting") == 1
    assert guest.metrics.value("buffers_total", "reporting") == 2
    assert guest.discarder.released == [(FREE, 2 * MIB)]


def test_pages_are_released_before_the_chain_is_returned(
    guest: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One moment later the guest may have written there again."""
    seen: list[tuple[int, int]] = []
    real = guest.discarder.release

    def release(region: object, offset: int, length: int) -> None:
        real(region, offset, length)  # type: ignore[arg-type]
        seen.append((guest.rings[REPORTING].used_index, guest.memory.footprint()))

    monkeypatch.setattr(guest.discarder, "release", release)
    fill(guest, FREE, MIB)
    fill(guest, FREE + 4 * MIB, MIB)
    guest.memory.write(LIST, b"alive")
    report(guest, offered(FREE, MIB), offered(FREE + 4 * MIB, MIB))
    held = guest.memory.footprint()
    assert seen == [(0, held + MIB), (0, held)]


@pytest.mark.parametrize("before", [0, 1, 4095])
@pytest.mark.parametrize("after", [0, 1, 4095])
def test_a_report_shrinks_to_whole_pages(guest: InProcess, before: int, after: int) -> None:
    """Bytes of pages that are only partly named keep their content."""
    fill(guest, FREE, 16 * PAGE)
    start, end = FREE + 4 * PAGE - before, FREE + 8 * PAGE + after
    report(guest, offered(start, end - start))
    assert guest.discarder.released == [(FREE + 4 * PAGE, 4 * PAGE)]
    assert guest.memory.read(FREE, 4 * PAGE) == b"\xaa" * 4 * PAGE
    assert guest.memory.read(FREE + 4 * PAGE, 4 * PAGE) == bytes(4 * PAGE)
    assert guest.memory.read(FREE + 8 * PAGE, 8 * PAGE) == b"\xaa" * 8 * PAGE


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 4095), (1, 4095), (1, 4096), (1, 8190), (0, 0)])
def test_less_than_a_page_gives_nothing_back(guest: InProcess, start: int, length: int) -> None:
    fill(guest, FREE, 4 * PAGE)
    report(guest, offered(FREE + start, length))
    assert guest.discarder.released == []
    assert guest.memory.read(FREE, 4 * PAGE) == b"\xaa" * 4 * PAGE


def test_overlapping_entries_are_released_once(guest: InProcess) -> None:
    fill(guest, FREE, MIB)
    entries = [(FREE + 2 * PAGE, 4 * PAGE), (FREE, 4 * PAGE), (FREE + PAGE, PAGE), (FREE + 6 * PAGE, PAGE)]
    report(guest, *(offered(*entry) for entry in entries))
    assert guest.discarder.released == [(FREE, 7 * PAGE)]


def test_halves_of_a_page_make_a_page(guest: InProcess) -> None:
    fill(guest, FREE, 2 * PAGE)
    report(guest, offered(FREE, 100), offered(FREE + 100, PAGE - 100))
    assert guest.discarder.released == [(FREE, PAGE)]


def test_readable_entries_are_not_a_report(guest: InProcess) -> None:
    fill(guest, FREE, MIB)
    report(guest, Buffer(FREE, MIB // 2), offered(FREE + MIB // 2, MIB // 2))
    assert guest.discarder.released == [(FREE + MIB // 2, MIB // 2)]
    report(guest, Buffer(FREE, MIB // 2))
    assert guest.memory.read(FREE, MIB // 2) == b"\xaa" * (MIB // 2)


@pytest.mark.parametrize(
    ("address", "length", "released"),
    [
        (16 * MIB - PAGE, 0xFFFFFFFF, [(16 * MIB - PAGE, PAGE)]),
        (16 * MIB, MIB, []),
        (1 << 63, MIB, []),
        ((1 << 64) - PAGE, 0xFFFFFFFF, []),
        ((1 << 64) - 1, 1, []),
    ],
)
def test_entries_outside_memory(
    guest: InProcess, address: int, length: int, released: list[tuple[int, int]]
) -> None:
    report(guest, offered(address, length))
    assert guest.discarder.released == released


def test_a_report_of_the_whole_guest_takes_the_rings_along(guest: InProcess) -> None:
    """The guest asks us to free our own rings: they read as zeroes, and the device lives."""
    fill(guest, FREE, MIB)
    guest.rings[REPORTING].add([offered(0, 16 * MIB)])
    guest.run(REPORTING)
    assert sum(length for _start, length in guest.discarder.released) == 16 * MIB
    assert guest.memory.footprint() <= 2 * PAGE  # the used element, written after
    guest.run(REPORTING)
    guest.run(INFLATE)
    assert guest.stop()[INFLATE] == 0


def test_regions_with_files_and_offsets_of_their_own() -> None:
    """One file behind two regions with a hole between: pages are found by the offset, and nothing past an edge."""
    regions = (
        wire.MemoryRegion(0, 4 * MIB, USER_BASE, 8 * MIB),
        wire.MemoryRegion(8 * MIB, 4 * MIB, USER_BASE + (1 << 40), 0),
    )
    with InProcess(GuestMemory(16 * MIB, regions)) as guest:
        guest.start()
        descriptor = guest.memory.fd.fileno()
        for offset in range(0, 16 * MIB, MIB):
            os.pwrite(descriptor, b"\xaa" * MIB, offset)
        # The rings were overwritten: set the indices back before use.
        guest.stop()
        for ring in guest.rings:
            guest.memory.write(ring.available, bytes(4))
            guest.memory.write(ring.used, bytes(4))
        guest.resume()
        report(guest, offered(3 * MIB, 6 * MIB + 5))
        assert guest.discarder.released == [(3 * MIB, MIB), (8 * MIB, MIB)]
        assert os.lseek(descriptor, 0, os.SEEK_HOLE) == 0
        assert os.lseek(descriptor, 0, os.SEEK_DATA) == MIB
        assert os.lseek(descriptor, MIB, os.SEEK_HOLE) == 11 * MIB
        assert os.lseek(descriptor, 11 * MIB, os.SEEK_DATA) == 12 * MIB


# Poison


@pytest.mark.parametrize(("negotiated", "released"), [(True, 0), (False, MIB)])
def test_poisoned_pages_are_kept_when_poisoning_is_negotiated(negotiated: bool, released: int) -> None:
    features = DEFAULT_FEATURES if negotiated else DEFAULT_FEATURES & ~Feature.PAGE_POISON
    with InProcess(GuestMemory(16 * MIB), features=features) as guest:
        guest.start()
        guest.write_config(Config(poison_val=0xAAAAAAAA))
        fill(guest, FREE, MIB)
        report(guest, offered(FREE, MIB))
        assert guest.metrics.value("released_bytes_total") == released
        assert guest.metrics.value("withheld_bytes_total", "report", "poison") == MIB - released
        assert guest.memory.read(FREE, 1) == (b"\0" if released else b"\xaa")
        guest.write_config(Config(poison_val=0))
        report(guest, offered(FREE, MIB))
        assert guest.memory.read(FREE, MIB) == bytes(MIB)


def test_inflation_gives_back_poisoned_pages_too(guest: InProcess) -> None:
    guest.write_config(Config(poison_val=0xAAAAAAAA))
    fill(guest, FREE, PAGE)
    send_pfns(guest, INFLATE, [FREE // PAGE])
    assert guest.discarder.released == [(FREE, PAGE)]


# Inflate and deflate


@pytest.mark.parametrize("cuts", [(), (3,), (3, 5), (1, 2, 3), (8,), (4, 12)])
def test_frame_numbers_over_any_split(guest: InProcess, cuts: tuple[int, ...]) -> None:
    first = FREE // PAGE
    fill(guest, FREE, 8 * PAGE)
    head = send_pfns(guest, INFLATE, [first, first + 2, first + 3, first + 6], cuts)
    assert guest.rings[INFLATE].take_used() == [(head, 0)]
    assert guest.discarder.released == [
        (FREE, PAGE),
        (FREE + 2 * PAGE, 2 * PAGE),
        (FREE + 6 * PAGE, PAGE),
    ]


def test_duplicates_and_frames_outside_memory(guest: InProcess) -> None:
    first = FREE // PAGE
    pfns = [0xFFFFFFFF, first, first, 16 * MIB // PAGE, first + 1, first, 0x80000000]
    send_pfns(guest, INFLATE, pfns)
    assert guest.discarder.released == [(FREE, 2 * PAGE)]


@pytest.mark.parametrize("length", [0, 1, 3])
def test_less_than_a_frame_number(guest: InProcess, length: int) -> None:
    head = guest.rings[INFLATE].add([Buffer(LIST, length)])
    guest.run(INFLATE)
    assert guest.rings[INFLATE].take_used() == [(head, 0)]
    assert guest.discarder.released == []


def test_the_odd_bytes_of_a_list_are_left_out(guest: InProcess) -> None:
    guest.memory.write(LIST, struct.pack("<II", FREE // PAGE, FREE // PAGE + 1))
    guest.rings[INFLATE].add([Buffer(LIST, 7)])
    guest.run(INFLATE)
    assert guest.discarder.released == [(FREE, PAGE)]


def test_writable_buffers_name_no_frames(guest: InProcess) -> None:
    """Direction is checked as well as the ring: a report that lands on the inflate queue frees nothing."""
    fill(guest, FREE, MIB)
    guest.rings[INFLATE].add([offered(FREE, MIB)])
    guest.run(INFLATE)
    assert guest.discarder.released == []


def test_a_list_outside_memory_is_returned_unused(guest: InProcess) -> None:
    ring = guest.rings[INFLATE]
    heads = [ring.add([Buffer(1 << 40, 4)]), ring.add([Buffer(16 * MIB - 2, 4)])]
    heads.append(send_pfns(guest, INFLATE, [FREE // PAGE]))
    assert ring.take_used() == [(head, 0) for head in heads]
    assert guest.metrics.value("guest_errors_total", "outside") == 2
    assert guest.discarder.released == [(FREE, PAGE)]


def test_an_empty_buffer_at_a_bad_address_is_skipped(guest: InProcess) -> None:
    guest.memory.write(LIST, struct.pack("<I", FREE // PAGE))
    guest.rings[INFLATE].add([Buffer(1 << 60, 0), Buffer(LIST, 4)])
    guest.run(INFLATE)
    assert guest.discarder.released == [(FREE, PAGE)]


@pytest.mark.parametrize("extra", [0, 4])
def test_a_list_is_read_up_to_its_bound(extra: int) -> None:
    """The bound itself is no error; what is over it is left out and counted."""
    with InProcess(GuestMemory(256 * MIB)) as guest:
        guest.start()
        count = MAX_PFN_BYTES // 4 + extra // 4
        guest.memory.write(8 * MIB, struct.pack(f"<{count}I", *(32768 + n for n in range(count))))
        guest.rings[INFLATE].add([Buffer(8 * MIB, 4 * count)])
        guest.run(INFLATE)
        assert sum(length for _start, length in guest.discarder.released) == MAX_PFN_BYTES // 4 * PAGE
        assert guest.metrics.value("guest_errors_total", "pfn-limit") == extra // 4


def test_deflation_counts_and_releases_nothing(guest: InProcess) -> None:
    fill(guest, FREE, 4 * PAGE)
    head = send_pfns(guest, DEFLATE, [FREE // PAGE, FREE // PAGE + 1])
    assert guest.rings[DEFLATE].take_used() == [(head, 0)]
    assert guest.metrics.value("deflated_pages_total") == 2
    assert guest.discarder.released == []


def test_inflating_and_deflating_in_any_order(guest: InProcess) -> None:
    pfns = [FREE // PAGE]
    for ring in (DEFLATE, INFLATE, INFLATE, DEFLATE, INFLATE):
        fill(guest, FREE, PAGE)
        send_pfns(guest, ring, pfns)
        assert guest.memory.read(FREE, 1) == (b"\0" if ring is INFLATE else b"\xaa")


def test_hints_are_answered_and_released_never(guest: InProcess) -> None:
    fill(guest, FREE, MIB)
    guest.memory.write(LIST, struct.pack("<I", 2))
    heads = [guest.rings[HINT].add([Buffer(LIST, 4)]), guest.rings[HINT].add([offered(FREE, MIB)])]
    guest.run(HINT)
    assert guest.rings[HINT].take_used() == [(head, 0) for head in heads]
    assert guest.memory.read(FREE, MIB) == b"\xaa" * MIB


# Statistics


def send_statistics(guest: InProcess, *statistics: Statistic, extra: bytes = b"") -> int:
    data = b"".join(map(STATISTIC.encode, statistics)) + extra
    guest.memory.write(LIST, data)
    head = guest.rings[STATISTICS].add([Buffer(LIST, len(data))])
    guest.run(STATISTICS)
    return head


def test_the_statistics_buffer_is_held(guest: InProcess) -> None:
    send_statistics(guest, Statistic(4, 1000), Statistic(5, 2000), extra=b"odd")
    assert guest.balloon.statistics.values == {4: 1000, 5: 2000}
    assert guest.rings[STATISTICS].take_used() == []


def test_a_second_statistics_buffer_gives_the_first_back(guest: InProcess) -> None:
    first = send_statistics(guest, Statistic(4, 1))
    second = send_statistics(guest, Statistic(4, 2), Statistic(0xFFFF, 3), Statistic(4, 5))
    assert guest.rings[STATISTICS].take_used() == [(first, 0)]
    assert guest.balloon.statistics.values == {4: 5, 0xFFFF: 3}
    assert guest.stop()[STATISTICS] == 1
    assert second != first


def test_a_held_statistics_buffer_is_offered_again_after_a_stop(guest: InProcess) -> None:
    send_statistics(guest, Statistic(4, 1))
    bases = guest.stop()
    assert bases[STATISTICS] == 0
    guest.memory.write(LIST, STATISTIC.encode(Statistic(4, 9)))
    guest.resume(bases=bases)
    guest.run(STATISTICS)
    assert guest.balloon.statistics.values == {4: 9}
    assert guest.rings[STATISTICS].take_used() == []


def test_a_bad_statistics_buffer_gives_the_held_one_back_first(guest: InProcess) -> None:
    """Else the base would count back to the bad one, and the held one would never be returned."""
    ring = guest.rings[STATISTICS]
    held = send_statistics(guest, Statistic(4, 1))
    bad = ring.add([Buffer(1 << 40, 10)])
    guest.run(STATISTICS)
    assert ring.take_used() == [(held, 0), (bad, 0)]
    assert guest.stop()[STATISTICS] == 2


def test_statistics_are_read_up_to_their_bound(guest: InProcess) -> None:
    send_statistics(guest, *(Statistic(tag, tag) for tag in range(2 * MAX_STATISTICS)))
    assert len(guest.balloon.statistics.values) == MAX_STATISTICS


# Roles


ALL = Feature.STATS_VQ | Feature.FREE_PAGE_HINT | Feature.REPORTING


@pytest.mark.parametrize(
    ("features", "configured", "roles"),
    [
        (ALL, range(5), dict(enumerate(Role))),
        (Feature(0), range(2), {0: INFLATE, 1: DEFLATE}),
        (Feature.REPORTING, (0, 1, 2), {0: INFLATE, 1: DEFLATE, 2: REPORTING}),
        (Feature.REPORTING, (0, 1, 4), {0: INFLATE, 1: DEFLATE, 4: REPORTING}),
        (
            Feature.STATS_VQ | Feature.REPORTING,
            (0, 1, 2, 3),
            {0: INFLATE, 1: DEFLATE, 2: STATISTICS, 3: REPORTING},
        ),
        (
            Feature.STATS_VQ | Feature.REPORTING,
            (0, 1, 2, 4),
            {0: INFLATE, 1: DEFLATE, 2: STATISTICS, 4: REPORTING},
        ),
        (Feature.FREE_PAGE_HINT, (0, 1, 3), {0: INFLATE, 1: DEFLATE, 3: HINT}),
    ],
)
def test_roles(features: Feature, configured: Sequence[int], roles: dict[int, Role]) -> None:
    assert ring_roles(features, configured) == roles


@pytest.mark.parametrize("number", [3, 4])
def test_a_report_is_found_under_either_numbering(number: int) -> None:
    features = DEFAULT_FEATURES & ~Feature.FREE_PAGE_HINT
    with InProcess(GuestMemory(16 * MIB), features=features) as guest:
        guest.start([0, 1, 2, number])
        fill(guest, FREE, MIB)
        guest.rings[number].add([offered(FREE, MIB)])
        guest.run(number)
        assert guest.discarder.released == [(FREE, MIB)]


@pytest.mark.parametrize("how", ["stranded", "broken"])
def test_hints_never_become_reports(how: str) -> None:
    """A driver that numbers by the text, without statistics: ring 4 shows that, also while it is not running."""
    features = DEFAULT_FEATURES & ~Feature.STATS_VQ
    low, high = (
        wire.MemoryRegion(0, 8 * MIB, USER_BASE, 0),
        wire.MemoryRegion(8 * MIB, 8 * MIB, USER_BASE + 8 * MIB, 8 * MIB),
    )
    with InProcess(GuestMemory(16 * MIB, [low, high]), features=features) as guest:
        if how == "stranded":
            guest.rings[REPORTING] = DriverRing(guest.memory, REPORTING, 128, 8 * MIB)
        guest.start([INFLATE, DEFLATE, HINT, REPORTING])
        if how == "stranded":
            guest.request(Request.REM_MEM_REG, wire.SingleRegion(0, high))
            assert REPORTING in guest.balloon.rings.stranded
        else:
            guest.rings[REPORTING].set_available_index(5000)
            guest.run(REPORTING)
            guest.request(Request.REM_MEM_REG, wire.SingleRegion(0, high))
        fill(guest, FREE, MIB)
        guest.rings[HINT].add([offered(FREE, MIB)])
        guest.run(HINT)
        assert guest.balloon.rings.role(HINT) is Role.FREE_PAGE_HINT
        assert guest.discarder.released == []


def test_a_ring_without_a_role_is_answered() -> None:
    with InProcess(GuestMemory(16 * MIB), features=Feature.VERSION_1 | Feature.REPORTING) as guest:
        guest.start([0, 1, 3, 4])
        fill(guest, FREE, MIB)
        head = guest.rings[3].add([offered(FREE, MIB)])
        guest.run(3)
        assert guest.rings[3].take_used() == [(head, 0)]
        assert guest.discarder.released == []
        assert guest.metrics.value("chains_total", "unknown") == 1


# Config space


def test_a_driver_writes_actual_and_poison_alone(guest: InProcess) -> None:
    guest.balloon.space.set_target(Target(size=16 * MIB - 7 * PAGE), guest.balloon.memory.span())
    guest.write_config(Config(num_pages=99, actual=3, free_page_hint_cmd_id=99, poison_val=5))
    assert guest.read_config() == Config(num_pages=7, actual=3, free_page_hint_cmd_id=0, poison_val=5)


def test_a_write_to_one_field_leaves_the_others(guest: InProcess) -> None:
    guest.write_config(Config(actual=3, poison_val=5))
    guest.balloon.write_config(4, (8).to_bytes(4, "little"))
    assert guest.read_config() == Config(actual=8, poison_val=5)
    guest.balloon.write_config(13, b"\x01")
    assert guest.read_config() == Config(actual=8, poison_val=0x105)


# Rings that break, hosts that refuse, our own faults


def test_a_broken_ring_stops_and_the_others_go_on(guest: InProcess) -> None:
    ring = guest.rings[REPORTING]
    ring.add([offered(FREE, PAGE)])
    guest.run(REPORTING)
    ring.set_available_index(ring.next_available + ring.size + 1)
    with pytest.raises(RingError, match="ring 4"):
        guest.step(REPORTING)
    assert guest.metrics.value("guest_errors_total", "ring") == 1
    assert not guest.step(REPORTING).more
    send_pfns(guest, INFLATE, [FREE // PAGE])
    assert len(guest.discarder.released) == 2
    assert guest.stop()[REPORTING] == 1


def test_a_malformed_chain_is_returned_and_counted(guest: InProcess) -> None:
    ring = guest.rings[REPORTING]
    ring.write_descriptor(0, Descriptor(FREE, PAGE, 3, 0))
    ring.publish(0)
    guest.run(REPORTING)
    assert ring.take_used() == [(0, 0)]
    assert guest.metrics.value("guest_errors_total", "loop") == 1
    assert guest.discarder.released == []


def _refusal(code: int) -> HostError:
    error = HostError("the host refuses")
    error.__cause__ = OSError(code, os.strerror(code))
    return error


def test_the_host_refusing_now_and_then_does_no_harm(guest: InProcess) -> None:
    for turn in range(3 * MAX_HOST_ERRORS):
        guest.discarder.error = _refusal(errno.ENOMEM) if turn % MAX_HOST_ERRORS else None
        report(guest, offered(FREE, PAGE))
    assert not guest.balloon.inert
    assert guest.metrics.value("host_errors_total", str(errno.ENOMEM)) == 3 * MAX_HOST_ERRORS - 3
    assert (
        guest.metrics.value("withheld_bytes_total", "report", "host-error")
        == (3 * MAX_HOST_ERRORS - 3) * PAGE
    )


def test_the_host_refusing_again_and_again_makes_it_inert(guest: InProcess) -> None:
    guest.discarder.error = _refusal(errno.EPERM)
    for turn in range(MAX_HOST_ERRORS):
        assert not guest.balloon.inert, turn
        report(guest, offered(FREE, PAGE))
    assert guest.balloon.inert
    assert guest.metrics.gauges["inert"] == 1
    guest.discarder.error = None
    fill(guest, FREE, PAGE)
    report(guest, offered(FREE, PAGE))
    send_pfns(guest, INFLATE, [FREE // PAGE])
    assert guest.memory.read(FREE, PAGE) == b"\xaa" * PAGE
    assert guest.metrics.value("withheld_bytes_total", "report", "inert") == PAGE
    assert guest.metrics.value("withheld_bytes_total", "inflate", "inert") == PAGE


def test_inert_is_said_once(guest: InProcess, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        guest.balloon.make_inert("the first reason")
        guest.balloon.make_inert("the second reason")
    assert [record.getMessage() for record in caplog.records] == [
        "the device is inert from now on, it answers and releases nothing: the first reason"
    ]


@pytest.mark.parametrize("where", ["of", "give"])
def test_an_error_of_ours_loses_no_chain(
    guest: InProcess, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The guest waits for its report uninterruptibly: tried again after being made inert, it is answered."""

    def fail(*_arguments: object) -> None:
        raise ZeroDivisionError

    head = guest.rings[REPORTING].add([offered(FREE, MIB)])
    with monkeypatch.context() as patch:
        patch.setattr(guest.balloon._jobs if where == "of" else guest.balloon.giver, where, fail)
        with pytest.raises(ZeroDivisionError):
            guest.step(REPORTING)
    guest.balloon.make_inert("an error of ours")
    guest.run(REPORTING)
    assert guest.rings[REPORTING].take_used() == [(head, 0)]


# Slices, and what may come in between


@pytest.fixture
def large() -> Iterator[InProcess]:
    """1 GiB of which nothing is resident, and a report of 512 MiB on its way, one slice of it done."""
    with InProcess(GuestMemory(1024 * MIB)) as guest:
        guest.start()
        guest.rings[REPORTING].add(
            [offered(256 * MIB + n * 4 * MIB, 4 * MIB) for n in range(127, -1, -1)], indirect=False
        )
        step = guest.step(REPORTING)
        assert step.more
        assert not step.returned
        yield guest


def _released(guest: InProcess) -> int:
    return sum(length for _start, length in guest.discarder.released)


def test_a_large_report_goes_in_slices(large: InProcess) -> None:
    done = [_released(large)]
    while large.step(REPORTING).more and not large.rings[REPORTING].used_index:
        done.append(_released(large))
    assert done == [SLICE_BYTES * n for n in range(1, 16)]
    assert _released(large) == 512 * MIB
    assert len(large.rings[REPORTING].take_used()) == 1


@pytest.mark.parametrize("how", ["base", "memory", "both"])
def test_stopping_abandons_the_chain(large: InProcess, how: str) -> None:
    """Nothing more of it is released, the base names it, and after a resume it is processed again."""
    ring = large.rings[REPORTING]
    if how != "base":
        large.status(
            Request.ADD_MEM_REG,
            wire.SingleRegion(0, wire.MemoryRegion(1 << 40, PAGE, 1 << 40, 0)),
            [GuestMemory(PAGE).fd],
        )
    if how != "memory":
        bases = large.stop()
        assert bases[REPORTING] == 0
        assert large.run(REPORTING) == 0
        assert _released(large) == SLICE_BYTES
        large.resume(bases=bases)
    assert ring.used_index == 0
    large.run(REPORTING)
    assert _released(large) == SLICE_BYTES + 512 * MIB
    assert len(ring.take_used()) == 1


def test_nothing_is_written_after_the_base_is_answered(large: InProcess) -> None:
    large.stop()
    before = large.memory.read(0, 2 * MIB)
    for index in range(5):
        assert large.run(index) == 0
    assert large.memory.read(0, 2 * MIB) == before


def test_scattered_pages_go_in_slices_too(guest: InProcess) -> None:
    pfns = [FREE // PAGE + 2 * n for n in range(600)]
    guest.memory.write(LIST, struct.pack("<600I", *pfns))
    guest.rings[INFLATE].add([Buffer(LIST, 2400)])
    counts = []
    while not guest.rings[INFLATE].used_index:
        guest.step(INFLATE)
        counts.append(len(guest.discarder.released))
    assert counts == [256, 512, 600]


def test_a_step_works_out_no_more_than_it_releases(guest: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """16384 scattered frames would take 70 ms to place all at once, and a message would wait for it."""
    asked: list[int] = []
    real = MemoryTable.split

    def split(table: MemoryTable, address: int, length: int) -> Iterator[Part]:
        asked.append(address)
        return real(table, address, length)

    monkeypatch.setattr(MemoryTable, "split", split)
    pfns = [FREE // PAGE + 2 * n for n in range(600)]
    guest.memory.write(LIST, struct.pack("<600I", *pfns))
    guest.rings[INFLATE].add([Buffer(LIST, 2400)])
    guest.step(INFLATE)
    assert len(asked) <= SLICE_CALLS + 2  # the list itself, and a look ahead


# A memory table that changes under running rings


def _split(memory: GuestMemory, at: int) -> tuple[wire.MemoryRegion, wire.MemoryRegion]:
    return (
        wire.MemoryRegion(0, at, USER_BASE, 0),
        wire.MemoryRegion(at, memory.size - at, USER_BASE + at, at),
    )


def test_a_ring_waits_for_its_region_to_come_back(guest: InProcess) -> None:
    """QEMU changes a region by REM_MEM_REG and ADD_MEM_REG while the rings run."""
    fill(guest, FREE, MIB)
    low, high = _split(guest.memory, 8 * MIB)
    guest.status(Request.REM_MEM_REG, wire.SingleRegion(0, guest.memory.regions[0]))
    guest.rings[REPORTING].add([offered(FREE, MIB)])
    assert guest.run(REPORTING) == 0
    for region in (high, low):
        assert guest.status(Request.ADD_MEM_REG, wire.SingleRegion(0, region), [guest.memory.fd]) == 0
    guest.run(REPORTING)
    assert guest.discarder.released == [(FREE, MIB)]
    assert guest.stop()[REPORTING] == 1


def test_a_waiting_ring_knows_its_base(guest: InProcess) -> None:
    report(guest, offered(FREE, PAGE))
    send_statistics(guest, Statistic(1, 1))
    guest.status(Request.REM_MEM_REG, wire.SingleRegion(0, guest.memory.regions[0]))
    assert guest.stop() == {0: 0, 1: 0, 2: 0, 3: 0, 4: 1}


@pytest.mark.parametrize(
    "change",
    [
        lambda guest: guest.status(
            Request.SET_MEM_TABLE,
            wire.MemoryTable(2, 0, _split(guest.memory, 8 * MIB)),
            [guest.memory.fd, guest.memory.fd],
        ),
        lambda guest: guest.status(
            Request.ADD_MEM_REG,
            wire.SingleRegion(0, wire.MemoryRegion(1 << 40, MIB, 1 << 40, 0)),
            [GuestMemory(MIB).fd],
        ),
    ],
)
def test_rings_go_on_in_a_new_table(guest: InProcess, change: Callable[[InProcess], int]) -> None:
    report(guest, offered(FREE, PAGE))
    assert change(guest) == 0
    report(guest, offered(FREE + PAGE, PAGE))
    assert len(guest.discarder.released) == 2
