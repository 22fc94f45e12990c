"""A real QEMU without a guest and one of two balloons in it, driven by the same steps: what the qtest cases stand on.

The device under test is either ours, outside QEMU over vhost-user, or QEMU's own virtio-balloon. Both have the same guest
RAM (one shared memfd), offer the same balloon features and so the same five queues. One QEMU serves many cases: renew()
takes the device back to reset and the RAM back to empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from balloonlab.device import PROGRAM, Counters, DeviceProcess
from hostdev.driver import Buffer
from hostdev.wire.balloon import CONFIG, CONFIG_SIZE, PFN_STRUCT, Config, Feature, Role
from qmp_glue.board import PLAIN, Board
from qmp_glue.commandline import Machine, VhostUserBalloon
from qmp_glue.errors import CommandFailedError, VmError
from qmp_glue.find import Qemu
from qmp_glue.monitor import Monitor
from qmp_glue.qtest import Qtest
from qmp_glue.virtio_pci import PciRing, Status, VirtioPciDevice
from qmp_glue.vm import VirtualMachine

Value = TypeVar("Value")

MIB = 1 << 20
PAGE = 4096
# Room for the largest report that Linux makes on x86: 32 entries of 4 MiB.
RAM_BYTES = 256 * MIB
# Above the first MiB, which is not all RAM on a PC.
RINGS_AT, RING_BYTES = 0x100000, 0x40000
RING_SIZE = 128
LIST = 0x300000
FREE = 8 * MIB
PATTERN = 0xAA
# Far above what anything here takes (a few milliseconds), for loaded machines.
WAIT_SECONDS = 30.0
# QEMU's monitor/monitor.c: an event of the same kind is held back so long.
EVENT_SECONDS = 1.0

BALLOON_FEATURES = Feature.STATS_VQ | Feature.FREE_PAGE_HINT | Feature.PAGE_POISON | Feature.REPORTING
FEATURES = BALLOON_FEATURES | Feature.RING_INDIRECT_DESC | Feature.VERSION_1

# QEMU's own, with all that ours offers by default; its hinting wants a thread of its own.
BUILT_IN = (
    *("-object", "iothread,id=hinting"),
    *("-device", "virtio-balloon-pci,id=balloon0,free-page-reporting=on,free-page-hint=on,iothread=hinting"),
)
# Under this path either device has QEMU's properties of a balloon.
QOM_PATH = "/machine/peripheral/balloon0"


class Bench:
    """One QEMU, one balloon, the driver's hands on it. start() before use, close() on every path."""

    def __init__(
        self,
        qemu: Qemu,
        folder: Path,
        *,
        ours: bool,
        ram_bytes: int = RAM_BYTES,
        board: Board = PLAIN,
        plugged: bool = True,
        options: Sequence[str] = (),
        program: Sequence[str] = PROGRAM,
        extra: Sequence[str] = (),
    ) -> None:
        """plugged: whether ours is there from the start, or is plugged later. options, program: of our device. extra: of QEMU."""
        self.ours = ours
        self._extra = tuple(extra)
        self._plugged = plugged
        self._ram_bytes = ram_bytes
        self._board = board
        self._runner = asyncio.Runner()
        self._process: DeviceProcess | None = None
        if ours:
            self._process = DeviceProcess(
                folder, discard="auto", control=True, options=options, program=program
            )
        self._stack = contextlib.AsyncExitStack()
        self._qemu = qemu
        self._qemu_log = folder / "qemu.log"
        self.rings: dict[Role, PciRing] = {}

    def start(self) -> None:
        """Start the device, QEMU and both connections."""
        balloon = self._process.start() if self._process else None
        ours, theirs = socket.socketpair()
        machine = Machine(
            self._ram_bytes,
            accelerator="qtest",
            board=self._board,
            balloon=VhostUserBalloon(balloon.fileno(), plugged=self._plugged) if balloon else None,
            qtest=theirs.fileno(),
            extra=self._extra if self.ours else (*self._extra, *BUILT_IN),
        )
        self.vm = VirtualMachine(self._qemu, machine, log=self._qemu_log)
        self.qtest = Qtest(ours, seconds=WAIT_SECONDS)
        try:
            self._runner.run(self.vm.start())
        except VmError as error:
            if self._process and self._process.returncode is not None:
                raise self._process.error() from error
            raise
        finally:
            theirs.close()
            if balloon:
                balloon.close()
        # -no-reboot would turn system_reset into the end.
        self.qmp("set-action", {"reboot": "reset"})
        with self.vm.ram_file.open("r+b") as ram:
            self._ram = mmap.mmap(ram.fileno(), self._ram_bytes)
        if self._plugged:
            self.device = VirtioPciDevice.find(self.qtest)
        self._balloon_monitor = self.vm.monitor
        if self._process is not None:
            self._connect(self._process)

    def _connect(self, device: DeviceProcess) -> None:
        self._balloon_monitor = self._runner.run(self._stack.enter_async_context(device.control()))

    def reconnect(self) -> None:
        """Leave our device's control socket, with whatever is under way there, and come back."""
        assert self._process is not None
        self._runner.run(self._stack.aclose())
        self._connect(self._process)

    @property
    def is_alive(self) -> bool:
        """Whether QEMU still runs, and our device with it."""
        device_ended = self._process is not None and self._process.returncode is not None
        return self.vm.returncode is None and not device_ended

    def qmp(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute a QMP command."""
        return self._runner.run(self.vm.execute(command, arguments))

    def command(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:  # noqa: ANN401
        """Execute a command where the balloon takes it: QEMU's monitor for its own, the control socket for ours."""
        return self._runner.run(self._balloon_monitor.execute(command, arguments))

    @property
    def monitor(self) -> Monitor:
        """Where the balloon takes its commands, for work()."""
        return self._balloon_monitor

    @property
    def keeper(self) -> int:
        """Process id of our device's keeper."""
        assert self._process is not None
        return self._process.pid

    def work(self, awaitable: Awaitable[Value]) -> Value:
        """Run asynchronous work to its end, beside what begin() has sent."""

        async def outer() -> Value:
            return await awaitable

        return self._runner.run(outer())

    def begin(self, command: str) -> asyncio.Task[Any]:
        """Send a command that takes its time; finish() has its answer."""
        task = self._runner.get_loop().create_task(self._balloon_monitor.execute(command))
        self._runner.run(asyncio.sleep(0))
        return task

    def begin_all(self, command: str, arguments: Sequence[Mapping[str, object]]) -> asyncio.Future[list[Any]]:
        """Send one command after another, each when the one before is answered, while other things go on."""

        async def send() -> list[Any]:
            return [await self._balloon_monitor.execute(command, each) for each in arguments]

        task = self._runner.get_loop().create_task(send())
        self._runner.run(asyncio.sleep(0))
        return task

    def finish(self, task: asyncio.Future[Any]) -> Any:  # noqa: ANN401
        """Wait for the answer of what begin() has sent."""
        return self._runner.run(asyncio.wait_for(task, WAIT_SECONDS))

    def forget(self, task: asyncio.Task[Any]) -> None:
        """Wait for the end of what begin() has sent, whatever it is."""
        self._runner.run(asyncio.wait([task]))

    def refused(self, command: str, arguments: Mapping[str, object]) -> str:
        """Return the words in which a command is refused."""
        try:
            answer = self.command(command, arguments)
        except CommandFailedError as error:
            return f"{error.error_class}: {error.description}"
        raise AssertionError(f"{command} was not refused: {answer}")

    def await_event(self, name: str, data: dict[str, object]) -> None:
        """Wait for an event of the balloon with this data; others, of cases before, are passed over.

        Ours say of which guest they are as well. QEMU tells of the same thing once in EVENT_SECONDS at most.
        """
        self.pass_time(EVENT_SECONDS)
        while True:
            told = self._runner.run(self._balloon_monitor.wait_event(name, seconds=WAIT_SECONDS))["data"]
            if isinstance(told, dict) and data.items() <= told.items():
                return

    def statistics(self) -> dict[str, int]:
        """Return the guest's statistics as the balloon has them."""
        answer = self.command("qom-get", {"path": QOM_PATH, "property": "guest-stats"})
        return dict(answer["stats"])

    def set_interval(self, seconds: object) -> dict[str, object]:
        """The arguments that make the balloon ask for statistics every so often."""
        return {"path": QOM_PATH, "property": "guest-stats-polling-interval", "value": seconds}

    def pass_time(self, seconds: float) -> None:
        """Let time pass for QEMU's balloon, whose clock stands still here; ours goes by the host's."""
        if not self.ours:
            self.qtest.clock_step(int(seconds * 1e9))

    def qemu_log(self) -> str:
        """Return what QEMU wrote so far."""
        return self._qemu_log.read_text()

    def counters(self) -> Counters:
        """Return our device's counters, as they were half a second ago at the latest."""
        assert self._process is not None
        return self._process.counters()

    def device_log(self) -> str:
        """Return what our device wrote so far."""
        assert self._process is not None
        return self._process.log_text()

    def system_reset(self) -> None:
        """Reset the whole machine, and find the device again: it has lost its BARs."""
        self.qmp("system_reset")
        self._runner.run(self.vm.monitor.wait_event("RESET", seconds=WAIT_SECONDS))
        self.device = VirtioPciDevice.find(self.qtest)

    def renew(self) -> None:
        """Take the device back to reset, what is set of it to what it was, the RAM back to empty."""
        self.device.reset()
        self.command("balloon", {"value": self._ram_bytes})
        self.command("qom-set", self.set_interval(0))
        for field in ("actual", "poison_val"):
            self.device.write_config(offset_of(field), 4, 0)
        self.rings.clear()
        self._ram.madvise(mmap.MADV_REMOVE)

    def close(self) -> tuple[int | None, int | None]:
        """End everything. Returns how QEMU and our device ended."""
        try:
            with contextlib.suppress(AttributeError):
                self._ram.close()
            self._runner.run(self._stack.aclose())
            if hasattr(self, "vm"):
                # With more patience than close() has, which then kills: how they end is looked at.
                with contextlib.suppress(VmError):
                    self._runner.run(self.vm.quit(seconds=WAIT_SECONDS))
                self._runner.run(self.vm.close())
                self.qtest.close()
        finally:
            if self._process is not None:
                self._runner.run(self._process.close())
            self._runner.close()
        return self.vm.returncode, self._process.returncode if self._process else None

    # A driver

    def set_up(
        self,
        features: int = FEATURES,
        *,
        size: int = RING_SIZE,
        numbers: Mapping[Role, int] | None = None,
    ) -> None:
        """Do all that a driver does before DRIVER_OK.

        size: of the rings, where the device allows it. numbers: the queue of each role, by default the fixed ones.
        """
        self.device.negotiate(features)
        self.qtest.memset(RINGS_AT, RING_BYTES * len(Role), 0)
        self.qtest.memset(LIST, PAGE, 0)
        for role, number in (numbers or {role: int(role) for role in Role}).items():
            allowed = min(size, self.device.queue_size(number))
            ring = PciRing(self.device, number, allowed, RINGS_AT + number * RING_BYTES)
            self.device.enable_queue(ring)
            self.rings[role] = ring

    def drive(self, features: int = FEATURES, *, size: int = RING_SIZE) -> None:
        """Do all that a driver does, to DRIVER_OK."""
        self.set_up(features, size=size)
        self.device.add_status(Status.DRIVER_OK)

    def fill(self, address: int, length: int) -> None:
        """Make guest memory resident, full of the pattern."""
        self.qtest.memset(address, length, PATTERN)

    def holds(self, address: int, length: int, value: int = PATTERN) -> bool:
        """Whether guest memory is full of the pattern, or of another byte. Does not make it resident."""
        with self.vm.ram_file.open("rb", buffering=0) as ram:
            ram.seek(address)
            return ram.read(length) == bytes([value]) * length

    def footprint(self) -> int:
        """Bytes of guest RAM that the host holds."""
        return self.vm.footprint()

    def given_back(self, action: Callable[[], object]) -> int:
        """By how many bytes the footprint falls while the action runs."""
        before = self.footprint()
        action()
        return before - self.footprint()

    def send(self, role: Role, buffers: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Offer one chain, kick, wait until it is returned. Returns the used length."""
        ring = self.rings[role]
        return ring.wait_used(ring.offer(buffers, indirect=indirect), WAIT_SECONDS)

    def report(self, *entries: tuple[int, int], indirect: bool = False) -> int:
        """Report free pages: pairs of address and length. Returns the used length."""
        buffers = [Buffer(address, length, writable=True) for address, length in entries]
        return self.send(Role.REPORTING, buffers, indirect=indirect)

    def send_pages(self, role: Role, addresses: Sequence[int]) -> int:
        """Inflate or deflate by the pages at these addresses, in one chain of one buffer. Returns the used length."""
        data = b"".join(PFN_STRUCT.pack(address // PAGE) for address in addresses)
        self.qtest.write(LIST, data)
        return self.send(role, [Buffer(LIST, len(data))])

    def config(self) -> Config:
        """Read all of config space, field by field."""
        words = (self.device.read_config(at, 4).to_bytes(4, "little") for at in range(0, CONFIG_SIZE, 4))
        return CONFIG.decode(b"".join(words))

    def wait_for_index(self, ring: PciRing, index: int) -> None:
        """Wait until the device has published this used index."""
        self.wait_until(lambda: ring.used_index == index, f"used index {index} of ring {ring.index}")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Poll a condition. Raises VmError when it does not come true."""
        end = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > end:
                raise VmError(f"{what}: not within {WAIT_SECONDS:g} s")
            time.sleep(0.0002)


def offset_of(field: str) -> int:
    """The offset in config space of one of Config's fields, from its declaration."""
    names = [part.name for part in CONFIG.declaration.subcons]  # type: ignore[attr-defined]
    return 4 * names.index(field)


def balloon_bits(features: int) -> Feature:
    """The bits below 24 of a feature word, which are the device type's own."""
    return Feature(features & 0xFF_FFFF)
