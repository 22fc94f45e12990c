"""The bytes behind a modelled guest's pages: counted only, or really written and really reported to a device.

AccountedPages keeps a flag for each page that the host would hold. MappedPages does the same and does it for real: it
writes a stamp into every page that the guest takes, sends reports through a Frontend to a device, and checks each page
whenever it is taken, given up or verified:

    written and not reported since     its own stamp, whatever has happened in between
    reported, or never written         zeros, or the stamp that it had

So a device that gives back a page that was not named is caught. modelled_guest.py is its user; it decides nothing.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Sequence
from struct import Struct

from guest_images.free_lists import PAGE_SIZE, Block, ModelError
from hostdev.driver import Buffer, GuestMemory
from hostdev.frontend import Frontend
from hostdev.wire.balloon import Role

# What makes a page's stamp its own: page frame number, and the number of the allocation.
_IDENTITY = Struct("<QQ")
# A stamp is a cache line at the start of a page, or the page: repeats of the identity.
SHORT_STAMP = 64
# DriverRing has room for tables of 64 entries, and for as many as a ring of 128 has heads. Longer ones go direct.
_INDIRECT_LIMIT = 64
_INDIRECT_RING = 128


class PageCheckError(ModelError):
    """A page does not hold what it must: the device gave back or changed a page that was not named to it."""


class AccountedPages:
    """Which of a guest's pages the host holds, if the guest touches all that it takes and reports are granted."""

    def __init__(self, memory_bytes: int) -> None:
        self._resident = bytearray(memory_bytes // PAGE_SIZE)
        self._count = 0

    @property
    def memory_bytes(self) -> int:
        """Size of the guest's memory."""
        return len(self._resident) * PAGE_SIZE

    @property
    def accounted_bytes(self) -> int:
        """Bytes that the host should hold: of pages written and not reported since."""
        return self._count * PAGE_SIZE

    @property
    def footprint_bytes(self) -> int:
        """Bytes that the host holds."""
        return self.accounted_bytes

    def take(self, block: Block) -> None:
        """The guest allocates a block and writes all of it."""
        self._flag(block, 1)

    def give_up(self, block: Block) -> None:
        """The guest frees a block; the host does not learn of it."""

    def report(self, blocks: Sequence[Block]) -> None:
        """The guest reports free blocks, and the host gives them back."""
        for block in blocks:
            self._flag(block, 0)

    def verify(self) -> None:
        """Check all pages."""

    def close(self) -> None:
        """Give up what is held."""

    def _flag(self, block: Block, value: int) -> None:
        start, end = block.pfn, block.pfn + block.pages
        change = block.pages - self._resident.count(value, start, end)
        self._resident[start:end] = bytes([value]) * block.pages
        self._count += change if value else -change


class MappedPages(AccountedPages):
    """Pages in a front end's guest memory, reported to its device."""

    def __init__(self, frontend: Frontend, memory_bytes: int, *, whole_pages: bool = False) -> None:
        """frontend: started; its rings lie where no zone is. memory_bytes: from address 0 on, what zones may use.

        whole_pages: stamp all of a page, not 64 bytes. The mapping is not handed to forked children: a device that held it would keep the memory.
        """
        super().__init__(memory_bytes)
        self._ring = frontend.rings[Role.REPORTING]
        self.memory: GuestMemory = frontend.memory
        self._mapping = mmap.mmap(frontend.memory.fd.fileno(), memory_bytes)
        self._mapping.madvise(mmap.MADV_DONTFORK)
        self._size = PAGE_SIZE if whole_pages else SHORT_STAMP
        self._repeats = self._size // _IDENTITY.size
        self._zeros = bytes(self._size)
        self._serial = 0
        # The serial of each page's last stamp; 0 for none, which is all zeros.
        self._serials = array("Q", bytes(8 * len(self._resident)))

    @property
    def footprint_bytes(self) -> int:
        """Bytes that the host holds in the guest's memory, rings included."""
        return self.memory.footprint()

    def take(self, block: Block) -> None:
        """Check what is there, then write new stamps. Raises PageCheckError.

        Read through the mapping, which makes holes resident: the stamp is about to do the same.
        """
        self._check(block)
        self._serial += 1
        serial, size, mapping = self._serial, self._size, self._mapping
        for pfn in range(block.pfn, block.pfn + block.pages):
            at = pfn * PAGE_SIZE
            mapping[at : at + size] = _IDENTITY.pack(pfn, serial) * self._repeats
        self._serials[block.pfn : block.pfn + block.pages] = array("Q", [serial]) * block.pages
        super().take(block)

    def give_up(self, block: Block) -> None:
        """Check that the guest's bytes are still there. Raises PageCheckError."""
        self._check(block)

    def _check(self, block: Block) -> None:
        mapping, size = self._mapping, self._size
        for pfn in range(block.pfn, block.pfn + block.pages):
            at = pfn * PAGE_SIZE
            if mapping[at : at + size] != self._stamp(pfn):
                self._judge(pfn, mapping[at : at + size])

    def _stamp(self, pfn: int) -> bytes:
        serial = self._serials[pfn]
        return _IDENTITY.pack(pfn, serial) * self._repeats if serial else self._zeros

    def _judge(self, pfn: int, found: bytes) -> None:
        """Judge a page that does not hold its stamp."""
        if found == self._zeros and not self._resident[pfn]:
            return
        state = "zeros" if found == self._zeros else f"foreign bytes ({found[:16].hex()})"
        raise PageCheckError(
            f"page {pfn} (address {pfn * PAGE_SIZE:#x}) holds {state} although the guest wrote it and did not report it "
            "since: the device must give back the pages of a report, whole, and no other"
        )

    def report(self, blocks: Sequence[Block]) -> None:
        """Report blocks to the device and wait for its answer. Raises FrontendError if none comes."""
        buffers = [Buffer(pfn * PAGE_SIZE, PAGE_SIZE << order, writable=True) for pfn, order in blocks]
        indirect = len(buffers) <= _INDIRECT_LIMIT and self._ring.size <= _INDIRECT_RING
        self._ring.wait_used(self._ring.offer(buffers, indirect=indirect))
        super().report(blocks)

    def verify(self) -> None:
        """Check every page that was ever written, without making any resident. Raises PageCheckError."""
        descriptor = self.memory.fd.fileno()
        for pfn, serial in enumerate(self._serials):
            if serial:
                found = os.pread(descriptor, self._size, pfn * PAGE_SIZE)
                if found != self._stamp(pfn):
                    self._judge(pfn, found)

    def close(self) -> None:
        """Unmap the memory; the front end still owns it."""
        self._mapping.close()
