"""A worker's death as QEMU and a driver see it: not at all, but for some milliseconds.

On a bench of their own, whose device has been through much by the end: its workers die by the hundred.
"""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostdev.births import MAX_STARTS, STARTS_SECONDS
from hostdev.driver import Buffer
from hostdev.hinting import ID_MIN, ID_STOP
from hostdev.post import ANSWER_SECONDS
from hostdev.wire.balloon import Role
from qmp_glue.find import Qemu
from qmp_glue.virtio_pci import PciRing, Status
from tests.killing import Killer
from tests.qtest.bench import FREE, LIST, MIB, PAGE, RAM_BYTES, WAIT_SECONDS, Bench, offset_of
from tests.qtest.test_hinting import BLOCK, send_block, send_id, shown
from tests.qtest.test_statistics import encoded
from tests.qtest.test_target import is_told

Record = Callable[[str, object], None]

PAUSES = 50
# Faster than this the keeper would not start them, and it is not to be measured how long it does not.
START_PERIOD = 1.1 * STARTS_SECONDS / MAX_STARTS
RESIDENT = 4 * MIB


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Bench]]:
    """Where the one bench of this module is kept."""
    kept: list[Bench] = []
    yield kept
    for each in kept:
        assert each.close() == (0, 0)


@pytest.fixture
def ours(bench: list[Bench], qemu: Qemu, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if not bench:
        bench.append(Bench(qemu, tmp_path_factory.mktemp("killed"), ours=True))
        bench[0].start()
    assert bench[0].is_alive
    bench[0].renew()
    return bench[0]


@pytest.fixture
def killer(ours: Bench) -> Iterator[Killer]:
    """Whatever it has done, QEMU lives, and the device does all that it did before."""
    killer = Killer(ours.keeper)
    yield killer
    assert ours.vm.returncode is None
    assert ours.command("query-status")["inert"] is False
    ours.renew()
    ours.drive()
    report(ours)


# --- rounds, each as a driver goes through them ---


def report(bench: Bench) -> None:
    bench.fill(FREE, RESIDENT)
    assert bench.given_back(lambda: bench.report((FREE, RESIDENT))) == RESIDENT
    assert bench.holds(FREE, RESIDENT, 0)


def inflate(bench: Bench) -> None:
    pages = [FREE + PAGE * number for number in range(64)]
    bench.fill(FREE, 64 * PAGE)
    bench.fill(FREE + 64 * PAGE, PAGE)
    assert bench.given_back(lambda: bench.send_pages(Role.INFLATE, pages)) == 64 * PAGE
    assert bench.holds(FREE + 64 * PAGE, PAGE)
    assert bench.send_pages(Role.DEFLATE, pages) == 0


def poll(bench: Bench) -> None:
    """The guest's figures, asked for and polled. As Linux does: whenever its buffer comes back, it is brought anew."""
    ring = bench.rings[Role.STATISTICS]
    for value in (17 * MIB, 18 * MIB):
        data = encoded([(4, value)])
        bench.qtest.write(LIST + PAGE, data)
        # Of a second question that came before the last round had ended.
        assert len(ring.take_used()) <= 1
        if ring.used_index == ring.next_available:
            ring.offer([Buffer(LIST + PAGE, len(data))])
        asking = bench.begin_all("query-balloon-stats", [{"refresh": True}])
        while not asking.done():
            bench.work(asyncio.sleep(0.001))
            bring_anew(ring, len(data))
        assert asking.result()[0]["stats"]["stat-free-memory"] == value
    bench.command("qom-set", bench.set_interval(1))
    bench.wait_until(lambda: bring_anew(ring, len(data)), "the guest is not polled")
    bench.command("qom-set", bench.set_interval(0))


def bring_anew(ring: PciRing, length: int) -> bool:
    """Offer a statistics buffer again that has come back. False if none has."""
    returned = ring.take_used()
    for _ in returned:
        ring.offer([Buffer(LIST + PAGE, length)])
    assert len(returned) <= 1
    return bool(returned)


def hint(bench: Bench) -> None:
    """As Linux does: whenever another id is shown, a round is begun for it. One of them is gone through."""
    asking = bench.begin("estimate-free")
    answered = []
    asking.add_done_callback(lambda _task: answered.append(True))
    done = 0
    while not answered:
        bench.work(asyncio.sleep(0.001))
        number = shown(bench)
        if number >= ID_MIN and number != done:
            done = number
            assert [send_id(bench, number), send_block(bench, FREE), send_id(bench, ID_STOP)] == [0, 0, 0]
    answer = bench.finish(asking)
    assert answer["bytes"] in (0, BLOCK)
    bench.wait_until(lambda: shown(bench) < ID_MIN, "the guest does not get its memory back")


def begin_anew(bench: Bench) -> None:
    bench.device.reset()
    bench.rings.clear()
    bench.drive()
    assert bench.device.status & Status.DRIVER_OK


ROUNDS = {each.__name__: each for each in (report, inflate, poll, hint, begin_anew)}


class Between:
    """Has workers killed just before chosen ones of the commands that a driver's steps are made of."""

    def __init__(self, bench: Bench, killer: Killer) -> None:
        self._qtest, self._killer = bench.qtest, killer
        self._command = bench.qtest.command
        self.chosen: set[int] = set()
        self.count = 0

    def __enter__(self) -> Between:
        self._qtest.command = self._step  # type: ignore[method-assign]
        return self

    def __exit__(self, *_error: object) -> None:
        self._qtest.command = self._command  # type: ignore[method-assign]

    def _step(self, line: str) -> list[str]:
        if self.count in self.chosen:
            self._killer.kill_settled()
        self.count += 1
        return self._command(line)


def go_through(ours: Bench, killer: Killer, name: str, sample: int | None) -> int:
    """Go through a round with a death before each of its steps, or before a sample of them. Returns how many died."""
    ours.drive()
    before = killer.kills
    with Between(ours, killer) as between:
        ROUNDS[name](ours)
        # The first look at something that is waited for; the others are no steps.
        steps = range(between.count)
        chosen = (
            list(steps) if sample is None else sorted(random.Random(3).sample(steps, min(sample, len(steps))))
        )
        while chosen:
            between.count, between.chosen = 0, set(chosen)
            ROUNDS[name](ours)
            chosen = [step for step in chosen if step >= between.count]
            if not between.chosen - set(chosen):
                break
    return killer.kills - before


@pytest.mark.parametrize("name", list(ROUNDS))
def test_a_death_between_steps(ours: Bench, killer: Killer, name: str, record_property: Record) -> None:
    died = go_through(ours, killer, name, sample=5)
    record_property("workers_killed", died)
    assert died > 0


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(ROUNDS))
def test_a_death_between_any_two_steps(
    ours: Bench, killer: Killer, name: str, record_property: Record
) -> None:
    died = go_through(ours, killer, name, sample=None)
    record_property("workers_killed", died)
    assert died > 5


