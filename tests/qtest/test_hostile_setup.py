"""Set-up that no driver should do: rings where none can be, sizes, features, notifications, writes to config space.

A ring that cannot even be begun with is refused by ours, and QEMU then starts none of that device: the guest has a dead
balloon until it resets it, and everything else goes on.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostdev.driver import Buffer
from hostdev.wire.balloon import CONFIG_SIZE, Config, Role
from qmp_glue.virtio_pci import PciRing, Status
from tests.qtest.bench import (
    FEATURES,
    FREE,
    LIST,
    PAGE,
    RAM_BYTES,
    RING_BYTES,
    RING_SIZE,
    RINGS_AT,
    Bench,
)
from tests.qtest.hostile import (
    INTERRUPTS,
    LAST_ADDRESS,
    REFUSED,
    ROM_AT,
    Witness,
    await_broken,
    started,
)

NO_VECTOR = 0xFFFF  # VIRTIO_MSI_NO_VECTOR (virtio 1.3, 4.1.4.3)
PARTS = ("descriptors", "available", "used")


@pytest.fixture
def witness(bench: Bench) -> Iterator[Witness]:
    witness = Witness(bench)
    yield witness
    witness.check()


# --- places and sizes ---


def drive_with(bench: Bench, role: Role, *, size: int | None = None, **place: int) -> None:
    """Do all that a driver does, but with one ring of this size, or with a part of it here."""
    bench.set_up()
    allowed = bench.rings[role].size
    ring = PciRing(bench.device, role, size or allowed, RINGS_AT + role * RING_BYTES)
    for part, address in place.items():
        setattr(ring, part, address)
    bench.device.enable_queue(ring)
    bench.rings[role] = ring
    bench.device.add_status(Status.DRIVER_OK)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "address",
    [RAM_BYTES, INTERRUPTS, LAST_ADDRESS - PAGE + 1, FREE + 1],
    ids=["behind RAM", "registers", "the last page", "an odd address"],
)
def test_a_ring_where_none_can_be(bench: Bench, witness: Witness, part: str, address: int) -> None:
    """QEMU's goes on with the others. Ours is not started, at every attempt, until the driver has reset it."""
    drive_with(bench, Role.REPORTING, **{part: address})
    if bench.ours:
        bench.qmp("stop")
        bench.qmp("cont")
        assert not any(started(bench).values())
        witness.expected = [*REFUSED, *REFUSED]
    else:
        assert bench.send_pages(Role.INFLATE, [FREE]) == 0
    assert not bench.device.status & Status.NEEDS_RESET
    # All that QEMU asks of a back end that it has not started.
    bench.device.write_config(8, 4, 7)
    assert bench.config().poison_val == 0
    for role in Role:
        bench.qtest.writew(bench.device.notify_address(role), role)


@pytest.mark.parametrize("part", PARTS)
def test_a_ring_in_the_roms(ours: Bench, part: str) -> None:
    witness = Witness(ours)
    drive_with(ours, Role.REPORTING, **{part: ROM_AT})
    assert not any(started(ours).values())
    witness.expected = [*REFUSED]
    witness.check()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("address", [RAM_BYTES - 16, ROM_AT - 16], ids=["RAM", "the first region"])
def test_a_ring_across_the_end_of(bench: Bench, witness: Witness, part: str, address: int) -> None:
    """QEMU itself cannot map it, and says NEEDS_RESET for either device."""
    drive_with(bench, Role.REPORTING, **{part: address})
    await_broken(bench)
    witness.expected = ["Failed to map", "Error starting"]


def test_rings_of_one(bench: Bench, witness: Witness) -> None:
    """A chain at a time in each, and a statistics buffer held for which there is no second place."""
    bench.drive(size=1)
    ring = bench.rings[Role.STATISTICS]
    head = ring.offer([Buffer(LIST, 20)])
    for _ in range(3):
        witness.check_service()
    assert ring.used_index == 0
    bench.command("qom-set", bench.set_interval(1))
    bench.pass_time(0.001)
    assert ring.wait_used(head) == 0


@pytest.mark.parametrize("size", [3, 31])
def test_a_size_that_is_no_power_of_two(bench: Bench, witness: Witness, size: int) -> None:
    """QEMU's takes it, where the standard allows it for packed rings only (virtio 1.3, 2.7)."""
    drive_with(bench, Role.REPORTING, size=size)
    assert bench.device.queue_size(Role.REPORTING) == size
    if bench.ours:
        assert not any(started(bench).values())
        witness.expected = [*REFUSED]
    else:
        assert bench.report((FREE, PAGE)) == 0


@pytest.mark.parametrize("size", [0, 1025, 1 << 15, 0xFFFF])
def test_a_size_that_qemu_does_not_take(bench: Bench, witness: Witness, size: int) -> None:
    """The last one stays."""
    bench.set_up()
    ring = bench.rings[Role.REPORTING]
    bench.device.write_register("queue_select", ring.index)
    bench.device.write_register("queue_size", size)
    assert bench.device.queue_size(ring.index) == ring.size
    bench.device.add_status(Status.DRIVER_OK)
    witness.needs_reset = False


def test_rings_without_an_address(bench: Bench, witness: Witness) -> None:
    bench.device.negotiate(FEATURES)
    for role in Role:
        bench.device.write_register("queue_select", role)
        bench.device.write_register("queue_enable", 1)
    bench.device.add_status(Status.DRIVER_OK)
    for role in Role:
        bench.qtest.writew(bench.device.notify_address(role), role)
    assert not bench.device.status & Status.NEEDS_RESET
    if bench.ours:
        assert not any(started(bench).values())


