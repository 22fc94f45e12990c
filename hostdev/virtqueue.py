"""A split virtqueue seen from the device: pop a validated descriptor chain, put its head back as used.

Every field that the guest controls is read once into a local, the copy is checked and the copy is used; a guest that
rewrites a descriptor meanwhile changes nothing. What the buffers mean is balloon.py's business.

Memory order. Pure Python has no fence, and none is needed on x86-64 as long as nothing is suppressed: stores become
visible in program order (Intel SDM volume 3, 9.2.2), so a used element is seen no later than the index that publishes
it, and both no later than what the release before them changed. What x86-64 does reorder is a store with a later load;
that order would matter for EVENT_IDX and for the NO_INTERRUPT hint, so neither is offered or looked at: the driver is
always signalled. cli.py refuses other hosts.

Indices go through a 16-bit view: struct.pack_into moves a byte at a time and the driver could see a torn index.
"""

from __future__ import annotations

from dataclasses import dataclass

from hostdev.errors import ChainError, RequestError, RingError
from hostdev.memory import MemoryTable
from hostdev.wire.virtqueue import (
    AVAILABLE_RING_ALIGNMENT,
    DESCRIPTOR_INDIRECT,
    DESCRIPTOR_NEXT,
    DESCRIPTOR_SIZE,
    DESCRIPTOR_STRUCT,
    DESCRIPTOR_TABLE_ALIGNMENT,
    MAX_QUEUE_SIZE,
    RING_HEADER_SIZE,
    USED_ELEMENT_SIZE,
    USED_ELEMENT_STRUCT,
    USED_RING_ALIGNMENT,
    Descriptor,
    available_ring_bytes,
    descriptor_table_bytes,
    used_ring_bytes,
)

# QEMU's VIRTQUEUE_MAX_SIZE: what its own devices take from one indirect table. Linux's balloon uses 32 entries.
MAX_INDIRECT = 1024
# And the largest ring that QEMU makes. The text allows 32768: a chain of so many takes 100 ms to look at.
MAX_DIRECT = 1024
# virtio 1.3, 2.7.4: a driver MUST NOT create a chain that describes more than 2^32 bytes.
MAX_CHAIN_BYTES = 1 << 32

INDEX_MASK = 0xFFFF
_INDEX_SLOT = 1  # both rings: u16 flags, u16 index, then the ring itself
_RING_SLOT = 2


@dataclass(frozen=True, slots=True)
class RingLayout:
    """What the front end said of one ring: size in descriptors, three front-end addresses."""

    size: int
    descriptor: int
    available: int
    used: int


@dataclass(frozen=True, slots=True)
class Chain:
    """A descriptor chain, copied and checked. head is what is put back."""

    head: int
    descriptors: tuple[Descriptor, ...]


