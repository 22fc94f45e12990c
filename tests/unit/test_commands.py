"""The commands that are about one guest, on a device in this process whose clock stands still."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from hostdev.commands import STATISTICS_SECONDS
from hostdev.driver import USER_BASE, Buffer, GuestMemory
from hostdev.errors import HostError
from hostdev.estimates import PAUSE_SECONDS
from hostdev.giver import MAX_HOST_ERRORS
from hostdev.hinting import ID_DONE, ROUND_SECONDS
from hostdev.statistics import ABSENT
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import DEFAULT_FEATURES, STATISTIC, Config, Feature, Role, Statistic
from hostdev.wire.control import Envelope, Kind
from hostdev.wire.vhost_user import BackendRequest, Request
from tests.in_process import MIB, PAGE, InProcess

INFLATE, DEFLATE, STATISTICS, HINT, REPORTING = Role
FREE = 0x200000
LIST = 0x180000
MEMORY = 64 * MIB
PATH = "/machine/peripheral/balloon0"
INTERVAL = "guest-stats-polling-interval"


@pytest.fixture
def guest() -> Iterator[InProcess]:
    with InProcess(GuestMemory(MEMORY)) as guest:
        guest.start()
        yield guest


@pytest.fixture
def early() -> Iterator[InProcess]:
    """A front end whose guest's driver is not up."""
    with InProcess(GuestMemory(MEMORY)) as guest:
        guest.negotiate()
        yield guest


def config_messages(guest: InProcess) -> int:
    """How many messages the front end gets that tell of a change."""
    requests = guest.told()
    assert set(requests) <= {BackendRequest.CONFIG_CHANGE_MSG}
    return len(requests)


def test_an_unknown_command(guest: InProcess) -> None:
    assert guest.command("nonsense") == "CommandNotFound: The command nonsense has not been found"


# The target


