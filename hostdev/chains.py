"""What a descriptor chain of each queue says: page frame numbers, reported ranges, statistics, hints.

Readable buffers are what the driver says, writable ones what it offers: the direction is checked here, a buffer of the
other direction says nothing. Buffers are read by pread (memory.py), never through a mapping. No policy. Used by balloon.py.
"""

from __future__ import annotations

from hostdev.errors import ChainError
from hostdev.memory import MemoryTable
from hostdev.pages import Span, merge
from hostdev.virtqueue import Chain
from hostdev.wire.balloon import COMMAND_ID_STRUCT, PFN_STRUCT, STATISTIC_STRUCT

# Linux puts 256 PFNs (1 KiB) in a buffer. 16384 of them still sort in about 5 ms; what is over that is left out.
MAX_PFN_BYTES = 64 << 10
# Firecracker's bound on statistics tags in one buffer; Linux 6.12 sends 16.
MAX_STATISTICS = 256


def gather(memory: MemoryTable, chain: Chain, limit: int) -> bytes:
    """Copy the readable bytes of a chain, at most limit. Raises ChainError for a buffer outside memory."""
    data = bytearray()
    for entry in chain.descriptors:
        wanted = min(entry.length, limit - len(data))
        if entry.is_writable or wanted <= 0:
            continue
        piece = memory.read(entry.address, wanted)
        if piece is None:
            raise ChainError(chain.head, "outside", "a buffer outside guest memory")
        data += piece
    return bytes(data)


def page_frame_numbers(memory: MemoryTable, chain: Chain) -> tuple[int, ...]:
    """Gather the PFNs of a chain, over any split into descriptors. Raises ChainError for a buffer outside memory."""
    data = gather(memory, chain, MAX_PFN_BYTES)
    whole = len(data) - len(data) % PFN_STRUCT.size
    return tuple(pfn for (pfn,) in PFN_STRUCT.iter_unpack(data[:whole]))


def has_too_many(chain: Chain) -> bool:
    """True if page_frame_numbers() leaves some out."""
    return sum(entry.length for entry in chain.descriptors if not entry.is_writable) > MAX_PFN_BYTES


def reported(chain: Chain) -> list[Span]:
    """Return the ranges of a report, merged: pages are offered as writable buffers (5.5.6.5)."""
    return merge(Span(entry.address, entry.length) for entry in chain.descriptors if entry.is_writable)


def statistics(memory: MemoryTable, chain: Chain) -> bytes:
    """Return the bytes of a statistics buffer. Raises ChainError for a buffer outside memory."""
    return gather(memory, chain, MAX_STATISTICS * STATISTIC_STRUCT.size)


def command_id(memory: MemoryTable, chain: Chain) -> int | None:
    """Return the command id that a chain of the hinting queue brings, None if it brings none.

    Raises ChainError for a buffer outside memory.
    """
    data = gather(memory, chain, COMMAND_ID_STRUCT.size)
    return COMMAND_ID_STRUCT.unpack(data)[0] if len(data) == COMMAND_ID_STRUCT.size else None


def hinted(memory: MemoryTable, chain: Chain) -> list[int]:
    """Return the size in bytes of each block that a chain of the hinting queue hints, as far as it is memory.

    Blocks that touch are one: a thousand times all regions, hinted in one chain, would take 30 ms to add up.
    """
    return [sum(part.length for part in memory.split(*block)) for block in reported(chain)]