class Virtqueue:
    """The device side of one split ring."""

    def __init__(self, layout: RingLayout, memory: MemoryTable, base: int, *, indirect: bool) -> None:
        """Map the ring. base: the next available index. Raises RequestError if the layout is impossible."""
        _check_layout(layout)
        self.size = layout.size
        self._memory = memory
        self._indirect = indirect
        self._descriptors, available, self._used = _views(
            memory,
            (layout.descriptor, descriptor_table_bytes(layout.size)),
            (layout.available, available_ring_bytes(layout.size)),
            (layout.used, used_ring_bytes(layout.size)),
        )
        self._available = available.cast("H")
        self._used_index = self._used[:RING_HEADER_SIZE].cast("H")
        self.next_available = base & INDEX_MASK
        self._outstanding: set[int] = set()

    @property
    def base(self) -> int:
        """The index that GET_VRING_BASE answers: the first chain that has not been returned.

        Chains are returned in order, and the one held for statistics is offered again, so counting back is enough.
        """
        return (self.next_available - len(self._outstanding)) & INDEX_MASK

    @property
    def ahead(self) -> int:
        """How far the base is ahead of the used index: 0, unless the front end said otherwise."""
        return (self.base - self.used_index) & INDEX_MASK

    def go_on(self, ahead: int) -> None:
        """Stand where another process, which has ended, was in this ring: what it had not returned comes next.

        The used index says how far that was; an earlier one would have what was answered done again.
        """
        self.next_available = (self.used_index + ahead) & INDEX_MASK

    @property
    def used_index(self) -> int:
        """The index that was published last."""
        return self._used_index[_INDEX_SLOT]

    @property
    def outstanding(self) -> int:
        """How many chains were taken and not returned."""
        return len(self._outstanding)

    @property
    def is_empty(self) -> bool:
        """True while the driver has made nothing available that was not taken."""
        return self._available[_INDEX_SLOT] == self.next_available

    def pop(self) -> Chain | None:
        """Take the next available chain, or None.

        Raises RingError if the ring cannot be followed any more, ChainError if this chain cannot be used: it counts as
        popped and is to be put back by its head.
        """
        head = self.take()
        return None if head is None else Chain(head, self._follow(head))

    def take(self) -> int | None:
        """Take the next available chain without looking at it. Returns its head, or None.

        Raises RingError if the ring cannot be followed any more.
        """
        ahead = (self._available[_INDEX_SLOT] - self.next_available) & INDEX_MASK
        if ahead == 0:
            return None
        if ahead > self.size:
            raise RingError(f"available index is {ahead} ahead in a ring of {self.size}")
        head = self._available[_RING_SLOT + self.next_available % self.size]
        if head >= self.size:
            raise RingError(f"head {head} in a ring of {self.size}")
        if head in self._outstanding:
            raise RingError(f"head {head} offered again before it was returned")
        self.next_available = (self.next_available + 1) & INDEX_MASK
        self._outstanding.add(head)
        return head

    def put(self, head: int, length: int = 0) -> None:
        """Return a chain: the used element first, the index that publishes it after. length: bytes written."""
        self._outstanding.discard(head)
        index = self._used_index[_INDEX_SLOT]
        at = RING_HEADER_SIZE + USED_ELEMENT_SIZE * (index % self.size)
        USED_ELEMENT_STRUCT.pack_into(self._used, at, head, length)
        self._used_index[_INDEX_SLOT] = (index + 1) & INDEX_MASK

    def release(self) -> None:
        """Let go of guest memory. The ring cannot be used afterwards."""
        self._used_index.release()
        self._used.release()
        self._available.release()
        self._descriptors.release()

    def _follow(self, head: int) -> tuple[Descriptor, ...]:
        """Follow a chain: any number of descriptors, the last of which may stand for an indirect table (2.7.5.3.2)."""
        chain = self._walk(head, self._descriptors, head, self.size)
        if chain[-1].flags & DESCRIPTOR_INDIRECT:
            chain += self._walk_indirect(head, chain.pop())
        return _checked(head, chain)

    def _walk_indirect(self, head: int, descriptor: Descriptor) -> list[Descriptor]:
        if not self._indirect:
            raise ChainError(head, "indirect-not-negotiated", "an indirect descriptor without the feature")
        count, rest = divmod(descriptor.length, DESCRIPTOR_SIZE)
        if rest or not 0 < count <= MAX_INDIRECT:
            raise ChainError(head, "indirect-length", f"an indirect table of {descriptor.length} bytes")
        table = self._memory.read(descriptor.address, descriptor.length)
        if table is None:
            raise ChainError(head, "indirect-outside", "an indirect table outside guest memory")
        chain = self._walk(head, table, 0, count)
        if chain[-1].flags & DESCRIPTOR_INDIRECT:
            raise ChainError(head, "nested-indirect", "an indirect descriptor inside an indirect table")
        return chain

    @staticmethod
    def _walk(head: int, table: memoryview | bytes, index: int, limit: int) -> list[Descriptor]:
        """Copy the descriptors from index on; the last one alone may be indirect. limit: entries in the table."""
        chain: list[Descriptor] = []
        most = min(limit, MAX_DIRECT)
        for _ in range(most):
            descriptor = Descriptor(*DESCRIPTOR_STRUCT.unpack_from(table, DESCRIPTOR_SIZE * index))
            chain.append(descriptor)
            if not descriptor.flags & DESCRIPTOR_NEXT:
                return chain
            if descriptor.flags & DESCRIPTOR_INDIRECT:
                raise ChainError(head, "indirect-next", "an indirect descriptor with a successor")
            index = descriptor.next
            if index >= limit:
                raise ChainError(head, "next-outside", f"next {index} in a table of {limit}")
        raise ChainError(head, "loop", f"chain does not end within {most} descriptors")


def _check_layout(layout: RingLayout) -> None:
    size = layout.size
    if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
        raise RequestError(f"ring of size {size}: must be a power of two of at most {MAX_QUEUE_SIZE}")
    if (
        layout.descriptor % DESCRIPTOR_TABLE_ALIGNMENT
        or layout.available % AVAILABLE_RING_ALIGNMENT
        or layout.used % USED_RING_ALIGNMENT
    ):
        raise RequestError("a part of the ring is not aligned as virtio demands")


def _views(memory: MemoryTable, *places: tuple[int, int]) -> list[memoryview]:
    """Return a view of each place, an address and a length, or none: one that stayed would keep its region mapped.

    Raises RequestError.
    """
    views: list[memoryview] = []
    try:
        for place in places:
            views.append(memory.view(*place))  # noqa: PERF401  (those that there are, if one of them cannot be)
    except RequestError:
        for view in views:
            view.release()
        raise
    return views


def _checked(head: int, chain: list[Descriptor]) -> tuple[Descriptor, ...]:
    writable = False
    total = 0
    for descriptor in chain:
        if writable and not descriptor.is_writable:
            raise ChainError(head, "readable-after-writable", "a readable descriptor after a writable one")
        writable = descriptor.is_writable
        total += descriptor.length
    if total > MAX_CHAIN_BYTES:
        raise ChainError(head, "too-long", f"a chain of {total} bytes")
    return tuple(chain)
