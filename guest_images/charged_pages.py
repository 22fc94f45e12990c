"""Pages of many guests within one host's memory: written for real as long as there is room, counted only beyond.

A block that a guest takes is charged as a whole or not at all. What is charged goes through MappedPages, with all of its
checks; what is not leaves the guest's memory untouched, so that those checks stay exact. The account has both, and is
what a host with enough memory would hold. Used by balloonlab's fleets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guest_images.free_lists import PAGE_SIZE, Block
from guest_images.guest_pages import AccountedPages, MappedPages, PageCheckError
from guest_images.modelled_guest import RING_BYTES


@dataclass(slots=True)
class MemoryLimit:
    """What all guests together may hold for real, and what they hold, in bytes."""

    limit_bytes: int
    held_bytes: int = 0

    def has_room(self, size: int) -> bool:
        """Tell whether so many bytes more can be charged."""
        return self.held_bytes + size <= self.limit_bytes


class ChargedPages(AccountedPages):
    """One guest's pages: an account of all, real ones as far as the limit goes."""

    def __init__(self, mapped: MappedPages, limit: MemoryLimit, name: str) -> None:
        """name: of the guest, for what is said about it."""
        super().__init__(mapped.memory_bytes)
        self._mapped = mapped
        self._limit = limit
        self._name = name
        # First pages of the blocks in use that were not charged.
        self._uncharged: set[int] = set()
        self.uncharged_bytes = 0

    @property
    def resident_bytes(self) -> int:
        """Bytes that the host holds in the guest's memory, rings included: measured."""
        return self._mapped.footprint_bytes

    def take(self, block: Block) -> None:
        """Check and write a block if there is room, else only count it. Raises PageCheckError."""
        super().take(block)
        size = block.pages * PAGE_SIZE
        if not self._limit.has_room(size):
            self._uncharged.add(block.pfn)
            self.uncharged_bytes += size
            return
        before = self._mapped.accounted_bytes
        with _named(self._name):
            self._mapped.take(block)
        self._limit.held_bytes += self._mapped.accounted_bytes - before

    def give_up(self, block: Block) -> None:
        """Check a block that was charged. Raises PageCheckError."""
        if block.pfn in self._uncharged:
            self._uncharged.remove(block.pfn)
            return
        with _named(self._name):
            self._mapped.give_up(block)

    def report(self, blocks: Sequence[Block]) -> None:
        """Report blocks to the device, charged or not. Raises FrontendError if no answer comes."""
        before = self._mapped.accounted_bytes
        self._mapped.report(blocks)
        self._limit.held_bytes += self._mapped.accounted_bytes - before
        super().report(blocks)

    def verify(self) -> None:
        """Check all charged pages, and that the host holds these and no others. Raises PageCheckError."""
        with _named(self._name):
            self._mapped.verify()
        excess = self.resident_bytes - self._mapped.accounted_bytes
        if not 0 <= excess <= RING_BYTES:
            raise PageCheckError(
                f"{self._name}: the host holds {self.resident_bytes} bytes where {self._mapped.accounted_bytes} are in use "
                "or not reported yet: the device must free what a report names, all of it and at once"
            )

    def close(self) -> None:
        """Unmap the memory; it is no longer held."""
        self._limit.held_bytes -= self._mapped.accounted_bytes
        self._mapped.close()


class _named:  # noqa: N801  (reads as a statement)
    """Put the guest's name before what a failed page check says."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, PageCheckError):
            raise PageCheckError(f"{self._name}: {error}") from error
