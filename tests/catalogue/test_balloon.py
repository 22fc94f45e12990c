"""Cases 39 to 45: what a driver says by its balloon's queues and config space, right in form and wrong in meaning."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from hostdev.chains import MAX_PFN_BYTES, MAX_STATISTICS
from hostdev.driver import DEADLINE, Buffer, DriverRing, GuestMemory
from hostdev.estimates import PAUSE_SECONDS
from hostdev.frontend import DeviceProcess, Frontend, start_device
from hostdev.hinting import ID_DONE, ID_STOP
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import STATISTIC, Config, Statistic
from hostdev.wire.control import Kind
from hostdev.wire.vhost_user import MemoryRegion, Request
from tests.catalogue.acts import (
    DEFLATE,
    FREE,
    HINT,
    INFLATE,
    LIST,
    REPORTING,
    STATISTICS,
    fill,
    finish,
    is_empty,
    is_filled,
    offered,
    report,
    send_pfns,
    status,
    still_inflates,
    still_serves,
)
from tests.in_process import MIB, PAGE, InProcess

MEMORY = 64 * MIB


def offer_list(guest: Frontend, *buffers: Buffer, role: int = INFLATE) -> int:
    ring = guest.rings[role]
    return finish(guest, ring, ring.add(buffers))


# 39. Inflation


def test_case_39_lists_of_any_length(guest: Frontend) -> None:
    """Whole numbers count, what is left over does not; a list of no whole number is returned like any other."""
    guest.memory.write(LIST, struct.pack("<II", FREE // PAGE, FREE // PAGE + 1))
    for length in (0, 1, 2, 3):
        fill(guest, FREE, 2 * PAGE)
        assert offer_list(guest, Buffer(LIST, length)) == 0
        assert is_filled(guest, FREE, 2 * PAGE)
    for length in (4, 5, 7):
        fill(guest, FREE, 2 * PAGE)
        assert offer_list(guest, Buffer(LIST, length)) == 0
        assert is_empty(guest, FREE, PAGE)
        assert is_filled(guest, FREE + PAGE, PAGE)
    still_serves(guest)


def test_case_39_a_list_of_four_gibibytes(guest: Frontend) -> None:
    """It is read up to its bound; where that is not all memory, it is returned unused."""
    # Cloud Hypervisor cfec13077: a length that drove a loop, and a line in the log each time.
    # CVE-2016-7422: a length that nobody had a bound for.
    count = MAX_PFN_BYTES // 4
    guest.memory.write(32 * MIB, struct.pack(f"<{count}I", *[FREE // PAGE] * (count - 1), 48 * MIB // PAGE))
    guest.memory.write(32 * MIB + 4 * count, struct.pack("<I", 49 * MIB // PAGE))
    for length in (0xFFFFFFFC, 0xFFFFFFFF, MAX_PFN_BYTES + 4):
        fill(guest, FREE, PAGE)
        fill(guest, 48 * MIB, 2 * MIB)
        assert offer_list(guest, Buffer(32 * MIB, length)) == 0
        assert is_empty(guest, FREE, PAGE)
        assert is_empty(guest, 48 * MIB, PAGE)
        assert is_filled(guest, 49 * MIB, PAGE)
        fill(guest, FREE, PAGE)
        assert offer_list(guest, Buffer(MEMORY - PAGE, length)) == 0
        assert is_filled(guest, FREE, PAGE)
    still_inflates(guest)


def test_case_39_frames_that_are_no_memory() -> None:
    """Of a ROM, of a device's window, past the end, and the last one there is: passed over, and the rest is done."""
    regions = [MemoryRegion(0, 0xA0000, 1 << 44, 0), MemoryRegion(0x100000, 31 * MIB, 1 << 45, MIB)]
    with (
        start_device() as device,
        Frontend(device.connect(), memory=GuestMemory(32 * MIB, regions), rings_at=0x400000) as guest,
    ):
        guest.start()
        fill(guest, FREE, 2 * PAGE)
        no_memory = [
            0xA0,
            0xBF,
            0xC0,
            0xFF,
            32 * MIB // PAGE,
            0xFEC00,
            0xFFFFF,
            0x7FFFFFFF,
            0x80000000,
            0xFFFFFFFF,
        ]
        held = guest.memory.footprint()
        assert send_pfns(guest, no_memory) == 0
        assert guest.memory.footprint() >= held
        assert send_pfns(guest, [*no_memory, FREE // PAGE, *no_memory]) == 0
        assert is_empty(guest, FREE, PAGE)
        assert is_filled(guest, FREE + PAGE, PAGE)
        still_serves(guest)


def test_case_39_a_frame_twice_is_released_once(local: InProcess) -> None:
    first = FREE // PAGE
    fill(local, FREE, 3 * PAGE)
    assert send_pfns(local, [first + 1, first, first + 1, *[first] * 500]) == 0
    assert local.discarder.released == [(FREE, 2 * PAGE)]
    still_serves(local)


def many(guest: Frontend, size: int) -> DriverRing:
    """The largest ring there is, full of chains of no bytes: as many as can be queued at once."""
    bases = guest.stop()
    guest.rings[DEFLATE].close()
    ring = guest.rings[DEFLATE] = DriverRing(guest.memory, DEFLATE, size, 4 * MIB)
    guest.memory.write(ring.descriptors, struct.pack("<QIHH", LIST, 4, 0, 0) * size)
    guest.memory.write(ring.available, struct.pack(f"<HH{size}H", 0, size, *range(size)))
    guest.resume(bases=bases | {int(DEFLATE): 0})
    return ring


def test_case_39_a_ring_full_of_work_is_done_in_steps() -> None:
    """A chain a step, whatever is queued: there is a look for messages and at the other rings in between."""
    # CVE-2019-3900: a guest that keeps one ring busy, and a loop that ends when there is nothing left in it.
    # CVE-2016-5403: requests without end, and memory for each; here one chain is in hand.
    with InProcess(GuestMemory(MEMORY)) as guest:
        guest.start()
        ring = many(guest, 32768)
        for done in range(1, 51):
            step = guest.step(DEFLATE)
            assert (step.returned, step.more, ring.used_index) == (True, True, done)
        still_serves(guest)


@pytest.mark.parametrize(
    ("size", "rounds"),
    [(4096, 2), pytest.param(32768, 31, marks=[pytest.mark.full, pytest.mark.timeout(900)])],
)
def test_case_39_a_million_chains(device: DeviceProcess, guest: Frontend, size: int, rounds: int) -> None:
    """As many at a time as a ring holds: messages are answered and the other rings served while they are worked off."""
    (worker,) = device.workers()
    for turn in range(rounds):
        ring = many(guest, size)
        while ring.used_index < ring.size:
            still_serves(guest)
            assert guest.read_config().num_pages == 0
        assert guest.request(Request.GET_VRING_BASE, wire.VringState(DEFLATE, 0)).num == size, turn
        guest.memory.write(ring.used, bytes(4))
    assert device.workers() == [worker]
    still_inflates(guest)


# 40. A list in pieces


@pytest.mark.parametrize("indirect", [False, True])
def test_case_40_a_list_in_pieces(guest: Frontend, indirect: bool) -> None:
    """Cut anywhere, at odd bytes, with empty pieces in between: gathered, and nothing of it is lost."""
    # Cloud Hypervisor 52db3f865: of a chain only the first descriptor was read.
    # CVE-2022-2132: a header that is spread over more descriptors than were thought of.
    frames = [FREE // PAGE + 2 * n for n in range(8)]
    data = struct.pack("<8I", *frames)
    for lengths in ((3, 5, 24), (1,) * 32, (31, 1), (1, 31), (0, 3, 0, 29), (7, 7, 7, 7, 4)):
        fill(guest, FREE, 16 * PAGE)
        buffers, at = [], 0
        for number, length in enumerate(lengths):
            address = LIST + 0x101 * number
            guest.memory.write(address, data[at : at + length])
            buffers.append(Buffer(address, length))
            at += length
        ring = guest.rings[INFLATE]
        assert finish(guest, ring, ring.add(buffers, indirect=indirect)) == 0
        for number in range(16):
            state = is_filled if number % 2 else is_empty
            assert state(guest, FREE + number * PAGE, PAGE), (lengths, number)
    still_serves(guest)


# 41. Reports


def test_case_41_parts_of_pages_are_left(guest: Frontend) -> None:
    for start, length in ((0, 1), (0, 4095), (1, 4095), (1, 4096), (1, 8190), (4095, 2), (2048, 4096)):
        fill(guest, FREE, 4 * PAGE)
        assert report(guest, offered(FREE + start, length)) == 0
        assert is_filled(guest, FREE, 4 * PAGE), (start, length)
    for start, length in ((4095, 4098), (1, 8191), (4096, 4096), (4000, 8191)):
        fill(guest, FREE, 4 * PAGE)
        assert report(guest, offered(FREE + start, length)) == 0
        assert is_filled(guest, FREE, PAGE), (start, length)
        assert is_empty(guest, FREE + PAGE, PAGE), (start, length)
        assert is_filled(guest, FREE + 2 * PAGE, 2 * PAGE), (start, length)
    still_serves(guest)


def test_case_41_overlapping_entries(local: InProcess) -> None:
    """What several name is released once, and what they only name together is named."""
    fill(local, FREE, 16 * PAGE)
    entries = [
        (2 * PAGE, 4 * PAGE),
        (0, 4 * PAGE),
        (PAGE, PAGE),
        (6 * PAGE, 100),
        (6 * PAGE + 100, PAGE - 100),
    ]
    assert report(local, *(offered(FREE + start, length) for start, length in entries)) == 0
    assert local.discarder.released == [(FREE, 7 * PAGE)]
    assert is_filled(local, FREE + 7 * PAGE, 9 * PAGE)
    still_serves(local)


def test_case_41_four_gibibytes_less_one(guest: Frontend) -> None:
    fill(guest, MEMORY - 4 * PAGE, 4 * PAGE)
    fill(guest, FREE, PAGE)
    assert report(guest, offered(MEMORY - 4 * PAGE + 1, 0xFFFFFFFF)) == 0
    assert is_filled(guest, MEMORY - 4 * PAGE, PAGE)
    assert is_empty(guest, MEMORY - 3 * PAGE, 3 * PAGE)
    assert is_filled(guest, FREE, PAGE)
    still_serves(guest)


def test_case_41_the_whole_guest() -> None:
    """Its rings are in it: the report is answered with what is left of them, and the other rings are served."""
    with InProcess(GuestMemory(MEMORY)) as guest:
        guest.start()
        fill(guest, FREE, 8 * MIB)
        guest.rings[REPORTING].add([offered(0, 0xFFFFFFFF)])
        guest.run(REPORTING)
        assert sum(length for _start, length in guest.discarder.released) == MEMORY
        assert is_empty(guest, FREE, 8 * MIB)
        assert REPORTING not in guest.balloon.rings.started
        still_inflates(guest)


def test_case_41_readable_entries_are_no_report(guest: Frontend) -> None:
    """5.5.6.5: pages are offered as writable buffers. A list of frames, or statistics, that come here free nothing."""
    fill(guest, FREE, 4 * PAGE)
    assert report(guest, Buffer(FREE, 4 * PAGE)) == 0
    assert is_filled(guest, FREE, 4 * PAGE)
    assert report(guest, Buffer(FREE, 2 * PAGE), offered(FREE + 2 * PAGE, PAGE)) == 0
    assert is_filled(guest, FREE, 2 * PAGE)
    assert is_empty(guest, FREE + 2 * PAGE, PAGE)
    assert is_filled(guest, FREE + 3 * PAGE, PAGE)
    still_serves(guest)


# 42. Deflation


def test_case_42_in_any_order(guest: Frontend) -> None:
    """The device keeps no list of what is in the balloon: nothing can be taken back that was not there."""
    frames = [FREE // PAGE, FREE // PAGE + 1]
    for role in (DEFLATE, DEFLATE, INFLATE, INFLATE, DEFLATE, INFLATE, DEFLATE):
        fill(guest, FREE, 2 * PAGE)
        assert send_pfns(guest, frames, role) == 0
        state = is_empty if role is INFLATE else is_filled
        assert state(guest, FREE, 2 * PAGE)
    assert send_pfns(guest, [0xFFFFFFFF, 0, 1 << 31], DEFLATE) == 0
    still_serves(guest)


def test_case_42_deflated_before_the_inflation_is_answered(local: InProcess) -> None:
    """Two rings, no order between them: the deflation is answered, and the inflation releases what it names."""
    fill(local, FREE, PAGE)
    local.memory.write(LIST, struct.pack("<I", FREE // PAGE))
    inflating, deflating = local.rings[INFLATE], local.rings[DEFLATE]
    first = inflating.add([Buffer(LIST, 4)])
    assert finish(local, deflating, deflating.add([Buffer(LIST, 4)])) == 0
    assert (inflating.used_index, is_filled(local, FREE, PAGE)) == (0, True)
    assert finish(local, inflating, first) == 0
    assert is_empty(local, FREE, PAGE)
    assert local.metrics.value("deflated_pages_total") == 1
    still_serves(local)


# 43. Statistics


def send_statistics(guest: InProcess, *figures: tuple[int, int], extra: bytes = b"") -> int:
    data = b"".join(STATISTIC.encode(Statistic(*figure)) for figure in figures) + extra
    guest.memory.write(FREE, data)
    head = guest.rings[STATISTICS].add([Buffer(FREE, len(data))])
    guest.run(STATISTICS)
    return head


@pytest.mark.parametrize("extra", [1, 2, 6, 9])
def test_case_43_a_rest_that_is_no_entry(local: InProcess, extra: int) -> None:
    """An entry has 10 bytes (the text's "multiple of 6" is an erratum); what is left over is left out."""
    send_statistics(local, (4, 1), (5, 2), extra=b"\xff" * extra)
    assert local.balloon.statistics.values == {4: 1, 5: 2}
    still_serves(local)


def test_case_43_no_entry_at_all(local: InProcess) -> None:
    for length in (0, 1, 9):
        local.memory.write(LIST, bytes(9))
        local.rings[STATISTICS].add([Buffer(LIST, length)])
        local.run(STATISTICS)
        assert local.balloon.statistics.values == {}
    still_serves(local)


def test_case_43_a_million_bytes(local: InProcess) -> None:
    """Firecracker #5794: a descriptor that is too long stalled the VMM. Here 256 entries are read."""
    local.memory.write(FREE, b"".join(STATISTIC.encode(Statistic(n, n)) for n in range(1000)))
    local.rings[STATISTICS].add([Buffer(FREE, 1_000_000)])
    local.run(STATISTICS)
    assert local.balloon.statistics.values == {n: n for n in range(MAX_STATISTICS)}
    still_serves(local, 4 * MIB)


def test_case_43_unknown_and_repeated_tags(local: InProcess) -> None:
    """The last word on a tag counts, and a tag without a name is kept apart."""
    send_statistics(local, (4, 1), (0xFFFF, 7), (4, 2), (99, 2**64 - 1), (0xFFFF, 8))
    assert local.balloon.statistics.values == {4: 2, 0xFFFF: 8, 99: 2**64 - 1}
    assert local.balloon.statistics.unnamed() == {0xFFFF: 8, 99: 2**64 - 1}
    assert local.balloon.statistics.named()["stat-free-memory"] == 2
    still_serves(local)


def test_case_43_a_second_buffer_while_one_is_held(guest: Frontend) -> None:
    """One is held, never two: the first comes back."""
    # CVE-2016-5403: buffers without end; of these one is out at a time, the held one.
    ring = guest.rings[STATISTICS]
    guest.memory.write(LIST, STATISTIC.encode(Statistic(4, 1)))
    previous = ring.offer([Buffer(LIST, 10)])
    for turn in range(300):
        head = ring.offer([Buffer(LIST, 10)])
        assert ring.wait_used(previous) == 0
        assert ring.used_index == turn + 1
        previous = head
    still_serves(guest)
    assert guest.stop()[STATISTICS] == 300


def test_case_43_no_buffer_when_a_question_is_due(local: InProcess) -> None:
    """It is put when there is one; nothing piles up meanwhile."""
    local.balloon.statistics.set_interval(1)
    for _ in range(5):
        assert local.tick(1.0) == set()
    head = send_statistics(local, (4, 1))
    assert local.tick(1.0) == {STATISTICS}
    assert local.rings[STATISTICS].take_used() == [(head, 0)]
    assert local.tick(100.0) == set()
    still_serves(local)


def test_case_43_a_buffer_that_is_held_over_a_stop(local: InProcess) -> None:
    """It was not returned, so the base names it, and the driver's buffer is offered again."""
    head = send_statistics(local, (4, 1))
    bases = local.stop()
    assert bases[STATISTICS] == 0
    local.balloon.statistics.ask_now()
    assert local.tick(1.0) == set()
    local.memory.write(FREE, STATISTIC.encode(Statistic(4, 9)))
    local.resume(bases=bases)
    local.run(STATISTICS)
    assert local.balloon.statistics.values == {4: 9}
    local.balloon.statistics.ask_now()
    assert local.tick(1.0) == {STATISTICS}
    assert local.rings[STATISTICS].take_used() == [(head, 0)]
    still_serves(local, 4 * MIB)


def test_case_43_a_buffer_outside_memory(local: InProcess) -> None:
    """Returned unused, after the held one; the figures are those that were said last."""
    first = send_statistics(local, (4, 1))
    ring = local.rings[STATISTICS]
    second = ring.add([Buffer(1 << 40, 10)])
    local.run(STATISTICS)
    assert ring.take_used() == [(first, 0), (second, 0)]
    assert local.balloon.statistics.values == {4: 1}
    send_statistics(local, (4, 2))
    assert local.balloon.statistics.values == {4: 2}
    still_serves(local)


# 44. Actual size and target


def test_case_44_an_actual_size_that_cannot_be(local: InProcess) -> None:
    """It is shown, never below nothing, and decides nothing."""
    # Cloud Hypervisor 65073259c: "actual" from the guest, subtracted from the memory there is, and below 0.
    for actual in (2**32 - 1, 2**31, 16 * MIB // PAGE + 1):
        local.write_config(Config(actual=actual))
        assert local.command("query-balloon") == {"actual": 0}
        assert local.read_config().actual == actual
        still_serves(local)
    local.write_config(Config(actual=1))
    assert local.command("query-balloon") == {"actual": 16 * MIB - PAGE}


def test_case_44_an_actual_size_that_never_changes(local: InProcess) -> None:
    """A target is not waited for: who asks is told what the guest says, and that is all."""
    assert local.command("balloon", value=8 * MIB) == {}
    for _ in range(5):
        local.tick(100.0)
        assert local.command("query-balloon") == {"actual": 16 * MIB}
        assert local.read_config().num_pages == 8 * MIB // PAGE
    still_serves(local)


def test_case_44_a_target_above_the_memory_there_is(local: InProcess) -> None:
    # Cloud Hypervisor 9411f7ecd: a target that nobody compared with the guest's memory.
    for value in (16 * MIB, 16 * MIB + 1, 1 << 40, 2**63 - 1):
        assert local.command("balloon", value=value) == {}
        assert local.read_config().num_pages == 0
    for value in (0, -1, -(2**63)):
        assert "expects a size" in local.command("balloon", value=value)
    still_serves(local)


def test_case_44_a_storm_of_targets(local: InProcess) -> None:
    """The last one stands in config space, and the front end gets one message for all that it has not read."""
    for number in range(10_000):
        assert local.command("balloon", value=(1 + number % 2000) * PAGE) == {}
        if number % 100 == 0:
            local.teller.tell(lambda: False)
    assert local.read_config().num_pages == (16 * MIB - 2000 * PAGE) // PAGE
    told = local.told()
    assert 1 <= len(told) <= 2
    local.tick(0.0)
    assert local.told() == []
    still_serves(local)


def test_case_44_a_guest_without_a_driver() -> None:
    """Said at once, and nothing is queued for a driver that may never come: of targets the last one waits."""
    # crosvm c4e3eb2ec: commands for a guest that never had a driver filled a pipe, and the VMM hung.
    with InProcess(GuestMemory(16 * MIB)) as guest:
        guest.negotiate()
        for turn in range(1000):
            assert guest.command("query-balloon").startswith("DeviceNotActive")
            assert guest.command("query-balloon-stats", refresh=True).startswith("DeviceNotActive")
            assert guest.command("estimate-free").startswith("DeviceNotActive")
            assert guest.command("balloon", value=(turn + 1) * PAGE) == {}
        assert guest.told() == []
        assert not guest.commands.outgoing
        guest.resume(first=True)
        assert guest.read_config().num_pages == (16 * MIB - 1000 * PAGE) // PAGE
        still_serves(guest)


# 45. Hints


def hint(guest: InProcess, *words: int) -> None:
    """Say ids, a buffer each; they are answered."""
    ring = guest.rings[HINT]
    for word in words:
        guest.memory.write(LIST, struct.pack("<I", word))
        assert finish(guest, ring, ring.add([Buffer(LIST, 4)])) == 0


def blocks(guest: InProcess, *addresses: int) -> None:
    """Hint blocks of 1 MiB, a chain each; they are answered."""
    ring = guest.rings[HINT]
    for address in addresses:
        assert finish(guest, ring, ring.add([offered(address, MIB)])) == 0


def end_of_round(guest: InProcess) -> tuple[int, bool]:
    """Bytes, and whether the guest came to its end, of the estimate that was asked for."""
    guest.tick()
    ((kind, _number, value),) = guest.answers()
    assert kind is Kind.RETURN
    return value["bytes"], value["complete"]


@pytest.fixture
def asked(local: InProcess) -> InProcess:
    """One that was asked for a round of hints, whose id is in config space."""
    local.ask(1, "estimate-free")
    assert local.read_config().free_page_hint_cmd_id not in (ID_STOP, ID_DONE)
    fill(local, FREE, 4 * MIB)
    return local


def untouched(guest: InProcess) -> None:
    """Nothing of what was hinted is ever released, and reports are as ever."""
    assert guest.discarder.released == []
    assert is_filled(guest, FREE, 4 * MIB)
    still_serves(guest, 4 * MIB)


def test_case_45_another_id_than_was_asked_for(asked: InProcess) -> None:
    """Answered, and what is hinted under it does not count."""
    number = asked.read_config().free_page_hint_cmd_id
    for wrong in (number + 1, number - 1, 2, 0x7FFFFFFF, 0xFFFFFFFF, ID_DONE):
        hint(asked, wrong)
        blocks(asked, FREE)
    hint(asked, number)
    blocks(asked, FREE + MIB)
    hint(asked, ID_STOP)
    assert end_of_round(asked) == (MIB, True)
    untouched(asked)


def test_case_45_an_id_of_less_than_four_bytes(asked: InProcess) -> None:
    number = asked.read_config().free_page_hint_cmd_id
    ring = asked.rings[HINT]
    asked.memory.write(LIST, struct.pack("<I", number))
    for length in (0, 1, 3):
        assert finish(asked, ring, ring.add([Buffer(LIST, length)])) == 0
    blocks(asked, FREE)
    # In two pieces it is one.
    assert finish(asked, ring, ring.add([Buffer(LIST, 1), Buffer(LIST + 1, 3)])) == 0
    blocks(asked, FREE + MIB)
    hint(asked, ID_STOP)
    assert end_of_round(asked) == (MIB, True)
    untouched(asked)


def test_case_45_an_id_after_its_end(asked: InProcess) -> None:
    """A round that has ended is not opened again by its id, nor by one before it."""
    number = asked.read_config().free_page_hint_cmd_id
    hint(asked, number)
    blocks(asked, FREE)
    hint(asked, ID_STOP)
    assert asked.read_config().free_page_hint_cmd_id == ID_DONE
    hint(asked, number)
    blocks(asked, FREE, FREE + MIB)
    assert end_of_round(asked) == (MIB, True)
    asked.ask(2, "estimate-free")
    asked.tick(PAUSE_SECONDS)
    assert asked.read_config().free_page_hint_cmd_id not in (number, ID_DONE)
    hint(asked, number)
    blocks(asked, FREE, FREE + MIB)
    hint(asked, asked.read_config().free_page_hint_cmd_id)
    blocks(asked, FREE + 2 * MIB)
    hint(asked, ID_STOP)
    assert end_of_round(asked) == (MIB, True)
    untouched(asked)


def test_case_45_blocks_before_any_id(asked: InProcess) -> None:
    blocks(asked, FREE, FREE + MIB)
    hint(asked, asked.read_config().free_page_hint_cmd_id)
    hint(asked, ID_STOP)
    assert end_of_round(asked) == (0, True)
    untouched(asked)


def test_case_45_hints_that_nobody_has_asked_for(guest: Frontend) -> None:
    """Against the processes: all kinds of them, in any order, are answered, and nothing is released."""
    ring = guest.rings[HINT]
    fill(guest, FREE, 4 * PAGE)
    words: Sequence[int] = (0, 1, 2, 0x80000000, 0x80000001, 0xFFFFFFFF)
    for word in words:
        guest.memory.write(LIST, struct.pack("<I", word))
        for buffers in (
            [Buffer(LIST, 4)],
            [offered(FREE, 4 * PAGE)],
            [Buffer(LIST, 4), offered(FREE, 4 * PAGE)],
            [Buffer(LIST, 2)],
            [Buffer(1 << 40, 4)],
            [offered(1 << 40, 0xFFFFFFFF)],
            [offered(FREE, 0)],
        ):
            head = ring.offer(buffers)
            assert ring.wait_used(head, DEADLINE) == 0
    assert is_filled(guest, FREE, 4 * PAGE)
    assert guest.read_config() == Config()
    assert status(guest, Request.SET_VRING_ENABLE, wire.VringState(HINT, 1)) == 0
    still_serves(guest)
