"""The device with a fault: where the page next to a release belongs to --verify's canary, it is given back as well.

Nothing says so but the log: neither the trace nor the counters. It spares all other pages, or the guest's kernel would be
gone before anybody looks; with --any it spares none. A program, run in place of hostdev.cli; --verify must catch it, the
first kind by each of its proofs.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys

from balloonlab.measure.verify import CANARY_BYTES, CANARY_SEED
from balloonlab.measure.verify_dump import Known
from hostdev import cli, discard
from hostdev.memory import Region

PROGRAM = ("-m", "tests.seeded.one_page_too_many")
ANY = "--any"
SAID = "a page too many is given back"
PAGE = mmap.PAGESIZE

log = logging.getLogger(__name__)
CANARY = Known(CANARY_BYTES, CANARY_SEED)
right = discard.Discarder.release


def release_any(self: discard.Discarder, region: Region, offset: int, length: int) -> None:
    """Do what is right, and the page behind it."""
    right(self, region, offset, length)
    if offset + length < region.size:
        region.advise(mmap.MADV_REMOVE, offset + length, PAGE)


def release(self: discard.Discarder, region: Region, offset: int, length: int) -> None:
    """Do what is right, and then too much."""
    right(self, region, offset, length)
    for neighbour in (offset - PAGE, offset + length):
        if 0 <= neighbour < region.size and is_canary(region, neighbour):
            region.advise(mmap.MADV_REMOVE, neighbour, PAGE)
            log.warning("%s: %#x", SAID, region.guest_address + neighbour)


def is_canary(region: Region, offset: int) -> bool:
    """True of a page of the canary; read without the mapping, which would fill a hole."""
    page = os.pread(region.fd.fileno(), PAGE, region.file_offset + offset)
    return CANARY.has(memoryview(page))


if __name__ == "__main__":
    is_any = ANY in sys.argv
    sys.argv = [word for word in sys.argv if word != ANY]
    discard.Discarder.release = release_any if is_any else release  # type: ignore[method-assign]
    sys.exit(cli.main())
