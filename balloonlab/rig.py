"""One guest with its balloon: device, QEMU and agent together, started in order and ended on every path.

No experiment of its own: demo.py and the guest tests drive it.

    async with Rig(setup, folder) as rig:
        await rig.boot()
        await rig.agent.meminfo()
        rig.vm.footprint()
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from balloonlab.device import PROGRAM, DeviceProcess
from balloonlab.errors import DeviceError, GuestEndedError, GuestHungError, GuestSetupError, UsageError
from balloonlab.printable import printable
from guest_images.agent_client import AgentClient, Hello
from guest_images.build import GuestImage
from guest_images.errors import AgentError, AgentTimeoutError
from guest_images.initramfs import AGENT_WANTED, kernel_command_line
from qmp_glue.board import PLAIN, Board
from qmp_glue.commandline import BuiltInBalloon, Machine, VhostUserBalloon, arguments
from qmp_glue.errors import DeadlineError, QemuExitedError, VmError
from qmp_glue.find import Qemu
from qmp_glue.inspect import inspect_arguments
from qmp_glue.vm import VirtualMachine

# Seconds from QEMU's start to the agent's greeting: 4 to 8 s under TCG here, and CI machines share their cores.
BOOT_SECONDS = 120.0
# Seconds from the agent's last word to the reset: init forks reboot, which syncs nothing.
RESET_SECONDS = 30.0
# Seconds that a QEMU whose guest says nothing is given to end by itself: it may have been about to.
END_SECONDS = 3.0
# Seconds from QEMU's closing of the agent's port to its end, which gives back all of guest RAM.
GONE_SECONDS = 30.0
# Seconds from the request to QEMU's end: init syncs nothing, and a second is enough on an idle machine.
POWER_OFF_SECONDS = 60.0
# A panic's reason and the trace that tells where, or what a guest that hangs said last.
CONSOLE_LINES = 8
CONSOLE_CHARACTERS = 200
# The trace of a panic is 5 KiB; what a guest floods its console with is not read.
CONSOLE_BYTES = 64 << 10


@dataclass(frozen=True)
class Setup:
    """What to boot, and with which balloon. balloon: ours, QEMU's own, or none.

    plugged: False for our balloon to come later, by qmp_glue.hotplug; the device runs from the start.
    program: what Python runs as our device.
    """

    qemu: Qemu
    image: GuestImage
    memory_bytes: int
    board: Board = PLAIN
    accelerator: Literal["kvm", "tcg"] = "tcg"
    cpus: int = 1
    balloon: Literal["vhost-user", "built-in", "none"] = "vhost-user"
    plugged: bool = True
    discard: str = "auto"
    features: str = ""
    trace: bool = False
    control: bool = False
    append: tuple[str, ...] = ()
    extra: tuple[str, ...] = field(default=())
    program: tuple[str, ...] = PROGRAM


class Rig:
    """A guest with its balloon. ``vm`` runs once the context is entered, ``agent`` answers after boot().

    ``control`` is the device's control socket, where the setup asks for one.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        """folder: where console, QEMU's and the device's logs go."""
        self.setup = setup
        self.device = DeviceProcess(
            folder,
            discard=setup.discard,
            features=setup.features,
            trace=setup.trace,
            control=setup.control,
            program=setup.program,
        )
        self.console = folder / "console.log"
        self._qemu_log = folder / "qemu.log"
        self._stack = contextlib.AsyncExitStack()
        self.hello: Hello | None = None

    async def __aenter__(self) -> Rig:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        """Device first, then QEMU, then the agent; ended the other way round, for QEMU must not lose its device."""
        host_end, guest_end = socket.socketpair()
        self._stack.callback(host_end.close)
        with guest_end:
            balloon = self._balloon()
            self.machine = self._machine(balloon, guest_end.fileno())
            for finding in inspect_arguments([*self.setup.qemu.argv, *arguments(self.machine)]):
                if finding.severity == "error":
                    raise UsageError(finding.message)
            self.vm = await self._start_qemu(balloon)
        if balloon is not None and self.setup.control:
            self.control = await self._stack.enter_async_context(self.device.control())
        self.agent = AgentClient(host_end)
        self._stack.push_async_callback(self.agent.close)

    async def boot(self, *, deadline: float = BOOT_SECONDS) -> Hello:
        """Wait for the agent's greeting. Raises what explains it if device, QEMU or guest end before, or hang."""
        self.hello = await self._greeting(deadline)
        return self.hello

    def _balloon(self) -> socket.socket | None:
        if self.setup.balloon != "vhost-user":
            return None
        connection = self.device.start()
        self._stack.push_async_callback(self.device.close)
        self._stack.callback(connection.close)
        return connection

    def _machine(self, balloon: socket.socket | None, agent: int) -> Machine:
        device: VhostUserBalloon | BuiltInBalloon | None = None
        if balloon is not None:
            device = VhostUserBalloon(balloon.fileno(), plugged=self.setup.plugged)
        elif self.setup.balloon == "built-in":
            device = BuiltInBalloon()
        return Machine(
            memory_bytes=self.setup.memory_bytes,
            board=self.setup.board,
            cpus=self.setup.cpus,
            accelerator=self.setup.accelerator,
            kernel=self.setup.image.kernel,
            initrd=self.setup.image.initrd,
            append=kernel_command_line(AGENT_WANTED, *self._reset_words(), *self.setup.append),
            balloon=device,
            console=self.console,
            agent=agent,
            extra=self.setup.extra,
        )

    def _reset_words(self) -> tuple[str, ...]:
        """Where a reset is a reboot, a panic must not be one: it would look like a guest that is well."""
        return ("panic=0",) if self.setup.board.reboots else ()

    async def _start_qemu(self, balloon: socket.socket | None) -> VirtualMachine:
        vm = VirtualMachine(self.setup.qemu, self.machine, log=self._qemu_log)
        self._stack.push_async_callback(vm.close)
        try:
            await vm.start()
        except VmError as error:
            if balloon is not None:
                balloon.close()
                await self.device.close()
                if self.device.returncode:
                    raise self.device.error() from error
            raise
        if balloon is not None:
            balloon.close()
        return vm

    async def _greeting(self, deadline: float) -> Hello:
        try:
            return await self.agent.hello(deadline=deadline)
        except AgentError as error:
            if (why := await self.why_ended()) is not None:
                raise why from error
            if isinstance(error, AgentTimeoutError):
                raise GuestHungError(f"{error}; {self.console_tail()}") from error
            raise

    def console_tail(self) -> str:
        """Return the last lines of the guest's console, or a panic's first, as the end of a message."""
        text = self.vm.console_text(CONSOLE_BYTES)
        panic = text.find("Kernel panic")
        lines = text.splitlines()[-CONSOLE_LINES:] if panic < 0 else text[panic:].splitlines()[:CONSOLE_LINES]
        shown = [printable(line, CONSOLE_CHARACTERS) for line in lines] or ["(nothing)"]
        return "\n  ".join(["put right what its console names:", *shown])

    async def check(self) -> None:
        """Raise what explains it if the device, QEMU or the guest has ended."""
        if self.vm.returncode is not None or self.device.returncode is not None:
            why = await self.why_ended()
            assert why is not None
            raise why

    async def why_ended(self) -> DeviceError | GuestEndedError | QemuExitedError | None:
        """Return what explains that something does not answer any more; None if all three are alive.

        The device ends with QEMU and QEMU with its guest, a moment later: who failed first is told from the statuses.
        """
        if self._device_failed():
            return self.device.error()
        with contextlib.suppress(DeadlineError):
            await self.vm.wait(seconds=GONE_SECONDS if self.agent.is_gone else END_SECONDS)
        # A device that is killed closes its connection, which ends QEMU, before it can be waited for.
        if self._device_failed():
            return self.device.error()
        if self.vm.returncode == 0:
            return GuestEndedError(
                f"the guest panicked or powered off before its time; {self.console_tail()}"
            )
        if self.vm.returncode is not None:
            return QemuExitedError(self.vm.returncode, self.vm.last_lines())
        return self.device.error() if self.device.returncode is not None else None

    def _device_failed(self) -> bool:
        return bool(self.device.returncode)

    async def reboot(self) -> Hello:
        """Have the guest reset the machine, and wait for its new agent. Raises UsageError, and as boot() does."""
        if not self.setup.board.reboots:
            raise UsageError("this machine ends where it would reboot: give it a Board(reboots=True)")
        # What is asked before the reset may still reach the old agent, which does not answer any more.
        with self.vm.monitor.listen("RESET") as reset:
            await self.agent.reboot()
            try:
                await asyncio.wait_for(reset.get(), RESET_SECONDS)
            except TimeoutError as error:
                raise GuestSetupError(
                    f"the guest has not reset the machine in {RESET_SECONDS:g} s; {self.console_tail()}"
                ) from error
        return await self.boot()

    async def power_off(self, *, seconds: float = POWER_OFF_SECONDS) -> None:
        """Have the guest power off and wait for QEMU's end. Raises VmError if it does not."""
        with contextlib.suppress(VmError):
            await self.agent.poweroff()
        await self.vm.wait(seconds=seconds)
