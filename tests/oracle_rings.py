"""What the text of virtio says that a device is to make of a split ring: written from it and from nothing of the device.

virtio 1.3, 2.7, as plainly as it can be put. Not a test; the tests compare the device with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

from hostdev.wire.virtqueue import DESCRIPTOR, Descriptor

NEXT, WRITE, INDIRECT = 1, 2, 4
# Of one indirect table: QEMU's bound, and the device's.
MOST_NESTED = 1024

# What becomes of a chain: its descriptors, or the kind of error.
Outcome: TypeAlias = tuple[Descriptor, ...] | str
# Guest memory: the bytes of a range, None if not all of it is memory.
Read: TypeAlias = Callable[[int, int], bytes | None]


def follow(table: Sequence[Descriptor], index: int) -> list[Descriptor] | str:
    """2.7.5: from index on to the first descriptor without NEXT."""
    found: list[Descriptor] = []
    visited = set()
    while index not in visited:
        visited.add(index)
        found.append(table[index])
        if not table[index].flags & NEXT:
            return found
        # 2.7.5.3.1: "A driver MUST NOT set both VIRTQ_DESC_F_INDIRECT and VIRTQ_DESC_F_NEXT in flags."
        if table[index].flags & INDIRECT:
            return "indirect-next"
        index = table[index].next
        if index >= len(table):
            return "next-outside"
    # 2.7.5.2: "Drivers MUST NOT add a descriptor chain longer than 2^32 bytes in total; this implies that loops in the
    # descriptor chain are forbidden!"
    return "loop"


def judge(ring: Sequence[Descriptor], head: int, read: Read, *, negotiated: bool = True) -> Outcome:
    """What a device is to make of the chain that begins with head. negotiated: indirect descriptors are."""
    chain = follow(ring, head)
    if isinstance(chain, str):
        return chain
    if chain[-1].flags & INDIRECT:
        inner = judge_table(chain.pop(), read, negotiated=negotiated)
        if isinstance(inner, str):
            return inner
        chain += inner
    directions = [bool(entry.flags & WRITE) for entry in chain]
    # 2.7.4.2: "The driver MUST place any device-writable descriptor elements after any device-readable descriptor elements."
    if directions != sorted(directions):
        return "readable-after-writable"
    return "too-long" if sum(entry.length for entry in chain) > 1 << 32 else tuple(chain)


def judge_table(entry: Descriptor, read: Read, *, negotiated: bool) -> list[Descriptor] | str:
    """2.7.5.3: a table of indirect descriptors."""
    if not negotiated:
        return "indirect-not-negotiated"
    if entry.length not in range(16, 16 * MOST_NESTED + 1, 16):
        return "indirect-length"
    data = read(entry.address, entry.length)
    if data is None:
        return "indirect-outside"
    inner = follow([_decoded(data[at : at + 16]) for at in range(0, len(data), 16)], 0)
    if isinstance(inner, list) and inner[-1].flags & INDIRECT:
        return "nested-indirect"
    return inner


@lru_cache(maxsize=4096)
def _decoded(data: bytes) -> Descriptor:
    return DESCRIPTOR.decode(data)