def test_a_driver_without_rings(bench: Bench, witness: Witness) -> None:
    bench.device.negotiate(FEATURES)
    bench.device.add_status(Status.DRIVER_OK)
    for role in Role:
        bench.qtest.writew(bench.device.notify_address(role), role)
    assert not bench.device.status & Status.NEEDS_RESET


def test_rings_that_are_enabled_again(bench: Bench, witness: Witness) -> None:
    """Before DRIVER_OK and after it, where they were."""
    bench.set_up()
    for ring in bench.rings.values():
        bench.device.enable_queue(ring)
    bench.device.add_status(Status.DRIVER_OK)
    bench.send_pages(Role.INFLATE, [FREE])
    for ring in bench.rings.values():
        bench.device.enable_queue(ring)
    witness.needs_reset = False


def test_a_ring_that_is_to_end(bench: Bench, witness: Witness) -> None:
    """QEMU says NEEDS_RESET for either device. Its own then answers nothing; ours is not told."""
    bench.drive()
    bench.device.write_register("queue_select", Role.INFLATE)
    bench.device.write_register("queue_enable", 0)
    await_broken(bench)
    witness.expected = ["wrong value for queue_enable"]
    witness.needs_reset = not bench.ours


def test_a_ring_that_is_moved_while_it_runs(ours: Bench) -> None:
    """QEMU's looks for it at the new place at once; ours is told of that at the next start."""
    witness = Witness(ours)
    ours.drive()
    ours.send_pages(Role.INFLATE, [FREE])
    elsewhere = PciRing(ours.device, Role.INFLATE, RING_SIZE, RINGS_AT + len(Role) * RING_BYTES)
    ours.device.enable_queue(elsewhere)
    witness.needs_reset = False
    witness.check()
    assert elsewhere.used_index == 0


# --- features and status ---


@pytest.mark.parametrize("excess", [1 << 5, 1 << 29, 1 << 30, 1 << 34, 1 << 63, (1 << 64) - 1])
def test_features_that_were_not_offered(bench: Bench, witness: Witness, excess: int) -> None:
    """QEMU takes what was offered of them; ours is told no more."""
    bench.drive(FEATURES | excess)
    assert Status.FEATURES_OK in bench.device.status
    if bench.ours:
        status = bench.command("query-status")
        assert status["negotiated"] == status["features"]
    witness.needs_reset = False


def test_features_after_the_driver_began(bench: Bench, witness: Witness) -> None:
    bench.drive()
    for select in (0, 1):
        bench.device.write_register("driver_feature_select", select)
        bench.device.write_register("driver_feature", 0)
    bench.device.add_status(Status.FEATURES_OK)
    bench.fill(FREE, PAGE)
    assert bench.given_back(lambda: bench.report((FREE, PAGE))) == PAGE
    witness.needs_reset = False


@pytest.mark.parametrize("status", [Status.DRIVER_OK, 0xFF, 0x30])
def test_a_status_out_of_nowhere(bench: Bench, witness: Witness, status: int) -> None:
    bench.device.write_register("device_status", status)
    assert bench.device.status == status


# --- notifications ---


@pytest.mark.parametrize("vector", [100, 2048, 0xFFFE])
def test_vectors_that_do_not_exist(bench: Bench, witness: Witness, vector: int) -> None:
    bench.set_up()
    bench.device.write_register("config_msix_vector", vector)
    assert bench.device.read_register("config_msix_vector") == NO_VECTOR
    for role in Role:
        bench.device.write_register("queue_select", role)
        bench.device.write_register("queue_msix_vector", vector)
        assert bench.device.read_register("queue_msix_vector") == NO_VECTOR
    bench.device.add_status(Status.DRIVER_OK)
    witness.needs_reset = False


@pytest.mark.parametrize("when", ["after reset", "before DRIVER_OK", "after it"])
def test_notifications_that_mean_nothing(bench: Bench, witness: Witness, when: str) -> None:
    """Of each queue and of none, of another queue's number, of every width."""
    if when != "after reset":
        bench.set_up()
    if when == "after it":
        bench.device.add_status(Status.DRIVER_OK)
    first, second = bench.device.notify_address(0), bench.device.notify_address(1)
    step = second - first
    for number in (*range(8), 100, 255, 1023):
        for value in (number, 0, 0xFFFF):
            bench.qtest.writew(first + step * number, value)
        bench.qtest.writeb(first + step * number, 1)
        bench.qtest.writel(first + step * number, 0xFFFF_FFFF)
    if when == "before DRIVER_OK":
        bench.device.add_status(Status.DRIVER_OK)
    witness.needs_reset = when == "after reset"


# --- config space ---


def test_config_space_written_everywhere(bench: Bench, witness: Witness) -> None:
    """Every offset, within and beyond, by every width: the driver's own two fields are what changes."""
    bench.drive()
    base = bench.device.config_address
    for offset in (*range(CONFIG_SIZE + 8), 0x100, 0xFF8):
        bench.qtest.writeb(base + offset, 0xFF)
        bench.qtest.writew(base + offset, 0xFFFF)
        bench.qtest.writel(base + offset, 0xFFFF_FFFF)
        bench.qtest.writeq(base + offset, LAST_ADDRESS)
    assert bench.config() == Config(actual=0xFFFF_FFFF, poison_val=0xFFFF_FFFF)
    beyond = [bench.qtest.readl(base + offset) for offset in (CONFIG_SIZE, CONFIG_SIZE + 4, 0x100)]
    assert beyond == [0xFFFF_FFFF] * 3
    across = bench.qtest.readq(base + CONFIG_SIZE - 4)
    assert across == LAST_ADDRESS
