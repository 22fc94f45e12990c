"""What hostile drivers put into guest memory, and what must be as it was when they are through. Not a test.

A driver can harm its own guest, and nothing else: QEMU lives, the device's process is the same one, QEMU has written
what was to be expected, and after a reset the device does all that it did before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hostdev.wire.balloon import PFN_STRUCT, Role
from hostdev.wire.virtqueue import DESCRIPTOR, DESCRIPTOR_NEXT, DESCRIPTOR_SIZE, Descriptor
from qmp_glue.virtio_pci import PciRing, Status
from tests.qtest.bench import FREE, LIST, PAGE, PATTERN, Bench

# Where no RAM is. The board has no VGA, so its first hole is that of the ROMs: from 768 KiB to 1 MiB.
ROM_AT, ROM_END = 0xC0000, 0x100000
PCI_HOLE, INTERRUPTS = 0xE800_0000, 0xFEE0_0000
LAST_ADDRESS = (1 << 64) - 1
MAX_LENGTH = 0xFFFF_FFFF
# Indirect tables and buffers, behind the list of page frame numbers.
TABLE = LIST + 16 * PAGE
# Pages of the pattern from FREE on; as many lie before it.
PAGES = 8

# What QEMU writes when our device says that a ring is broken, and when it refuses one (seen with 11.1.3).
BROKEN = "vhost vring error in virtqueue"
REFUSED = ("vhost_set_vring_kick failed", "Error starting vhost-user-base")


class Witness:
    """Notes how QEMU and our device are; check() says whether they still are.

    expected: how each line begins that QEMU is to write. needs_reset: the driver has to begin anew to be served.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._worker = self._device()
        self._qemu_said = len(bench.qemu_log())
        self._device_said = len(bench.device_log()) if bench.ours else 0
        self.expected: list[str] = []
        self.needs_reset = True

    def _device(self) -> tuple[int, bool]:
        """The process of our device, and that it releases memory."""
        if not self._bench.ours:
            return 0, False
        status = self._bench.command("query-status")
        return status["worker"], status["inert"]

    def said(self) -> list[str]:
        """Return what QEMU has written since, line by line, as far as it has come to the end of one: it writes in pieces."""
        whole = self._bench.qemu_log()[self._qemu_said :].rpartition("\n")[0]
        return [line.partition(": ")[2] for line in whole.splitlines()]

    def check(self) -> None:
        """Assert that nothing has come to harm, and that a well-behaved driver is served."""
        assert self._bench.qmp("query-status") == {"running": True, "status": "running"}
        assert self._device() == self._worker
        if self._bench.ours:
            self._check_texts()
        if self.needs_reset:
            self._bench.renew()
            self._bench.drive()
        self.check_service()

    def _check_texts(self) -> None:
        self._bench.wait_until(lambda: len(self.said()) >= len(self.expected), "QEMU says nothing")
        said = self.said()
        assert len(said) == len(self.expected), said
        assert all(line.startswith(begin) for line, begin in zip(said, self.expected, strict=True)), said
        told = self._bench.device_log()[self._device_said :]
        assert "ERROR" not in told, told
        assert "Traceback" not in told, told

    def check_service(self, *, but: Role | None = None) -> None:
        """Assert that each ring serves, one of them left out."""
        bench = self._bench
        bench.fill(FREE, 2 * PAGE)
        if but is not Role.REPORTING:
            assert bench.given_back(lambda: bench.report((FREE, PAGE))) == PAGE
        if but is not Role.INFLATE:
            assert bench.given_back(lambda: bench.send_pages(Role.INFLATE, [FREE + PAGE])) == PAGE
        for role in (Role.DEFLATE, Role.FREE_PAGE_HINT):
            if but is not role:
                assert bench.send_pages(role, [FREE]) == 0


@dataclass(frozen=True)
class Case:
    """A chain with its head at 0, and what it comes to.

    descriptors: of the ring's table from 0 on. table: what is put at table_at. data: what is put at LIST. released: the
    pages, from FREE on, that ours gives back. theirs: the same of QEMU's, None where it says NEEDS_RESET. kind: of the
    error that ours counts.
    """

    descriptors: tuple[Descriptor, ...]
    theirs: tuple[int, ...] | None
    released: tuple[int, ...] = ()
    kind: str = ""
    role: Role = Role.REPORTING
    table: tuple[Descriptor, ...] = ()
    table_at: int = TABLE
    data: bytes = b""


def pfns(*pages: int) -> bytes:
    return b"".join(PFN_STRUCT.pack(page) for page in pages)


def readable(*buffers: tuple[int, int]) -> tuple[Descriptor, ...]:
    """A chain of readable buffers: pairs of address and length."""
    return tuple(
        Descriptor(address, length, 0 if number == len(buffers) else DESCRIPTOR_NEXT, number)
        for number, (address, length) in enumerate(buffers, 1)
    )


def put_table(bench: Bench, address: int, table: Sequence[Descriptor]) -> None:
    for number, descriptor in enumerate(table):
        bench.qtest.write(address + DESCRIPTOR_SIZE * number, DESCRIPTOR.encode(descriptor))


def put(bench: Bench, case: Case) -> None:
    """Lay out all of a case in guest memory, amid pages of the pattern; nothing is offered yet."""
    bench.fill(FREE - PAGES * PAGE, 2 * PAGES * PAGE)
    put_table(bench, case.table_at, case.table)
    bench.qtest.write(LIST, case.data or bytes(PAGE))
    for number, descriptor in enumerate(case.descriptors):
        bench.rings[case.role].write_descriptor(number, descriptor)


def offer(ring: PciRing, head: int = 0) -> None:
    ring.publish(head)
    ring.notify()


def assert_released(bench: Bench, pages: Iterable[int]) -> None:
    """Assert that of the pages of the pattern these, and no others, are gone."""
    gone = set(pages)
    for page in range(-PAGES, PAGES):
        value = 0 if page in gone else PATTERN
        assert bench.holds(FREE + page * PAGE, PAGE, value), f"page {page}"


def await_broken(bench: Bench) -> None:
    """Wait until QEMU's own says NEEDS_RESET."""
    bench.wait_until(lambda: Status.NEEDS_RESET in bench.device.status, "the device is not broken")


def await_stopped(bench: Bench, role: Role) -> None:
    """Wait until ours has stopped this ring, and see that it has stopped no other."""
    bench.wait_until(lambda: not started(bench)[role], "the ring goes on")
    assert all(state for other, state in started(bench).items() if other is not role)


def started(bench: Bench) -> dict[Role, bool]:
    """Which rings ours has started, where they are numbered as the standard has it."""
    return {Role(ring["index"]): ring["started"] for ring in bench.command("query-rings")}