def test_config_space_is_read_while_there_is_no_worker(
    ours: Bench, killer: Killer, record_property: Record
) -> None:
    """How long QEMU, and with it its guest, is held up: from the kill to the answer, the restart included."""
    ours.drive()
    pauses = []
    for number in range(1, PAUSES + 1):
        ours.command("balloon", {"value": RAM_BYTES - number * MIB})
        time.sleep(START_PERIOD)
        killer.kill_settled()
        began = time.monotonic()
        assert ours.device.read_config(offset_of("num_pages"), 4) == number * MIB // PAGE
        pauses.append(1000 * (time.monotonic() - began))
    record_property("pauses", len(pauses))
    record_property("median_pause_ms", round(statistics.median(pauses), 1))
    record_property("worst_pause_ms", round(max(pauses), 1))


def tell_and_kill(ours: Bench, killer: Killer, targets: int) -> int:
    """Set many targets while workers die at the worst moment and the VM pauses and goes on. Returns the last one."""
    pick = random.Random(8)
    sizes = [RAM_BYTES - pick.randrange(1, 64) * MIB for _ in range(targets)]

    async def tell() -> None:
        for size in sizes:
            asking = asyncio.ensure_future(ours.monitor.execute("balloon", {"value": size}))
            await asyncio.sleep(pick.uniform(0.0, 0.004))
            killer.kill()
            await asyncio.wait_for(asking, WAIT_SECONDS)

    async def pause(telling: asyncio.Task[None]) -> None:
        while not telling.done():
            await ours.vm.stop()
            await asyncio.sleep(pick.uniform(0.0, 0.01))
            await ours.vm.cont()
            await asyncio.sleep(pick.uniform(0.0, 0.05))

    async def both() -> None:
        telling = asyncio.create_task(tell())
        await asyncio.gather(telling, pause(telling))

    ours.work(both())
    return sizes[-1]


def survives_being_told(ours: Bench, killer: Killer, targets: int, record_property: Record) -> None:
    """The driver has the last target; and it hears of the next, so the stream to QEMU is still in step."""
    ours.drive()
    last = tell_and_kill(ours, killer, targets)
    assert ours.device.read_config(offset_of("num_pages"), 4) == (RAM_BYTES - last) // PAGE
    for size in (RAM_BYTES // 2, RAM_BYTES):
        killer.kill_settled()
        assert ours.command("balloon", {"value": size}) == {}
        is_told(ours)
        ours.device.take_isr()
        assert ours.command("balloon", {"value": size - MIB}) == {}
        is_told(ours)
        assert ours.device.read_config(offset_of("num_pages"), 4) == (RAM_BYTES - size + MIB) // PAGE
    record_property("workers_killed", killer.kills)


def test_a_death_while_qemu_is_told(ours: Bench, killer: Killer, record_property: Record) -> None:
    survives_being_told(ours, killer, 50, record_property)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_many_deaths_while_qemu_is_told(ours: Bench, killer: Killer, record_property: Record) -> None:
    survives_being_told(ours, killer, 1500, record_property)
    assert killer.kills > 500


def test_a_worker_that_is_stopped(ours: Bench, killer: Killer, record_property: Record) -> None:
    """SIGSTOP: whether or not anybody waits for it, it is replaced."""
    ours.drive()
    for somebody_waits in (True, False):
        ours.command("balloon", {"value": RAM_BYTES // 2})
        killer.kill_settled()
        killer.settle()
        began = time.monotonic()
        stopped = killer.kill(signal.SIGSTOP)
        if not somebody_waits:
            ours.wait_until(lambda pid=stopped: not Path(f"/proc/{pid}").exists(), "it is still there")  # type: ignore[misc]
        assert ours.device.read_config(offset_of("num_pages"), 4) == RAM_BYTES // 2 // PAGE
        seconds = time.monotonic() - began
        record_property(f"stopped_{'asked' if somebody_waits else 'idle'}_seconds", round(seconds, 2))
        assert not Path(f"/proc/{stopped}").exists()
        assert seconds >= ANSWER_SECONDS / 2
