"""How large a guest shall be, and what that is in pages of balloon.

As with QEMU's balloon command a size is the *logical size* of the VM: its memory less the balloon. Pure. Used by
balloon.py and commands.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from hostdev.wire.balloon import PFN_SHIFT

# num_pages is 32 bits wide (virtio 1.3, 5.5.4): a balloon of 16 TiB.
MAX_PAGES = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Target:
    """A logical size that was asked for: in bytes, or in percent of the guest's memory."""

    size: int | None = None
    percent: int | None = None

    def bytes_of(self, memory: int) -> int:
        """Return the size in bytes for a guest with so much memory, never more than that."""
        if self.size is not None:
            return min(self.size, memory)
        return memory * min(self.percent or 0, 100) // 100


def balloon_pages(memory: int, size: int) -> int:
    """Return the pages of 4096 bytes whose balloon leaves a guest of so much memory this logical size, or a page more.

    size: bytes, at most memory.
    """
    return min((memory - size) >> PFN_SHIFT, MAX_PAGES)


def logical_size(memory: int, pages: int) -> int:
    """Return the logical size in bytes of a guest whose balloon says to hold so many pages: it may say anything."""
    return max(0, memory - (pages << PFN_SHIFT))
