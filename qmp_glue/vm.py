"""One running QEMU: started, driven over QMP, measured, and ended on every path.

It makes no decisions about machines (commandline.py) and finds no binaries (find.py). QMP runs over an inherited socket,
so no path has to be chosen or removed. QEMU never outlives this process: the kernel kills it when the thread that
started it ends, even by SIGKILL. Experiments and tests use it:

    async with VirtualMachine(find_qemu(), Machine(memory_bytes=256 << 20)) as vm:
        await vm.query_status()
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qmp_glue import ram
from qmp_glue.commandline import Machine, arguments, inherited_fds, memory_sizes
from qmp_glue.errors import DeadlineError, MonitorClosedError, QemuExitedError, VmError
from qmp_glue.monitor import EXECUTE_SECONDS, Monitor
from qmp_glue.parent import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import IO, Self

    from qmp_glue.find import Qemu

__all__ = ["VirtualMachine"]

START_SECONDS = (
    30.0  # 0.1 s when idle; realizing the device waits for its backend, which may start at the same time.
)
QUIT_SECONDS = 5.0  # QEMU answers quit at once unless its main loop is blocked.
TERMINATE_SECONDS = 3.0  # SIGTERM asks the same of the same main loop.
KILL_SECONDS = 10.0  # The kernel has to give back all of guest RAM.
EOF_SECONDS = 30.0  # From a closed monitor to the end of its process, which gives back all of guest RAM.
LAST_LINES = 15
LAST_BYTES = 8192


class VirtualMachine:
    """A QEMU process and its monitor. ``async with`` starts it and ends it; start() and close() do so by hand.

    Descriptors in ``machine`` stay the caller's: close them after start(), or the other end never sees an end of file.
    What QEMU writes goes to ``log``, or to a nameless file. Keep the thread that calls start() alive.
    """

    def __init__(self, qemu: Qemu, machine: Machine, *, log: Path | None = None) -> None:
        if machine.qmp is not None:
            raise VmError("machine.qmp is taken: VirtualMachine brings its own connection; leave it None")
        self.qemu = qemu
        self.machine = machine
        self.monitor = Monitor()
        self._log_path = log
        self._log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._exited = asyncio.Event()
        self._ram_files: list[Path] = []
        self._last_lines: list[str] = []

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self, *, seconds: float = START_SECONDS) -> None:
        """Start QEMU and negotiate QMP. Raises QemuExitedError, DeadlineError; then nothing of it is left."""
        if self._process is not None:
            raise VmError("this machine has been started before: make another VirtualMachine")
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._spawn(theirs.fileno())
            await self.monitor.connect(ours, seconds=seconds)
        except BaseException as error:
            ours.close()
            exited = await self._explained(error)
            await self.close()
            if exited is not None:
                raise exited from error
            raise

    def _spawn(self, qmp: int) -> None:
        machine = replace(self.machine, qmp=qmp)
        # Closed by close(), which outlives this block.
        self._log = self._log_path.open("w+b") if self._log_path else tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [*self.qemu.argv, *arguments(machine)],
                env=os.environ | dict(self.qemu.env),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=inherited_fds(machine),
                preexec_fn=die_with_parent(),  # noqa: PLW1509
                process_group=0,  # Ctrl-C is for us: QEMU is then ended in order
            )
        except OSError as error:
            raise VmError(
                f"{self.qemu.argv[0]} does not start ({error.strerror}): name another QEMU"
            ) from error
        self._pidfd = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_exit)

    def _on_exit(self) -> None:
        """Reap: a pidfd is readable once its process has ended."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        if self._process is not None:
            self._process.wait()
        self._exited.set()

    @property
    def pid(self) -> int:
        """The process's id, also after its end. Raises VmError before start()."""
        return self._started().pid

    @property
    def returncode(self) -> int | None:
        """How QEMU ended (negative: by which signal); None while it runs or was never started."""
        return self._process.poll() if self._process is not None else None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise VmError("QEMU has not been started: await start(), or use 'async with'")
        return self._process

    def last_lines(self) -> list[str]:
        """Return the last lines that QEMU wrote on standard output and error."""
        if self._log is None or self._log.closed:
            return self._last_lines
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), LAST_BYTES, max(0, size - LAST_BYTES))
        return tail.decode(errors="replace").splitlines()[-LAST_LINES:]

    def console_text(self, last_bytes: int | None = None) -> str:
        """Return what the guest wrote on its serial console so far; empty where the machine has none.

        last_bytes: no more than these of it: a guest may write without end.
        """
        console = self.machine.console
        if console is None or not console.exists():
            return ""
        with console.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
            return file.read(last_bytes).decode(errors="replace")

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, seconds: float = EXECUTE_SECONDS
    ) -> object:
        """Execute as Monitor.execute() does, but raise QemuExitedError where the reason is that QEMU has ended."""
        self._started()
        try:
            return await self.monitor.execute(command, arguments, seconds=seconds)
        except MonitorClosedError as error:
            exited = await self._explained(error, min(EOF_SECONDS, seconds))
            if exited is not None:
                raise exited from error
            raise

    async def _explained(self, error: BaseException, seconds: float = EOF_SECONDS) -> QemuExitedError | None:
        """Return the end of QEMU if that is what closed the monitor: its status comes a moment after the end of file."""
        if not isinstance(error, MonitorClosedError) or self._process is None:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._exited.wait()
        status = self.returncode
        return QemuExitedError(status, self.last_lines()) if status is not None else None

    async def query_status(self) -> str:
        """Return QEMU's run state, such as "running", "paused" or "prelaunch"."""
        answer = await self.execute("query-status")
        return str(answer["status"]) if isinstance(answer, dict) else ""

    async def stop(self) -> None:
        """Pause all of the guest's CPUs."""
        await self.execute("stop")

    async def cont(self) -> None:
        """Let the guest's CPUs run (on)."""
        await self.execute("cont")

    async def system_powerdown(self) -> None:
        """Press the guest's power button: it may take its time, or ignore it."""
        await self.execute("system_powerdown")

    async def quit(self, *, seconds: float = QUIT_SECONDS) -> int:
        """End QEMU in order and return its status. Raises DeadlineError."""
        with contextlib.suppress(MonitorClosedError, QemuExitedError):
            await self.execute("quit", seconds=seconds)
        return await self.wait(seconds=seconds)

    async def wait(self, *, seconds: float) -> int:
        """Wait for QEMU to end by itself and return its status. Raises DeadlineError."""
        process = self._started()
        try:
            async with asyncio.timeout(seconds):
                await self._exited.wait()
        except TimeoutError as error:
            raise DeadlineError(
                f"QEMU (pid {process.pid}) has not ended in {seconds:g} s: quit() or close() it"
            ) from error
        return process.wait()

    async def close(self) -> None:
        """End QEMU: by QMP, then SIGTERM, then SIGKILL, each with a deadline. Always reaped; safe to call twice."""
        try:
            if self._process is not None and self._process.returncode is None:
                await self._end()
            await self.monitor.close()
        finally:
            self._reap()

    async def _end(self) -> None:
        if self.monitor.is_open:
            with contextlib.suppress(VmError):
                await self.quit(seconds=QUIT_SECONDS)
                return
        self._started().terminate()
        with contextlib.suppress(DeadlineError):
            await self.wait(seconds=TERMINATE_SECONDS)

    def _reap(self) -> None:
        """Leave no process and no descriptor, also when close() was cancelled. Blocks only while the kernel cleans up."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(timeout=KILL_SECONDS)
        self._exited.set()
        self._last_lines = self.last_lines()
        if self._log is not None:
            self._log.close()

    @property
    def ram_files(self) -> list[Path]:
        """The memfds of guest RAM as this user may open them: ``/proc/PID/fd/N``. Raises VmError once QEMU has ended."""
        if self.returncode is not None:  # the number may be another process's by now
            raise VmError(
                f"QEMU (pid {self.pid}) has ended, and its guest RAM with it: measure before quit()"
            )
        if not self._ram_files:
            self._ram_files = ram.find_ram_files(self.pid, memory_sizes(self.machine))
        return self._ram_files

    @property
    def ram_file(self) -> Path:
        """The one memfd of a machine without NUMA nodes. Raises VmError, also where there are more."""
        if len(self.ram_files) != 1:
            raise VmError(f"guest RAM is {len(self.ram_files)} files, one a NUMA node: use ram_files")
        return self.ram_files[0]

    def footprint(self) -> int:
        """Return the bytes of guest RAM that the host holds, in memory or swap. Raises VmError once QEMU has ended.

        Neither RSS nor PSS says this of files that a second process maps as well.
        """
        try:
            return ram.footprint(self.ram_files)
        except OSError as error:
            raise VmError(
                f"guest RAM of pid {self.pid} cannot be measured ({error.strerror}): has QEMU ended?"
            ) from error

    async def ram_sections(self) -> list[ram.Section]:
        """Return where the guest sees its RAM, by guest physical address; Section.file counts ram_files."""
        text = await self.execute("human-monitor-command", {"command-line": "info mtree -f"})
        return ram.parse_flat_view(str(text))
