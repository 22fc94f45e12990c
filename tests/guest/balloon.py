"""What the tests of the balloon's features share: waiting for a guest to reach a size, and the cells of their table."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guest_images.agent import Pattern
from tests.guest.guests import MIB, Booted

Record = Callable[[str, object], None]

# A guest inflates 300 MiB a second under TCG here; CI machines share their cores.
REACH_SECONDS = 90.0
LOOK_SECONDS = 0.05
# The largest block that the page allocator has on x86 (MAX_PAGE_ORDER 10), which is what is hinted.
LARGEST_BLOCK = 4 * MIB
# What a guest may use or give up by itself between two looks: page cache, per-CPU lists, slab.
NOISE = 24 * MIB


def cell(record_property: Record, guest: Booted, feature: str, seen: str) -> None:
    """Record one cell of the table of features in docs/results/."""
    record_property("feature", feature)
    record_property("suite", guest.rig.setup.image.suite)
    record_property("seen", seen)


def command(guest: Booted, name: str, arguments: dict[str, object] | None = None) -> Any:  # noqa: ANN401
    """Execute a command of the device's control socket."""
    return guest.wait(guest.rig.control.execute(name, arguments))


def status(guest: Booted) -> dict[str, Any]:
    """Return the device's status."""
    answer = command(guest, "query-status")
    assert isinstance(answer, dict)
    return answer


def wait_until(
    guest: Booted, condition: Callable[[], bool], what: str, seconds: float = REACH_SECONDS
) -> float:
    """Poll a condition. Returns the seconds that it took. Raises TimeoutError."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"{what}: not within {seconds:g} s; the device says {status(guest)}")
        guest.wait(asyncio.sleep(LOOK_SECONDS))
    return time.monotonic() - began


@contextmanager
def paused(guest: Booted) -> Iterator[None]:
    """Pause the guest, and with it its device's rings: what is looked at in the context is of one moment."""
    guest.wait(guest.rig.vm.stop())
    try:
        yield
    finally:
        guest.wait(guest.rig.vm.cont())


def has_arrived(guest: Booted) -> bool:
    """Whether the guest's driver says that it has the size that it was asked for."""
    now = status(guest)
    return bool(now["running"] and now.get("actual") == now["target"])


def reach(guest: Booted, size: int) -> float:
    """Ask for a size and wait until the guest has it. Returns the seconds that it took."""
    command(guest, "balloon", {"value": size})
    return wait_until(guest, lambda: has_arrived(guest), f"the guest does not come to {size // MIB} MiB")


def memory_of(guest: Booted, *names: str) -> list[int]:
    """Return lines of the guest's /proc/meminfo, in bytes."""
    lines = guest.wait(guest.rig.agent.meminfo())
    return [lines[name] for name in names]


def large_blocks(guest: Booted) -> int:
    """Return the bytes that the guest has free in blocks of the largest order."""
    return sum(counts[-1] for counts in guest.wait(guest.rig.agent.buddyinfo()).values()) * LARGEST_BLOCK


def pattern_places(ram: Path, seed: int) -> set[int]:
    """Return the offsets of a piece of a fill's pattern in guest RAM: one a MiB of the fill. Makes nothing resident."""
    needle = bytes(Pattern(seed).twice[:48])
    found: set[int] = set()
    with ram.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        position = 0
        while position < size:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole from here on
                break
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.update(_find(file.fileno(), start, position, needle))
    return found


def _find(descriptor: int, start: int, end: int, needle: bytes) -> Iterator[int]:
    """Find a needle in a range that may be large, piece by piece; pieces overlap by less than a needle."""
    step = 16 * MIB
    for at in range(start, end, step):
        piece = os.pread(descriptor, min(step + len(needle) - 1, end - at), at)
        found = piece.find(needle)
        while found >= 0:
            yield at + found
            found = piece.find(needle, found + len(needle))
