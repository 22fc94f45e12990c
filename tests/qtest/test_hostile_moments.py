"""What a driver, or the person at the monitor, may do at the wrong moment: reset, pause and unplug with work in flight.

Beside it what a driver may say of its statistics, whose buffer is in flight all the time.
"""

from __future__ import annotations

import pytest

from hostdev.driver import Buffer
from hostdev.wire.balloon import STATISTIC, Role, Statistic
from qmp_glue.pci import COMMAND_MEMORY, REGISTER_COMMAND
from qmp_glue.virtio_pci import Status
from tests.qtest.bench import FREE, LIST, MIB, PAGE, RAM_BYTES, Bench
from tests.qtest.hostile import INTERRUPTS, LAST_ADDRESS, MAX_LENGTH, Witness, await_broken
from tests.qtest.test_statistics import named, offer

BIG = RAM_BYTES - FREE
ROUNDS, FLOOD = 30, 16
ON_ITS_WAY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK


def test_a_reset_in_the_middle_of_one_big_report(bench: Bench, witness: Witness) -> None:
    """It is abandoned where it is, or was answered; either way nothing is released once the reset is through."""
    ring = bench.rings[Role.REPORTING]
    bench.fill(FREE, BIG)
    ring.offer([Buffer(FREE, BIG, writable=True)])
    bench.device.reset()
    assert ring.used_index in (0, 1)
    bench.fill(FREE, BIG)
    bench.drive()
    witness.check_service()
    for at in range(FREE + 2 * PAGE, RAM_BYTES, MIB):
        assert bench.holds(at, min(MIB, RAM_BYTES - at))


def test_pauses_under_a_flood(bench: Bench, witness: Witness) -> None:
    """Each chain comes back once and in order, however often the rings were stopped with it in hand."""
    ring = bench.rings[Role.REPORTING]
    bench.fill(FREE, FLOOD * MIB)
    returned: list[int] = []
    offered: list[int] = []
    for _ in range(ROUNDS):
        returned += [head for head, _length in ring.take_used()]
        room = ring.size - len(offered) + len(returned)
        offered += [
            ring.add([Buffer(FREE + number * MIB, MIB, writable=True)]) for number in range(min(FLOOD, room))
        ]
        ring.notify()
        bench.qmp("stop")
        bench.qmp("cont")
    bench.wait_for_index(ring, ring.next_available)
    returned += [head for head, _length in ring.take_used()]
    assert returned == offered
    assert bench.holds(FREE, FLOOD * MIB, 0)
    witness.needs_reset = False


def test_a_driver_that_comes_and_goes(bench: Bench, witness: Witness) -> None:
    """DRIVER_OK taken back and given again without a reset, which no driver may do (virtio 1.3, 2.1.1)."""
    ring = bench.rings[Role.REPORTING]
    bench.fill(FREE, 2 * FLOOD * MIB)
    heads = []
    for number in range(FLOOD):
        heads.append(ring.offer([Buffer(FREE + 2 * number * MIB, 2 * MIB, writable=True)]))
        bench.device.write_register("device_status", ON_ITS_WAY)
        bench.device.write_register("device_status", ON_ITS_WAY | Status.DRIVER_OK)
    bench.wait_for_index(ring, FLOOD)
    assert ring.take_used() == [(head, 0) for head in heads]
    assert bench.holds(FREE, 2 * FLOOD * MIB, 0)
    witness.needs_reset = False


@pytest.mark.parametrize("command", [0, COMMAND_MEMORY], ids=["nothing", "its registers"])
def test_a_device_that_may_no_longer_use_memory(bench: Bench, witness: Witness, command: int) -> None:
    """Without bus mastering QEMU takes DRIVER_OK back. What was reported before is released, or is offered again."""
    ring = bench.rings[Role.REPORTING]
    bench.fill(FREE, 128 * MIB)
    head = ring.offer([Buffer(FREE, 128 * MIB, writable=True)])
    enabled = bench.device.function.read(REGISTER_COMMAND)
    bench.device.function.write(REGISTER_COMMAND, command)
    bench.device.function.write(REGISTER_COMMAND, enabled)
    assert Status.DRIVER_OK not in bench.device.status
    bench.device.add_status(Status.DRIVER_OK)
    assert ring.wait_used(head) == 0
    assert bench.holds(FREE, 128 * MIB, 0)
    witness.needs_reset = False


# --- statistics ---

KNOWN = [(4, 1000)]
DATA = STATISTIC.encode(Statistic(*KNOWN[0]))
# Behind it is nothing but zeroes, which say that nothing was swapped in.
ZEROES = [(0, 0)]


@pytest.mark.parametrize(
    ("buffer", "expected", "is_broken"),
    [
        (Buffer(LIST + PAGE, 0), [], True),
        (Buffer(LIST + PAGE, 1), [], False),
        (Buffer(LIST + PAGE, 9), [], False),
        (Buffer(LIST + PAGE, MIB), KNOWN + ZEROES, False),
        (Buffer(LIST + PAGE, MAX_LENGTH), KNOWN + ZEROES, True),
        (Buffer(LIST + PAGE, 10, writable=True), [], False),
    ],
    ids=["nothing", "1 byte", "9 bytes", "1 MiB", "4 GiB - 1", "the wrong direction"],
)
def test_sizes_of_a_statistics_buffer(
    bench: Bench, witness: Witness, buffer: Buffer, expected: list[tuple[int, int]], is_broken: bool
) -> None:
    """It is held as any other, and says what can be read of it."""
    offer(bench, DATA * 2)
    bench.qtest.write(LIST + PAGE, DATA)
    ring = bench.rings[Role.STATISTICS]
    ring.offer([buffer])
    if is_broken and not bench.ours:
        await_broken(bench)
        return
    bench.wait_for_index(ring, 1)
    bench.send_pages(Role.INFLATE, [FREE])
    assert ring.used_index == 1
    assert bench.statistics() == named(expected)
    witness.needs_reset = False


@pytest.mark.parametrize(
    "buffers",
    [
        [Buffer(RAM_BYTES, 10)],
        [Buffer(INTERRUPTS, 10)],
        [Buffer(LIST + PAGE, 10), Buffer(LAST_ADDRESS - 4, 10)],
    ],
    ids=["behind RAM", "registers", "in part"],
)
def test_statistics_in_no_memory(ours: Bench, buffers: list[Buffer]) -> None:
    """They come back at once, after the buffer that was held before them, and what was said before stays."""
    witness = Witness(ours)
    ours.drive()
    held = offer(ours, DATA)
    ring = ours.rings[Role.STATISTICS]
    bad = ring.offer(buffers)
    ours.wait_for_index(ring, 2)
    assert ring.take_used() == [(held, 0), (bad, 0)]
    assert ours.statistics() == named(KNOWN)
    assert not ours.device.status & Status.NEEDS_RESET
    witness.needs_reset = False
    witness.check()
