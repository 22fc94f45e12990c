"""One QMP connection with deadlines, typed errors and a list of commands that are never sent.

A thin layer over qemu.qmp's client, which has no time-outs, raises its reader's EOFError out of disconnect() after QEMU
died, and would send what crashes QEMU. It starts no process: vm.py does, and gives it a connected socket. inspect.py
and experiments talk through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    QMPClient,
    Runstate,
    StateError,
)
from qemu.qmp.error import ProtocolError
from qemu.qmp.qmp_client import ExecuteError

from qmp_glue.errors import CommandDeniedError, CommandFailedError, DeadlineError, MonitorClosedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from pathlib import Path

__all__ = [
    "DENIED_COMMANDS",
    "DEVICE_SERVES",
    "EXECUTE_SECONDS",
    "QEMU_SERVES",
    "Monitor",
    "deny",
    "open_monitor",
]

# A synchronous vhost-user message can hold QMP while the device's worker is replaced; longer means something hangs.
EXECUTE_SECONDS = 30.0
CLOSE_SECONDS = 5.0
# A greeting comes at once; it does not come at all while another client holds the socket.
GREETING_SECONDS = 5.0

# With vhost-user-test-device QEMU dereferences a NULL get_vhost() in these (hw/virtio/virtio-qmp.c; seen up to 11.1.3).
DENIED_COMMANDS = frozenset(
    {"x-query-virtio-status", "x-query-virtio-queue-status", "x-query-virtio-vhost-queue-status"}
)
# The same code, reached over the human monitor ("info virtio-status ...").
_DENIED_INFO = frozenset(command.removeprefix("x-query-") for command in DENIED_COMMANDS)

# Failures reach the caller as exceptions; without a handler of the program's own they would be printed as well.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


def deny(command: str, arguments: Mapping[str, object] | None) -> None:
    """Raise CommandDeniedError for what is known to crash QEMU with this device."""
    words = {command}
    if command == "human-monitor-command":
        words |= set(str((arguments or {}).get("command-line", "")).split())
    if words & (DENIED_COMMANDS | _DENIED_INFO):
        raise CommandDeniedError(
            f"{command} {dict(arguments or {})} was not sent: it crashes QEMU with a vhost-user-test-device; "
            "use x-query-virtio, or ask the device itself over its control socket"
        )


class Monitor:
    """A QMP session on a connected socket, which it owns from connect() on."""

    def __init__(self, name: str = "qemu") -> None:
        self._client = QMPClient(name)
        self._events = EventListener()
        self._client.register_listener(self._events)

    @property
    def is_open(self) -> bool:
        """Whether commands can be sent."""
        return self._client.runstate is Runstate.RUNNING

    async def connect(self, connection: socket.socket, *, seconds: float) -> None:
        """Await the greeting and negotiate. Raises DeadlineError, and MonitorClosedError if the peer hangs up."""
        try:
            async with asyncio.timeout(seconds):
                await self._client.connect(connection)
        except TimeoutError as error:
            raise DeadlineError(
                f"QMP did not come up in {seconds:g} s: does the balloon's backend answer on its socket?"
            ) from error
        except ConnectError as error:
            raise MonitorClosedError(f"QMP did not come up: {error.exc!r}; see what QEMU wrote") from error
        finally:
            if not self.is_open:
                connection.close()

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, seconds: float = EXECUTE_SECONDS
    ) -> object:
        """Send a command, return what it returns.

        Raises CommandDeniedError, CommandFailedError, DeadlineError (the answer is dropped when it comes later, and
        the session goes on) and MonitorClosedError.
        """
        deny(command, arguments)
        try:
            async with asyncio.timeout(seconds):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise CommandFailedError(command, error.error_class, error.error.error.desc) from error
        except TimeoutError as error:
            raise DeadlineError(
                f"QEMU did not answer {command} in {seconds:g} s: does the device hang?"
            ) from error
        except (ExecInterruptedError, StateError) as error:
            raise MonitorClosedError(
                f"{command} has no answer, the QMP connection is closed: has QEMU ended?"
            ) from error

    async def pass_fd(self, name: str, fd: int) -> None:
        """Give the peer a copy of this descriptor under a name, as ``getfd`` describes. Raises as execute() does."""
        if not self.is_open:
            raise MonitorClosedError(
                "no descriptor can be passed, the QMP connection is closed: has QEMU ended?"
            )
        try:
            self._client.send_fd_scm(fd)
        except OSError as error:
            raise MonitorClosedError(
                f"no descriptor can be passed ({error.strerror}): has QEMU ended?"
            ) from error
        await self.execute("getfd", {"fdname": name})

    async def wait_event(self, *names: str, seconds: float) -> dict[str, object]:
        """Return the next event of these names, dropping others before it. Events wait here until they are taken.

        Raises DeadlineError.
        """
        try:
            async with asyncio.timeout(seconds):
                while True:
                    event = dict(await self._events.get())
                    if event["event"] in names:
                        return event
        except TimeoutError as error:
            raise DeadlineError(
                f"no event {' or '.join(names)} in {seconds:g} s: does the guest hang?"
            ) from error

    @contextlib.contextmanager
    def listen(self, *names: str) -> Iterator[EventListener]:
        """Yield a listener of its own that gets the events of these names while the block runs."""
        with self._client.listener(names or None) as listener:
            yield listener

    async def close(self) -> None:
        """End the session, whatever state it is in; safe to call twice."""
        with contextlib.suppress(EOFError, OSError, ProtocolError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._client.disconnect()


# What to do where nobody serves QMP at a path: two programs do that here.
QEMU_SERVES = "name the socket of -qmp unix:PATH,server=on,wait=off"
DEVICE_SERVES = "name the socket that vhost-user-balloon was given with --control, and start it first"


@contextlib.asynccontextmanager
async def open_monitor(
    path: Path, *, seconds: float = GREETING_SECONDS, fix: str = QEMU_SERVES
) -> AsyncIterator[Monitor]:
    """Talk to whoever serves QMP on this UNIX socket: a QEMU, or the device's control socket.

    Raises MonitorClosedError with this fix where there is none, and DeadlineError where another client has it.
    """
    monitor = Monitor()
    try:
        await monitor.connect(await _connected(path, fix), seconds=seconds)
    except DeadlineError as error:
        raise DeadlineError(
            f"{path} gives no greeting in {seconds:g} s: QEMU talks to one client at a time, so end the other one, "
            "or give QEMU a second -qmp"
        ) from error
    try:
        yield monitor
    finally:
        await monitor.close()


async def _connected(path: Path, fix: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, str(path))
    except OSError as error:
        connection.close()
        raise MonitorClosedError(f"no QMP at {path} ({error.strerror or error}): {fix}") from error
    return connection
