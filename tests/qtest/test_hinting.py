"""Rounds of free page hinting. QEMU's device opens one when a migration begins, ours when somebody asks."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from hostdev.driver import Buffer
from hostdev.hinting import ID_DONE, ID_MIN, ID_STOP, ROUND_SECONDS
from hostdev.wire.balloon import Role
from qmp_glue.errors import CommandFailedError
from qmp_glue.find import Qemu
from tests.device_program import changed
from tests.qtest.bench import FREE, LIST, MIB, Bench
from tests.qtest.conftest import BUILT_IN, OURS
from tests.qtest.test_target import is_told

BLOCK = 4 * MIB
# What takes QEMU's migration some minutes to send.
FULL = 64 * MIB


def send_id(bench: Bench, value: int, length: int = 4) -> int:
    bench.qtest.write(LIST, struct.pack("<I", value))
    return bench.send(Role.FREE_PAGE_HINT, [Buffer(LIST, length)])


def send_block(bench: Bench, address: int) -> int:
    return bench.send(Role.FREE_PAGE_HINT, [Buffer(address, BLOCK, writable=True)])


# Its rounds end when its guest says so, or when they are cut short: not because this process was late to say something.
LONG_ROUNDS = {"hostdev.hinting.ROUND_SECONDS": 600.0}


@contextmanager
def started(
    qemu: Qemu,
    factory: pytest.TempPathFactory,
    *,
    ours: bool,
    constants: Mapping[str, float] = LONG_ROUNDS,
) -> Iterator[Bench]:
    """A bench of its own: after a round config space shows DONE, in ours for good, for it is told of no reset."""
    bench = Bench(qemu, factory.mktemp("hinting"), ours=ours, program=changed(constants))
    try:
        bench.start()
        bench.renew()
        yield bench
    finally:
        bench.close()


@pytest.fixture(params=[OURS, BUILT_IN])
def bench(
    request: pytest.FixtureRequest, qemu: Qemu, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    with started(qemu, tmp_path_factory, ours=request.param == OURS) as bench:
        yield bench


@pytest.fixture
def ours(qemu: Qemu, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with started(qemu, tmp_path_factory, ours=True) as bench:
        yield bench


@contextmanager
def round_open(bench: Bench) -> Iterator[asyncio.Task[object] | None]:
    """Have a round opened. Yields what will be the answer of estimate-free."""
    bench.device.take_isr()
    if bench.ours:
        asking = bench.begin("estimate-free")
        yield asking
        bench.forget(asking)
        return
    # So slow that it does not end by itself while the test lasts. Less than 10 bytes a second would be no limit at all
    # (migration/migration.c divides by XFER_LIMIT_RATIO). Ten times a second it sends as much as fills its buffer of 32 KiB all
    # the same, which is 8 pages, or 3,000 of those that are empty: with nothing else it is through in 2 s.
    bench.fill(FREE + 2 * BLOCK, FULL)
    bench.qmp("migrate-set-parameters", {"max-bandwidth": 4096})
    bench.wait_until(lambda: _migrates(bench), "no migration begins")
    yield None
    bench.qmp("migrate_cancel")
    bench.wait_until(
        lambda: _migration(bench) in ("cancelled", "failed", "completed"), "the migration goes on"
    )


def _migrates(bench: Bench) -> bool:
    """Begin a migration; not while the last one, though cancelled, is still being cleaned up."""
    try:
        bench.qmp("migrate", {"uri": "exec:cat >/dev/null"})
    except CommandFailedError as error:
        if "in progress" not in error.description:
            raise
        return False
    return True


def _migration(bench: Bench) -> str:
    answer = bench.qmp("query-migrate")
    assert isinstance(answer, dict)
    return str(answer.get("status"))


def shown(bench: Bench) -> int:
    return bench.config().free_page_hint_cmd_id


def test_a_whole_round(bench: Bench) -> None:
    bench.drive()
    bench.fill(FREE, 2 * BLOCK)
    assert shown(bench) in (ID_STOP, ID_DONE)
    with round_open(bench) as asking:
        bench.wait_until(lambda: shown(bench) > ID_MIN, "no round")
        is_told(bench)
        number = shown(bench)
        assert send_id(bench, number) == 0
        assert [send_block(bench, FREE), send_block(bench, FREE + BLOCK)] == [0, 0]
        assert send_id(bench, ID_STOP) == 0
        assert bench.holds(FREE, 2 * BLOCK)
        if asking is not None:
            answer = bench.finish(asking)
            assert (answer["bytes"], answer["blocks"], answer["complete"]) == (2 * BLOCK, 2, True)
    bench.wait_until(lambda: shown(bench) == ID_DONE, "the guest does not get its memory back")


def test_the_next_round_has_the_next_id(bench: Bench) -> None:
    bench.drive()
    numbers = []
    for _ in range(3):
        with round_open(bench):
            bench.wait_until(lambda: shown(bench) > ID_MIN, "no round")
            numbers.append(shown(bench))
            if bench.ours:
                assert [send_id(bench, numbers[-1]), send_id(bench, ID_STOP)] == [0, 0]
        bench.wait_until(lambda: shown(bench) == ID_DONE, "the round goes on")
    assert [number - numbers[0] for number in numbers] == [0, 1, 2]


def test_hints_without_a_round(bench: Bench) -> None:
    bench.drive()
    bench.fill(FREE, BLOCK)
    assert send_id(bench, ID_MIN + 77) == 0
    assert send_block(bench, FREE) == 0
    assert send_id(bench, ID_STOP) == 0
    assert bench.holds(FREE, BLOCK)


def test_an_id_that_is_too_short(bench: Bench) -> None:
    """QEMU's says NEEDS_RESET. Ours returns the chain and goes on."""
    bench.drive()
    if bench.ours:
        assert send_id(bench, ID_MIN, length=3) == 0
        assert send_block(bench, FREE) == 0
    else:
        bench.qtest.write(LIST, b"abc")
        bench.rings[Role.FREE_PAGE_HINT].offer([Buffer(LIST, 3)])
        bench.wait_until(lambda: bool(bench.device.status & 64), "the device is not broken")


def test_a_guest_that_does_not_answer(qemu: Qemu, tmp_path_factory: pytest.TempPathFactory) -> None:
    """QEMU's waits for as long as its migration takes."""
    with started(qemu, tmp_path_factory, ours=True, constants={}) as ours:
        ours.drive()
        asking = ours.begin("estimate-free")
        answer = ours.finish(asking)
        assert (answer["bytes"], answer["complete"]) == (0, False)
        assert answer["seconds"] >= ROUND_SECONDS
        assert shown(ours) == ID_DONE


@pytest.mark.parametrize("how", ["reset", "stop", "disconnect"])
def test_a_round_that_is_cut_short(ours: Bench, how: str) -> None:
    ours.drive()
    asking = ours.begin("estimate-free")
    ours.wait_until(lambda: shown(ours) > ID_MIN, "no round")
    send_id(ours, shown(ours))
    send_block(ours, FREE)
    ours.device.take_isr()
    if how == "reset":
        ours.device.reset()
        assert ours.finish(asking)["complete"] is False
    elif how == "stop":
        ours.qmp("stop")
        assert ours.finish(asking)["blocks"] == 1
        ours.qmp("cont")
        is_told(ours)
    else:
        ours.reconnect()
        ours.wait_until(lambda: shown(ours) == ID_DONE, "the guest does not get its memory back")
        is_told(ours)
    assert shown(ours) == ID_DONE
