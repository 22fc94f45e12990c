"""A guest that keeps all five rings busy, each with chains that name pages of an area of its own. Not a test."""

from __future__ import annotations

import struct
from collections.abc import Collection

from hostdev.driver import Buffer
from hostdev.frontend import Frontend
from hostdev.wire.balloon import Role
from tests.in_process import MIB, PAGE

MEMORY = 512 * MIB
LIST = 8 * MIB
AREA = 64 * MIB
# Resident pages at the start of each area, and how many a list or a report names: they lie apart, so each is a call.
FILLED = 64
SCATTERED = 4096


def area(role: int) -> int:
    """Where the pages of a ring's chains begin."""
    return AREA * (role + 1)


def fill(front: Frontend) -> None:
    """Write to the first pages of each area, and the list of each ring that is sent one."""
    for role in Role:
        front.memory.write(area(role), bytes([0xA0 + role]) * (FILLED * PAGE))
        pfns = [area(role) // PAGE + 2 * n for n in range(SCATTERED)]
        front.memory.write(LIST + role * MIB, struct.pack(f"<{SCATTERED}I", *pfns))


def chain(role: int) -> list[Buffer]:
    """What a driver sends on a ring, as large as a chain of 32 buffers can be."""
    if role in (Role.REPORTING, Role.FREE_PAGE_HINT):
        return [Buffer(area(role) + n * 2 * PAGE, PAGE, writable=True) for n in range(32)]
    return [Buffer(LIST + role * MIB, 4 * SCATTERED)]


def refill(front: Frontend, roles: Collection[int] = tuple(Role)) -> None:
    """Offer as many chains as there is room for, and kick."""
    for role in roles:
        ring, buffers = front.rings[role], chain(role)
        ring.take_used()
        while len(ring._free) >= len(buffers):
            ring.add(buffers)
        ring.notify()
