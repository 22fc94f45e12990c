"""A guest without a kernel: modelled zones and page reporting over counted pages, or over real ones with a real device.

    with start_device() as device, guest_on(device, 256 << 20, Parameters()) as guest:
        block = guest.allocate(9)
        guest.free(block)
        guest.run_until(60.0)
        print(guest.reports, guest.reported_bytes, guest.footprint_bytes)

Time is an event loop's, which any number of guests may share. What the guest does with its memory is up to a workload
(workloads.py) or to a test. Not modelled: everything of a kernel but its free pages, and the hole below 4 GiB in a PC's
physical addresses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from random import Random

from guest_images.buddy import Zone
from guest_images.event_loop import EventLoop
from guest_images.free_lists import (
    MAX_PAGE_ORDER,
    PAGE_SIZE,
    Block,
    MigrateType,
    ModelError,
    Watermarks,
    aligned_blocks,
)
from guest_images.guest_pages import AccountedPages, MappedPages
from guest_images.page_reporting import PageReporting, Parameters, Pass, Variant
from hostdev.driver import GuestMemory
from hostdev.frontend import DeviceProcess, Frontend

LARGEST_BLOCK = PAGE_SIZE << MAX_PAGE_ORDER
# Where a freshly booted guest has its kernel: in no zone.
RESERVED_BYTES = LARGEST_BLOCK
# The front end's rings, 5 of 256 KiB, lie behind the memory, so that zones may be anywhere in it.
RING_BYTES = 2 << 20
# Where x86-64 ends its zones: DMA, DMA32.
_ZONE_ENDS = (("DMA", 16 << 20), ("DMA32", 4 << 30))
SMALLEST_GUEST = 32 << 20
# Linux's reporting ring of QEMU's device has 128 entries; longer scatterlists need a longer ring.
_RING_SIZE = 128


def zones_of(memory_bytes: int, variant: Variant = Variant.MERGED) -> list[Zone]:
    """Make the zones of a freshly booted guest, all free. Raises ModelError for a size that cannot be.

    memory_bytes: a multiple of 4 MiB, 32 MiB at least. Watermarks are those that Linux computes for the size.
    """
    if memory_bytes < SMALLEST_GUEST or memory_bytes % LARGEST_BLOCK:
        raise ModelError(
            f"a guest of {memory_bytes} bytes cannot be modelled: give a multiple of 4 MiB, 32 MiB at least"
        )
    start, all_pages = RESERVED_BYTES, (memory_bytes - RESERVED_BYTES) // PAGE_SIZE
    zones = []
    for name, limit in (*_ZONE_ENDS, ("Normal", memory_bytes)):
        end = min(limit, memory_bytes)
        if start < end:
            pages = range(start // PAGE_SIZE, end // PAGE_SIZE)
            marks = Watermarks.of_linux(len(pages), all_pages)
            to_tail = variant is not Variant.V17
            zones.append(Zone(name, pages.start, pages.stop, marks, put_back_to_tail=to_tail))
            start = end
    return zones


class ModelledGuest:
    """Zones, page reporting and pages, on a loop.

    Public parts: zones, reporting, pages, loop; random, the guest's own seeded generator; reclaimers, which are asked
    to free so many pages when an allocation fails, and return how many they freed.
    """

    def __init__(
        self,
        zones: Sequence[Zone],
        parameters: Parameters,
        pages: AccountedPages,
        *,
        loop: EventLoop | None = None,
        seed: int = 0,
    ) -> None:
        """Raises ModelError where the zones do not lie in the memory.

        What is in use in them is written, and the driver registers, at once.
        """
        if zones[-1].end_pfn * PAGE_SIZE > pages.memory_bytes:
            raise ModelError(
                f"zone {zones[-1].name} ends at page {zones[-1].end_pfn}, beyond a memory of {pages.memory_bytes} bytes: "
                "give the guest the memory that its zones describe"
            )
        self.zones = list(zones)
        self.pages = pages
        self.loop = loop or EventLoop()
        self.random = Random(seed)
        self.reclaimers: list[Callable[[int], int]] = []
        self.failed_allocations = 0
        for zone in self.zones:
            for block in zone.used_blocks():
                pages.take(block)
        self.reporting = PageReporting(self.zones, parameters, pages.report, self.loop)
        self.reporting.register()

    def write_everything(self) -> None:
        """Write all pages, used and free: the host then holds what it holds of a guest that has used all its memory."""
        for zone in self.zones:
            for block in aligned_blocks(zone.start_pfn, zone.end_pfn):
                self.pages.take(block)

    def allocate(self, order: int, migrate_type: MigrateType = MigrateType.MOVABLE) -> Block | None:
        """Take a block and write it; None where there is none even after reclaim. Raises PageCheckError.

        From the highest zone down to the low watermarks, then to the min watermarks, as Linux does.
        """
        pfn = self._find(order, migrate_type)
        if pfn is None and any(reclaimer(1 << order) for reclaimer in self.reclaimers):
            pfn = self._find(order, migrate_type)
        if pfn is None:
            self.failed_allocations += 1
            return None
        block = Block(pfn, order)
        self.pages.take(block)
        return block

    def _find(self, order: int, migrate_type: MigrateType) -> int | None:
        for low in (True, False):
            for zone in reversed(self.zones):
                mark = zone.watermarks.low if low else zone.watermarks.min
                pfn = zone.allocate(order, migrate_type, mark)
                if pfn is not None:
                    return pfn
        return None

    def free(self, block: Block) -> None:
        """Give a block back to its zone, after a look at its bytes. Raises PageCheckError and ModelError."""
        self.pages.give_up(block)
        for zone in self.zones:
            if zone.start_pfn <= block.pfn < zone.end_pfn:
                zone.free(block.pfn)
                return
        raise ModelError(f"page {block.pfn} is in no zone: free what allocate() returned")

    def run_until(self, moment: float) -> None:
        """Live until a moment (seconds). With a shared loop this runs all of its guests."""
        self.loop.run_until(moment)

    @property
    def memory_bytes(self) -> int:
        """Size of the guest's memory."""
        return self.pages.memory_bytes

    @property
    def free_bytes(self) -> int:
        """Free memory, as the guest counts it."""
        return sum(zone.free_pages for zone in self.zones) * PAGE_SIZE

    @property
    def footprint_bytes(self) -> int:
        """Bytes that the host holds for the guest's memory; measured with a device, accounted without."""
        return self.pages.footprint_bytes

    @property
    def passes(self) -> list[Pass]:
        """What each pass of page reporting did, and when."""
        return self.reporting.passes

    @property
    def reports(self) -> int:
        """Number of reports so far."""
        return self.reporting.reports

    @property
    def reported_bytes(self) -> int:
        """Bytes of all reports so far."""
        return self.reporting.reported_bytes

    def verify(self) -> None:
        """Check all pages and zones. Raises PageCheckError and ModelError. Slow."""
        self.pages.verify()
        for zone in self.zones:
            zone.check()

    def close(self) -> None:
        """Stop reporting and give up the pages."""
        self.reporting.unregister()
        self.pages.close()


