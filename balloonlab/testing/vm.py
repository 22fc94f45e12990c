"""A booted guest as a test uses it: plain calls, each with a deadline, and an end that leaves nothing behind.

rig.py underneath does the work and this adds nothing to it but the waiting. The fixtures balloon_vm and
balloon_vm_factory hand it out.

    held = balloon_vm.fill("200M")
    balloon_vm.free(held)
    balloon_vm.wait_for(lambda: balloon_vm.footprint() < floor + (32 << 20), 45)
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from balloonlab.device import Counters
from balloonlab.errors import UsageError
from balloonlab.measure.guest_setup import check_knobs
from balloonlab.measure.scenario import GuestSpec
from balloonlab.rig import Rig, Setup
from balloonlab.sampler import GUEST_SECONDS, Sampler
from balloonlab.sizes import human, parse_size
from balloonlab.testing.logs import HasLogs
from balloonlab.testing.loop_thread import LoopThread
from balloonlab.timeline import SETTLE_QUIETS, SETTLE_SECONDS, has_settled, quiet_seconds
from guest_images.agent_client import FILL_DEADLINE_S, RUN_DEADLINE_S, Checked, Filled, FillKind, Ran
from guest_images.errors import AgentError, AgentRefusedError
from qmp_glue.errors import CommandDeniedError, CommandFailedError, VmError

Value = TypeVar("Value")

# The footprint is one stat; what a condition asks of the guest costs it some milliseconds.
POLL_SECONDS = 0.1


class BalloonVm(HasLogs):
    """A guest with its balloon. ``rig`` is underneath; boot() first, close() last.

    Every call raises what explains it if device, QEMU or guest have ended: DeviceError, QemuExitedError, GuestEndedError.
    """

    def __init__(self, setup: Setup, folder: Path, spec: GuestSpec | None = None) -> None:
        """folder: where console, QEMU's and the device's logs go. spec: the kernel's parameters that it must have taken."""
        self.folder = folder
        self._spec = spec or GuestSpec()
        self._quiet = quiet_seconds(self._spec.page_reporting_delay_ms)
        self.rig = Rig(setup, folder)
        self.boot_seconds = 0.0
        self._loop = LoopThread()

    def boot(self) -> None:
        """Start everything and wait for the guest's agent. Raises LabError, AgentError or VmError."""
        start = time.monotonic()
        self._loop.run(self._boot())
        self.boot_seconds = time.monotonic() - start

    async def _boot(self) -> None:
        await self.rig.__aenter__()
        await self.rig.boot()
        await check_knobs(self.rig.agent, self._spec)

    def close(self) -> None:
        """End everything that was started, whatever state it is in."""
        try:
            self._loop.run(self.rig.__aexit__(None, None, None))
        finally:
            self._loop.close()

    def _ask(self, work: Coroutine[Any, Any, Value]) -> Value:
        __tracebackhide__ = True
        return self._loop.run(self._explained(work))

    async def _explained(self, work: Coroutine[Any, Any, Value]) -> Value:
        """Whoever noticed first: what has ended explains it better."""
        try:
            return await work
        except (AgentRefusedError, CommandDeniedError, CommandFailedError):
            raise
        except (AgentError, VmError) as error:
            if (why := await self.rig.why_ended()) is not None:
                raise why from error
            raise

    # The guest

    @property
    def kernel(self) -> str:
        """The release of the guest's kernel."""
        assert self.rig.hello is not None
        return self.rig.hello.kernel

    def run(self, command: str, *, seconds: float = RUN_DEADLINE_S) -> Ran:
        """Run a shell line in the guest: its status, stdout and stderr."""
        return self._ask(self.rig.agent.run(command, deadline=seconds))

    def fill(
        self,
        size: int | str,
        *,
        kind: FillKind = "anonymous",
        seed: int = 0,
        seconds: float = FILL_DEADLINE_S,
    ) -> Filled:
        """Have the guest hold so much memory ("200M", or bytes) with known contents. Raises AgentRefusedError."""
        wanted = parse_size(size) if isinstance(size, str) else size
        return self._ask(self.rig.agent.fill(kind, wanted, seed=seed, deadline=seconds))

    def checksum(self, held: Filled) -> Checked:
        """Compare every byte that a fill holds with what it wrote: mismatched_pages is 0 where all is well."""
        return self._ask(self.rig.agent.checksum(held.handle))

    def free(self, held: Filled) -> None:
        """Give a fill's memory back to the guest's page allocator; the guest reports it within some seconds."""
        self._ask(self.rig.agent.free(held.handle))

    def drop_caches(self) -> None:
        """Have the guest drop its page cache, dentries and inodes."""
        self._ask(self.rig.agent.drop_caches())

    def meminfo(self) -> dict[str, int]:
        """Return the guest's /proc/meminfo, in bytes."""
        return self._ask(self.rig.agent.meminfo())

    def console_text(self) -> str:
        """Return what the guest wrote on its serial console so far."""
        return self.rig.vm.console_text()

    # The host

    def footprint(self) -> int:
        """Return the bytes of guest memory that the host holds, in memory or swap."""
        return self._ask(self._footprint())

    async def _footprint(self) -> int:
        return self.rig.vm.footprint()

    def counters(self) -> Counters:
        """Return the device's counters, half a second old at most; all are 0 where the balloon is not ours."""
        return self.rig.device.counters()

    @property
    def released_bytes(self) -> int:
        """What our device has given back so far, the same page as often as it was."""
        return self.counters().released_bytes

    def log_text(self) -> str:
        """Return what the device wrote so far; nothing where the balloon is not ours."""
        return self.rig.device.log_text() if self.rig.setup.balloon == "vhost-user" else ""

    def qmp(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute a QMP command and return its answer. Raises CommandFailedError."""
        return self._ask(self.rig.vm.execute(command, arguments))

    # Waiting

    def wait_for(self, condition: Callable[[], object], seconds: float) -> float:
        """Poll until a condition holds. Returns the seconds that it took. Raises TimeoutError."""
        __tracebackhide__ = True
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > seconds:
                raise TimeoutError(f"what was waited for has not come in {seconds:g} s; {self._state()}")
            self._ask(self.rig.check())
            time.sleep(POLL_SECONDS)
        return time.monotonic() - start

    def settle(self, seconds: float | None = None) -> int:
        """Wait until the guest has reported what it has to report. Returns the footprint then. Raises TimeoutError.

        seconds: SETTLE_SECONDS, or longer where the guest has a long page_reporting_delay_ms. Raises UsageError for so few
        that nobody could tell.
        """
        __tracebackhide__ = True
        deadline = max(SETTLE_SECONDS, SETTLE_QUIETS * self._quiet) if seconds is None else seconds
        if deadline < self._quiet:
            raise UsageError(
                f"settle({deadline:g}): this guest has settled when {self._quiet:g} s went by without a report: give it more"
            )
        if not self._ask(self._settled(deadline)):
            raise TimeoutError(f"the guest has not settled in {deadline:g} s; {self._state()}")
        return self.footprint()

    async def _settled(self, seconds: float) -> bool:
        sampler = Sampler(self.rig, start=time.monotonic())
        while not has_settled(sampler.samples, since=0.0, quiet=self._quiet):
            if sampler.now() > seconds:
                return False
            await self.rig.check()
            await sampler.look()
            await asyncio.sleep(GUEST_SECONDS / 2)
        return True

    def _state(self) -> str:
        held, released = human(self.footprint()), human(self.released_bytes)
        return f"the host holds {held}, the device has given back {released}"

    def numbers(self) -> dict[str, str | int | float]:
        """Return what is worth keeping of a guest: which it was, what it cost. Asks the guest nothing."""
        counters, footprint = self.counters(), {}
        with contextlib.suppress(VmError):  # QEMU may have ended, which a test may want
            footprint = {"footprint_bytes": self.rig.vm.footprint()}
        return {
            "kernel": self.kernel,
            "qemu": self.rig.setup.qemu.version,
            "accelerator": self.rig.setup.accelerator,
            "memory_bytes": self.rig.setup.memory_bytes,
            "boot_seconds": round(self.boot_seconds, 3),
            "released_bytes": counters.released_bytes,
            "reports": counters.reports,
            **footprint,
        }