def test_a_target_in_bytes(guest: InProcess) -> None:
    assert guest.command("balloon", value=48 * MIB) == {}
    assert guest.read_config().num_pages == 16 * MIB // PAGE
    assert config_messages(guest) == 1
    assert guest.command("query-balloon") == {"actual": MEMORY}
    guest.write_config(Config(actual=16 * MIB // PAGE, num_pages=5))
    assert guest.command("query-balloon") == {"actual": 48 * MIB}
    assert guest.read_config().num_pages == 16 * MIB // PAGE


def test_the_same_target_again_tells_nobody(guest: InProcess) -> None:
    guest.command("balloon", value=48 * MIB)
    assert config_messages(guest) == 1
    guest.command("set-target", percent=75)
    assert config_messages(guest) == 0


def test_a_target_beyond_memory_is_all_of_it(guest: InProcess) -> None:
    guest.command("balloon", value=32 * MIB)
    guest.command("balloon", value=1 << 50)
    assert guest.read_config().num_pages == 0


@pytest.mark.parametrize("value", [0, -1])
def test_a_size_of_nothing(guest: InProcess, value: int) -> None:
    assert guest.command("balloon", value=value) == "GenericError: Parameter 'value' expects a size"
    assert guest.command("set-target", size=value) == "GenericError: Parameter 'size' expects a size"
    assert guest.read_config().num_pages == 0


@pytest.mark.parametrize("percent", [0, 101, -3])
def test_percents_out_of_bounds(guest: InProcess, percent: int) -> None:
    assert "from 1 to 100" in guest.command("set-target", percent=percent)


def test_both_or_neither(guest: InProcess) -> None:
    text = "GenericError: give either 'size', in bytes, or 'percent'"
    assert guest.command("set-target") == text
    assert guest.command("set-target", size=MIB, percent=5) == text


def test_a_target_before_the_driver_is_up_waits_for_its_memory(early: InProcess) -> None:
    assert early.command("query-balloon").startswith("DeviceNotActive")
    early.command("set-target", percent=50)
    early.command("balloon", value=48 * MIB)
    assert early.read_config().num_pages == 0
    early.resume(first=True)
    assert early.read_config().num_pages == 16 * MIB // PAGE


def test_memory_is_counted_as_the_front_end_counts_it() -> None:
    """With the hole behind the VGA window, which no region has."""
    regions = [
        wire.MemoryRegion(0, 0xA0000, USER_BASE, 0),
        wire.MemoryRegion(0xC0000, MEMORY - 0xC0000, USER_BASE + 0xC0000, 0xC0000),
    ]
    with InProcess(GuestMemory(MEMORY, regions), rings_at=0x100000) as guest:
        guest.start()
        assert guest.command("query-balloon") == {"actual": MEMORY}
        guest.command("balloon", value=32 * MIB)
        assert guest.read_config().num_pages == 32 * MIB // PAGE


def test_the_target_outlives_reset_and_pause(guest: InProcess) -> None:
    guest.command("balloon", value=48 * MIB)
    bases = guest.stop()
    assert guest.read_config().num_pages == 16 * MIB // PAGE
    guest.write_config(Config())
    guest.resume(bases=bases)
    assert guest.read_config().num_pages == 16 * MIB // PAGE


def test_a_target_set_in_a_pause_is_told_when_it_ends(guest: InProcess) -> None:
    bases = guest.stop()
    guest.command("balloon", value=48 * MIB)
    assert config_messages(guest) == 0
    guest.resume(bases=bases)
    assert config_messages(guest) == 1


def test_a_target_between_two_regions_is_of_all_memory() -> None:
    """The front end names memory region by region: what is known of it in between is not the guest's size."""
    low = wire.MemoryRegion(0, 0xA0000, USER_BASE, 0)
    high = wire.MemoryRegion(0xC0000, MEMORY - 0xC0000, USER_BASE + 0xC0000, 0xC0000)
    with InProcess(GuestMemory(MEMORY, [low, high]), rings_at=0x100000) as guest:
        guest.negotiate()
        ram = guest.memory.fd
        guest.request(Request.ADD_MEM_REG, wire.SingleRegion(0, low), [ram])
        assert guest.command("balloon", value=32 * MIB) == {}
        assert "memory" not in guest.command("query-status")
        assert guest.command("query-balloon").startswith("DeviceNotActive")
        guest.request(Request.ADD_MEM_REG, wire.SingleRegion(0, high), [ram])
        guest.resume()
        assert guest.read_config().num_pages == 32 * MIB // PAGE
        assert guest.command("query-balloon") == {"actual": MEMORY}


def test_a_region_that_is_changed_under_running_rings(guest: InProcess) -> None:
    """QEMU takes it away and adds it again; the guest's size is known again with it."""
    region = guest.memory.regions[0]
    guest.request(Request.REM_MEM_REG, wire.SingleRegion(0, region))
    guest.command("balloon", value=32 * MIB)
    assert "memory" not in guest.command("query-status")
    guest.request(Request.ADD_MEM_REG, wire.SingleRegion(0, region), [guest.memory.fd])
    assert guest.command("query-status")["memory"] == MEMORY
    assert guest.read_config().num_pages == 32 * MIB // PAGE


@pytest.mark.parametrize("actual", [0xFFFF_FFFF, MEMORY // PAGE + 1])
def test_a_guest_that_claims_to_hold_too_much(guest: InProcess, actual: int) -> None:
    guest.write_config(Config(actual=actual))
    assert guest.command("query-balloon") == {"actual": 0}
    assert guest.command("query-status")["actual"] == 0


def changes(guest: InProcess) -> list[int]:
    guest.commands.tick()
    return [value["data"]["actual"] for kind, _id, value in guest.answers() if kind is Kind.EVENT]


def test_a_changed_balloon_is_told_once_a_second_with_its_last_size(guest: InProcess) -> None:
    assert changes(guest) == []
    guest.write_config(Config(actual=MIB // PAGE))
    assert changes(guest) == [MEMORY - MIB]
    for pages in (3, 4, 5):
        guest.write_config(Config(actual=pages))
        assert changes(guest) == []
    due = guest.commands.due()
    assert due == guest.now + 1
    guest.now = due
    assert changes(guest) == [MEMORY - 5 * PAGE]
    assert guest.commands.due() is None
    guest.write_config(Config(actual=5))
    guest.now += 10
    assert changes(guest) == []


def test_changes_that_nobody_fetches_do_not_pile_up(guest: InProcess) -> None:
    for pages in range(1, 50):
        guest.write_config(Config(actual=pages))
        guest.tick(2)
    assert len(guest.commands.outgoing) == 1
    guest.answers()
    assert changes(guest) == []
    guest.now += 1
    assert changes(guest) == [MEMORY - 49 * PAGE]


# Statistics


def send_statistics(guest: InProcess, *pairs: tuple[int, int]) -> int:
    data = b"".join(STATISTIC.encode(Statistic(*pair)) for pair in pairs)
    guest.memory.write(LIST, data)
    head = guest.rings[STATISTICS].add([Buffer(LIST, len(data))])
    guest.run(STATISTICS)
    return head


def test_statistics_by_qemus_names(guest: InProcess) -> None:
    stats = guest.command("qom-get", path=PATH, property="guest-stats")
    assert set(stats["stats"].values()) == {ABSENT}
    assert stats["last-update"] == 0
    send_statistics(guest, (4, 111), (15, 222), (99, 333))
    stats = guest.command("qom-get", path="balloon0", property="guest-stats")
    assert stats["stats"]["stat-free-memory"] == 111
    assert stats["stats"]["stat-direct-reclaims"] == 222
    assert stats["stats"]["stat-swap-in"] == ABSENT
    assert stats["last-update"] == 1_000_100
    assert set(stats) == {"stats", "last-update"}
    assert guest.command("query-balloon-stats") == stats | {"unknown": [{"tag": 99, "value": 333}]}


def test_polling(guest: InProcess) -> None:
    held = send_statistics(guest, (4, 1))
    assert guest.tick(1000) == set()
    assert guest.command("qom-get", path=PATH, property=INTERVAL) == 0
    assert guest.command("qom-set", path=PATH, property=INTERVAL, value=10) == {}
    assert guest.command("qom-get", path=PATH, property=INTERVAL) == 10
    assert guest.tick() == {STATISTICS}
    assert guest.rings[STATISTICS].take_used() == [(held, 0)]
    assert guest.balloon.due() is None  # nothing wakes the worker until the guest answers
    assert guest.tick(1000) == set()
    held = send_statistics(guest, (4, 2))
    assert guest.balloon.due() == guest.now + 10
    assert guest.tick(9) == set()
    assert guest.tick(1) == {STATISTICS}
    assert guest.rings[STATISTICS].take_used() == [(held, 0)]


def test_polling_goes_on_after_a_pause_with_the_held_buffer(guest: InProcess) -> None:
    send_statistics(guest, (4, 1))
    guest.command("qom-set", path=PATH, property=INTERVAL, value=5)
    bases = guest.stop()
    assert guest.tick() == set()  # nothing to ask with
    guest.resume(bases=bases)
    guest.run(STATISTICS)
    assert guest.tick(5) == {STATISTICS}
    assert [length for _head, length in guest.rings[STATISTICS].take_used()] == [0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-1, "timer value must be greater than zero"),
        (1 << 32, "timer value is too big"),
        *(
            (value, f"Invalid parameter type for '{INTERVAL}', expected: integer")
            for value in ("2", 1.5, True)
        ),
        (None, f"Invalid parameter type for '{INTERVAL}', expected: integer"),
        (1 << 70, f"Invalid parameter type for '{INTERVAL}', expected: integer"),
    ],
)
def test_intervals_refused_in_qemus_words(guest: InProcess, value: object, text: str) -> None:
    assert guest.command("qom-set", path=PATH, property=INTERVAL, value=value) == f"GenericError: {text}"


def test_properties_refused_in_qemus_words(guest: InProcess) -> None:
    assert guest.command("qom-get", path="/x", property="type") == "DeviceNotFound: Device '/x' not found"
    for command in ("qom-get", "qom-set"):
        said = guest.command(command, path=PATH, property="x", value=1)
        assert said == "GenericError: Property 'virtio-balloon.x' not found"
    said = guest.command("qom-set", path=PATH, property="guest-stats", value=1)
    assert said == "GenericError: Property 'virtio-balloon.guest-stats' is not writable"
    assert guest.command("qom-get", path=PATH, property="type") == "virtio-balloon"


def test_fresh_statistics_are_answered_with_the_guests_next(guest: InProcess) -> None:
    held = send_statistics(guest, (4, 1))
    guest.ask(7, "query-balloon-stats", refresh=True)
    assert guest.answers() == []
    assert guest.tick() == {STATISTICS}
    assert guest.rings[STATISTICS].take_used() == [(held, 0)]
    assert guest.answers() == []
    guest.now += 0.5
    send_statistics(guest, (4, 2))
    guest.tick()
    ((kind, number, value),) = guest.answers()
    assert (kind, number, value["stats"]["stat-free-memory"]) == (Kind.RETURN, 7, 2)
    assert guest.tick(100) == set()  # once


def test_fresh_statistics_from_a_guest_that_does_not_answer(guest: InProcess) -> None:
    send_statistics(guest, (4, 1))
    guest.ask(7, "query-balloon-stats", refresh=True)
    guest.tick()
    due = guest.commands.due()
    assert due == guest.now + STATISTICS_SECONDS
    guest.tick(STATISTICS_SECONDS)
    ((kind, number, value),) = guest.answers()
    assert (kind, number) == (Kind.ERROR, 7)
    assert "did not answer within 1 s" in value["desc"]
    assert guest.commands.due() is None


def test_statistics_of_a_driver_without_them() -> None:
    with InProcess(features=DEFAULT_FEATURES & ~Feature.STATS_VQ) as guest:
        guest.negotiate()
        assert guest.command("query-balloon-stats", refresh=True).startswith("DeviceNotActive")
        guest.resume([0, 1, 2, 3], first=True)
        said = guest.command("query-balloon-stats", refresh=True)
        assert said == "GenericError: the guest's driver did not accept STATS_VQ"


# Hinting


def hint(guest: InProcess, *words: int, blocks: int = 0) -> None:
    """What the driver does: a buffer for each id, or blocks of 4 MiB, each in a chain of its own."""
    for word in words:
        guest.memory.write(LIST, struct.pack("<I", word))
        guest.rings[HINT].add([Buffer(LIST, 4)])
        guest.run(HINT)
    for number in range(blocks):
        guest.rings[HINT].add([Buffer(4 * MIB * (number + 1), 4 * MIB, writable=True)])
        guest.run(HINT)


def test_an_estimate(guest: InProcess) -> None:
    guest.memory.write(4 * MIB, b"\xaa" * MIB)
    guest.ask(3, "estimate-free")
    assert config_messages(guest) == 1
    number = guest.read_config().free_page_hint_cmd_id
    hint(guest, number)
    hint(guest, blocks=10)
    guest.tick(0.5)
    assert guest.answers() == []
    assert guest.read_config().free_page_hint_cmd_id == number
    hint(guest, 0)
    assert guest.read_config().free_page_hint_cmd_id == ID_DONE
    assert config_messages(guest) == 1
    guest.tick()
    expected = {"bytes": 40 * MIB, "blocks": 10, "seconds": 0.5, "complete": True}
    assert guest.answers() == [(Kind.RETURN, 3, expected)]
    assert guest.memory.read(4 * MIB, MIB) == b"\xaa" * MIB
    assert guest.discarder.released == []


def test_an_estimate_is_no_more_than_the_guest_has(guest: InProcess) -> None:
    guest.ask(3, "estimate-free")
    hint(guest, guest.read_config().free_page_hint_cmd_id, blocks=5)
    huge = [Buffer(0, 0xFFFF_F000, writable=True)]
    for _ in range(3):
        guest.rings[HINT].add(huge)
        guest.run(HINT)
    hint(guest, 0)
    guest.tick()
    ((_kind, _number, value),) = guest.answers()
    assert value["bytes"] == MEMORY


def test_a_guest_that_does_not_come_to_an_end(guest: InProcess) -> None:
    guest.ask(3, "estimate-free")
    hint(guest, guest.read_config().free_page_hint_cmd_id, blocks=3)
    config_messages(guest)
    assert guest.balloon.due() == guest.now + ROUND_SECONDS
    guest.tick(ROUND_SECONDS)
    ((kind, _number, value),) = guest.answers()
    assert (kind, value["complete"], value["bytes"]) == (Kind.RETURN, False, 12 * MIB)
    assert guest.read_config().free_page_hint_cmd_id == ID_DONE
    assert config_messages(guest) == 1


def test_all_who_ask_meanwhile_share_a_round(guest: InProcess) -> None:
    guest.ask(3, "estimate-free")
    number = guest.read_config().free_page_hint_cmd_id
    guest.ask(4, "estimate-free")
    assert guest.read_config().free_page_hint_cmd_id == number
    guest.commands.handle(Envelope(Kind.CANCEL, 3))
    assert guest.read_config().free_page_hint_cmd_id == number
    hint(guest, number, 0)
    guest.tick()
    assert [answer[1] for answer in guest.answers()] == [4]


def test_the_round_ends_when_the_last_who_asked_has_gone(guest: InProcess) -> None:
    guest.ask(3, "estimate-free")
    guest.ask(4, "estimate-free")
    hint(guest, guest.read_config().free_page_hint_cmd_id, blocks=1)
    config_messages(guest)
    for number in (3, 4):
        guest.commands.handle(Envelope(Kind.CANCEL, number))
    assert guest.read_config().free_page_hint_cmd_id == ID_DONE
    assert config_messages(guest) == 1
    guest.tick(10)
    assert guest.answers() == []


def test_many_who_ask_for_memory_are_answered_one_a_turn(guest: InProcess) -> None:
    for number in (5, 6, 7):
        guest.ask(number, "query-memory")
    for number in (5, 6, 7):
        guest.tick()
        assert [answer[1] for answer in guest.answers()] == [number]


@pytest.mark.parametrize("how", ["inert", "refusals", "pause", "control", "broken"])
def test_whatever_happens_the_guest_gets_its_memory_back(guest: InProcess, how: str) -> None:
    guest.ask(3, "estimate-free")
    hint(guest, guest.read_config().free_page_hint_cmd_id, blocks=1)
    if how == "inert":
        guest.balloon.make_inert("a test")
    elif how == "refusals":
        guest.discarder.error = HostError("a test")
        for _ in range(MAX_HOST_ERRORS):
            guest.rings[REPORTING].add([Buffer(FREE, PAGE, writable=True)])
            guest.run(REPORTING)
        guest.tick()
    elif how == "pause":
        guest.resume(bases=guest.stop())
    elif how == "control":
        guest.commands.forget_all()
    else:
        guest.rings[HINT].set_available_index(5000)
        guest.run(HINT)
    assert guest.read_config().free_page_hint_cmd_id == ID_DONE
    assert guest.balloon.space.changed
    guest.tick()
    answers = guest.answers()
    if how == "control":
        assert answers == []
    else:
        ((kind, _number, value),) = answers
        assert (kind, value["complete"]) == (Kind.RETURN, False)


def test_a_guest_gets_time_to_take_its_memory_back_before_the_next_round(guest: InProcess) -> None:
    """Linux does so when it reads DONE, and not if it reads the next round's id first."""
    guest.ask(3, "estimate-free")
    number = guest.read_config().free_page_hint_cmd_id
    hint(guest, number, 0)
    guest.tick()
    guest.answers()
    guest.ask(4, "estimate-free")
    guest.ask(5, "estimate-free")
    guest.tick()
    assert guest.read_config().free_page_hint_cmd_id == ID_DONE
    due = guest.commands.due()
    assert due == guest.now + PAUSE_SECONDS
    guest.tick(PAUSE_SECONDS)
    assert guest.read_config().free_page_hint_cmd_id == number + 1
    hint(guest, number + 1, 0)
    guest.tick()
    assert sorted(answer[1] for answer in guest.answers()) == [4, 5]


def test_who_goes_while_a_round_waits_leaves_none(guest: InProcess) -> None:
    for _ in range(2):
        guest.ask(3, "estimate-free")
        guest.commands.handle(Envelope(Kind.CANCEL, 3))
    guest.tick(PAUSE_SECONDS)
    assert guest.read_config().free_page_hint_cmd_id == ID_DONE
    assert guest.commands.due() is None


@pytest.mark.parametrize("how", ["none", "broken"])
def test_a_guest_that_cannot_be_told_is_not_asked(guest: InProcess, how: str) -> None:
    """It would begin a round that it happens to see, and never be told of its end."""
    if how == "none":
        guest.session._drop_backend_channel()
    else:
        assert guest.session.backend_channel is not None
        guest.session.backend_channel.is_broken = True
    assert "cannot be told" in guest.command("estimate-free")
    assert not guest.balloon.hinting.is_open


def test_estimates_that_cannot_be(early: InProcess) -> None:
    assert early.command("estimate-free").startswith("DeviceNotActive")
    early.resume([0, 1, 2], first=True)
    assert early.command("estimate-free") == "GenericError: the guest's driver did not accept FREE_PAGE_HINT"
    early.balloon.make_inert("a test")
    assert early.command("estimate-free") == "GenericError: the device is inert: a test"


def test_blocks_and_ids_in_buffers_of_the_wrong_direction(guest: InProcess) -> None:
    guest.ask(3, "estimate-free")
    number = guest.read_config().free_page_hint_cmd_id
    guest.memory.write(LIST, struct.pack("<I", number))
    guest.rings[HINT].add([Buffer(LIST, 4, writable=True)])  # an id cannot be read from there
    guest.run(HINT)
    assert guest.balloon.hinting.state == "requested"
    guest.rings[HINT].add([Buffer(LIST, 3)])  # shorter than an id
    guest.run(HINT)
    assert guest.balloon.hinting.state == "requested"
    hint(guest, number)
    guest.rings[HINT].add(
        [Buffer(4 * MIB, 4 * MIB)]
    )  # readable: not a block, and its bytes are no id of this round
    guest.run(HINT)
    guest.tick()
    ((_kind, _number, value),) = guest.answers()
    assert (value["bytes"], value["complete"]) == (0, True)


# Inhibition


def test_inhibited_everything_is_answered_and_nothing_released(guest: InProcess) -> None:
    guest.memory.write(FREE, b"\xaa" * MIB)
    assert guest.command("inhibit") == {}
    head = guest.rings[REPORTING].add([Buffer(FREE, MIB, writable=True)])
    guest.run(REPORTING)
    guest.memory.write(LIST, struct.pack("<I", FREE // PAGE))
    inflated = guest.rings[INFLATE].add([Buffer(LIST, 4)])
    guest.run(INFLATE)
    assert guest.rings[REPORTING].take_used() == [(head, 0)]
    assert guest.rings[INFLATE].take_used() == [(inflated, 0)]
    assert guest.discarder.released == []
    assert guest.metrics.value("withheld_bytes_total", "report", "inhibited") == MIB
    assert guest.command("query-status")["inhibited"] is True
    assert guest.command("allow") == {}
    guest.rings[REPORTING].add([Buffer(FREE, MIB, writable=True)])
    guest.run(REPORTING)
    assert guest.discarder.released == [(FREE, MIB)]


# Queries


def test_status_before_and_after_the_driver(early: InProcess) -> None:
    status = early.command("query-status")
    assert status["connected"] is True
    assert status["running"] is False
    assert status["worker"] == os.getpid()
    assert {"memory", "target", "actual", "reason"} & status.keys() == set()
    assert "REPORTING" in status["features"]
    assert "DEFLATE_ON_OOM" not in status["features"]
    early.resume(first=True)
    early.command("balloon", value=16 * MIB)
    early.write_config(Config(actual=1, poison_val=9))
    status = early.command("query-status")
    assert status["running"] is True
    assert (status["memory"], status["target"], status["actual"]) == (MEMORY, 16 * MIB, MEMORY - PAGE)
    assert status["poison-value"] == 9
    assert "REPORTING" in status["negotiated"]
    early.balloon.make_inert("a test")
    status = early.command("query-status")
    assert (status["inert"], status["reason"]) == (True, "a test")


def test_rings(guest: InProcess) -> None:
    send_statistics(guest, (4, 1))
    for _ in range(3):
        guest.rings[REPORTING].add([Buffer(FREE, PAGE, writable=True)])
        guest.run(REPORTING)
    rings = guest.command("query-rings")
    assert [ring["role"] for ring in rings] == [
        "inflate",
        "deflate",
        "statistics",
        "free-page-hint",
        "reporting",
    ]
    assert rings[STATISTICS] | {"size": 128} == {
        "index": 2,
        "role": "statistics",
        "size": 128,
        "enabled": True,
        "started": True,
        "next-available": 1,
        "used": 0,
        "outstanding": 1,
        "chains": 0,
    }
    assert (rings[REPORTING]["used"], rings[REPORTING]["chains"], rings[REPORTING]["outstanding"]) == (
        3,
        3,
        0,
    )
    guest.stop()
    rings = guest.command("query-rings")
    assert [ring["started"] for ring in rings] == [False] * 5
    assert "role" not in rings[0]


def test_memory_by_region(guest: InProcess) -> None:
    guest.memory.write(FREE, b"\xaa" * 2 * MIB)
    guest.rings[REPORTING].add([Buffer(FREE, MIB, writable=True)])
    guest.run(REPORTING)
    guest.memory.write(LIST, struct.pack("<2I", (FREE + MIB) // PAGE, (FREE + MIB) // PAGE + 1))
    guest.rings[INFLATE].add([Buffer(LIST, 8)])
    guest.run(INFLATE)
    guest.command("inhibit")
    guest.rings[REPORTING].add([Buffer(FREE, MIB, writable=True)])
    guest.run(REPORTING)
    guest.ask(5, "query-memory")
    guest.tick()
    ((kind, number, (region,)),) = guest.answers()
    assert (kind, number) == (Kind.RETURN, 5)
    assert region == {
        "guest-address": 0,
        "size": MEMORY,
        "page-size": PAGE,
        "backing": "shared memory",
        "method": "remove",
        "footprint": guest.memory.footprint(),
        "released-report": MIB,
        "released-inflate": 2 * PAGE,
        "withheld": MIB,
    }


def test_memory_that_goes_while_it_is_measured(guest: InProcess) -> None:
    guest.ask(5, "query-memory")
    assert guest.commands.due() == guest.now
    guest.stop()
    guest.request(wire.Request.REM_MEM_REG, wire.SingleRegion(0, guest.memory.regions[0]))
    guest.tick()
    ((kind, _number, value),) = guest.answers()
    assert kind is Kind.ERROR
    assert "ask again" in value["desc"]


def test_an_error_of_ours_is_an_answer(guest: InProcess) -> None:
    guest.ask(3, "estimate-free")
    guest.ask(4, "query-memory")
    guest.ask(5, "query-balloon-stats", refresh=True)
    guest.commands.fail_all()
    assert sorted((number, value["desc"]) for _kind, number, value in guest.answers()) == [
        (number, "an unexpected error: the device's log has it") for number in (3, 4, 5)
    ]
    assert guest.commands.due() is None
    assert guest.read_config().free_page_hint_cmd_id == ID_DONE