def accounted_guest(
    memory_bytes: int, parameters: Parameters, *, loop: EventLoop | None = None, seed: int = 0
) -> ModelledGuest:
    """Make a guest whose pages are counted only: no memory, no device. Raises ModelError."""
    zones = zones_of(memory_bytes, parameters.variant)
    return ModelledGuest(zones, parameters, AccountedPages(memory_bytes), loop=loop, seed=seed)


@contextlib.contextmanager
def guest_on(
    device: DeviceProcess,
    memory_bytes: int,
    parameters: Parameters,
    *,
    loop: EventLoop | None = None,
    seed: int = 0,
    zones: Sequence[Zone] | None = None,
    whole_pages: bool = False,
) -> Iterator[ModelledGuest]:
    """Connect a guest with real memory to a device. Raises ModelError, FrontendError.

    zones: those of a freshly booted guest unless given.
    For many guests: start all devices first, leave the contexts in reverse order. A device that is forked later holds
    the descriptors of the guests before it, and their memory with them, until it ends.
    """
    if zones is None:
        zones = zones_of(memory_bytes, parameters.variant)
    ring_size = max(_RING_SIZE, 1 << (parameters.capacity - 1).bit_length())
    memory = GuestMemory(memory_bytes + RING_BYTES)
    with Frontend(device.connect(), memory=memory, ring_size=ring_size, rings_at=memory_bytes) as frontend:
        frontend.start()
        pages = MappedPages(frontend, memory_bytes, whole_pages=whole_pages)
        guest = ModelledGuest(zones, parameters, pages, loop=loop, seed=seed)
        try:
            yield guest
        finally:
            guest.close()
