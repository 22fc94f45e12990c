"""A booted guest that several tests share: asyncio underneath, plain functions on top.

One boot a suite and walk: booting costs 6 s under TCG, a report pass 2 s, so tests of one guest run in one boot.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import TypeVar

from balloonlab.rig import Rig, Setup
from guest_images.build import build_guest
from qmp_glue.find import accelerator, find_qemu

Value = TypeVar("Value")

MEMORY = 1 << 30
MIB = 1 << 20


def setup_for(
    suite: str, *, memory: int = MEMORY, discard: str = "auto", features: str = "", append: str = ""
) -> Setup:
    """Describe a guest of a suite; what it needs was fetched by tests.guest.prepare."""
    return Setup(
        qemu=find_qemu(),
        image=build_guest(suite),
        memory_bytes=memory,
        accelerator=accelerator(),
        discard=discard,
        features=features,
        append=tuple(append.split()),
    )


class Booted:
    """A rig that runs on an event loop of its own, driven from synchronous tests."""

    def __init__(self, rig: Rig, runner: asyncio.Runner, folder: Path) -> None:
        self.rig = rig
        self.folder = folder
        self._runner = runner

    def wait(self, work: Awaitable[Value]) -> Value:
        """Run one piece of asynchronous work to its end."""

        async def outer() -> Value:
            return await work

        return self._runner.run(outer())


@contextlib.contextmanager
def booted(setup: Setup, folder: Path) -> Iterator[Booted]:
    """Boot a guest for the time of the context; whatever happens in it, nothing is left running."""
    with asyncio.Runner() as runner:
        rig = Rig(setup, folder)

        async def start() -> None:
            await rig.__aenter__()
            try:
                await rig.boot()
            except BaseException:
                await rig.__aexit__(None, None, None)
                raise

        runner.run(start())
        try:
            yield Booted(rig, runner, folder)
        finally:
            runner.run(rig.__aexit__(None, None, None))
