"""Looks at guest RAM while a run goes on: what the host holds of it, beside the event loop, at a bounded share of the time.

It only looks. meter.py and verify.py look for what each wants to know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from balloonlab.measure.ranges import in_file
from hostdev.pages import Span
from qmp_glue import ram
from qmp_glue.errors import VmError

# A look costs 4 ms for 512 MiB and 50 for 8 GiB, and more for a guest in pieces: no more of the time than this is spent.
LOOK_SHARE = 0.05

Value = TypeVar("Value")


def held_places(files: Iterable[Path]) -> list[Span]:
    """Return what the host holds of the files of guest RAM, as places. Raises OSError where QEMU has ended."""
    return [span for number, path in enumerate(files) for span in in_file(number, ram.held(path))]


def pause(seconds: float, least: float) -> float:
    """Return how long to wait after a look that took so long: least, or what keeps looks within their share."""
    return max(least, seconds / LOOK_SHARE)


async def in_thread(look: Callable[[], Value]) -> Value:
    """Take a look beside the event loop. Raises VmError where QEMU has ended, and whatever else the look raises."""
    work = asyncio.ensure_future(asyncio.to_thread(look))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        # A thread is not cancelled: it must be through before anybody reads what it writes.
        await asyncio.wait([work])
        work.exception()
        raise
    except OSError as error:
        raise VmError(f"guest RAM cannot be looked at ({error.strerror}): has QEMU ended?") from error
