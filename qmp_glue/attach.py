"""The device added to a VM that runs, and taken from it again, over QMP.

Everything that can be known is asked before anything is changed: whether the machine suits (inspect.py), whether its
QEMU knows the device, where there is room (pci_buses.py), and whether the device answers (backend_socket.py). QEMU then
gets the very connection that was answered, as a descriptor. What fails after that is undone. It starts no process; the
commands balloonlab attach and detach, and tests, call it with a Monitor.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from hostdev.acceptor import peer_of
from qmp_glue.backend_socket import connect_backend
from qmp_glue.device_words import DRIVERS, PROPERTIES
from qmp_glue.errors import AttachError, CommandFailedError, DeadlineError, RefusedError, VmError
from qmp_glue.inspect import Executes, Finding, inspect_running
from qmp_glue.pci_buses import free_bus
from qmp_glue.running_setup import children, entries, property_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from pathlib import Path

__all__ = ["DEFAULT_ID", "DETACH_SECONDS", "Attachment", "Drives", "attach", "detach"]

DEFAULT_ID = "balloon0"
# A Linux guest unbinds the driver first, which gives an inflated balloon's pages back: a second, or some under TCG.
DETACH_SECONDS = 30.0
# An RCU grace period takes milliseconds, and longer only while a CPU of the guest does not come out of its loop.
RELEASE_SECONDS = 10.0
RELEASE_POLL_SECONDS = 0.02
_PERIPHERALS = "/machine/peripheral"

Value = TypeVar("Value")


class Drives(Executes, Protocol):
    """What can change a running QEMU: a Monitor."""

    def pass_fd(self, name: str, fd: int) -> Awaitable[None]:
        """Give QEMU a copy of a descriptor under a name."""

    def wait_event(self, *names: str, seconds: float) -> Awaitable[dict[str, object]]:
        """Return the next event of these names. Raises DeadlineError."""


@dataclass(frozen=True)
class Attachment:
    """A device that was added: its id, its chardev's, and its bus. ``findings`` says why it is inhibited, or warns."""

    device: str
    chardev: str
    bus: str
    inhibited: bool
    findings: tuple[Finding, ...]


async def attach(
    qemu: Drives,
    socket_path: Path,
    *,
    bus: str | None = None,
    device: str = DEFAULT_ID,
    inhibit: Callable[[int], Awaitable[None]] | None = None,
) -> Attachment:
    """Add the device that listens on this path to a running machine, on this bus or a free hot-pluggable one.

    Where releasing would be unsafe, ``inhibit`` is awaited before QEMU gets the device, with the process id of who listens
    there; without it that is a refusal.
    Raises RefusedError, BackendError, AttachError and what execute() raises; then the machine is as it was.
    """
    findings = await inspect_running(qemu, adding=1)
    inhibiting = _must_inhibit(findings, may=inhibit is not None)
    chardev = _chardev_of(device)
    await _check_names(qemu, device, chardev)
    bus = bus if bus is not None else await free_bus(qemu)
    with await connect_backend(socket_path) as connection:
        if inhibiting and inhibit is not None:
            await inhibit(peer_of(connection).pid)
        await _whole(_add(qemu, connection.fileno(), chardev, device, bus))
    return Attachment(device, chardev, bus, inhibiting, tuple(findings))


def _chardev_of(device: str) -> str:
    return f"{device}-socket"


def _must_inhibit(findings: list[Finding], *, may: bool) -> bool:
    """Raise RefusedError for errors that no inhibiting cures; return whether there are errors at all."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if any(finding.effect != "unsafe" for finding in errors) or (errors and not may):
        raise RefusedError(errors)
    return bool(errors)


async def _check_names(qemu: Executes, device: str, chardev: str) -> None:
    """Say early what device_add would say when the chardev is there already."""
    if device in dict(await children(qemu, _PERIPHERALS)):
        raise AttachError(f"the machine has a device {device!r}: choose another id")
    labels = {entry.get("label") for entry in entries(await qemu.execute("query-chardev"))}
    if chardev in labels:
        raise AttachError(f"the machine has a chardev {chardev!r}: choose another id, or remove that chardev")
    try:
        await qemu.execute("device-list-properties", {"typename": DRIVERS["pci"]})
    except CommandFailedError as error:
        raise AttachError(
            f"this QEMU has no device {DRIVERS['pci']}: use QEMU 10.2 or newer ({error.description})"
        ) from error


async def _add(qemu: Drives, connection: int, chardev: str, device: str, bus: str) -> None:
    """Make chardev and device. Without reconnect in the chardev: QEMU aborts when it does."""
    await qemu.pass_fd(chardev, connection)
    address = {"type": "fd", "data": {"str": chardev}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    added: dict[str, object] = {"driver": DRIVERS["pci"], "id": device, "bus": bus, "chardev": chardev}
    try:
        await qemu.execute("chardev-add", {"id": chardev, "backend": backend})
        await qemu.execute("device_add", added | dict(PROPERTIES))
    except VmError:
        await _undo(qemu, chardev)
        raise


async def _undo(qemu: Executes, chardev: str) -> None:
    """Take back what was made. QEMU refuses to remove a chardev that a device uses, so a device that came late stays."""
    for command, arguments in (("chardev-remove", {"id": chardev}), ("closefd", {"fdname": chardev})):
        with contextlib.suppress(VmError):
            await qemu.execute(command, arguments)


async def _whole(work: Coroutine[object, object, Value]) -> Value:
    """Await work to its end even when cancelled: a machine is not to be left half changed. Commands have deadlines."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def detach(qemu: Drives, *, device: str = DEFAULT_ID, seconds: float = DETACH_SECONDS) -> None:
    """Ask the guest to let go of the device, await that, and remove its chardev, which ends the connection.

    The guest has to consent: without an operating system that hears of it, a reset of the machine completes the
    removal. Raises AttachError where the device is not there or the guest refuses, DeadlineError when it says nothing;
    then the device is still there.
    """
    kind = dict(await children(qemu, _PERIPHERALS)).get(device)
    if kind != DRIVERS["pci"]:
        raise AttachError(
            f"the machine has no balloon {device!r} ({kind or 'nothing of that id'}): give the id of attach"
        )
    chardev = await property_of(qemu, f"{_PERIPHERALS}/{device}", "chardev")
    try:
        await qemu.execute("device_del", {"id": device})
    except CommandFailedError as error:
        asked_before = "already in the process of unplug" in error.description
        if not asked_before and error.error_class != "DeviceNotFound":
            raise
    await _await_removal(qemu, device, seconds)
    await _remove_chardev(qemu, str(chardev or _chardev_of(device)))


async def _remove_chardev(qemu: Executes, chardev: str) -> None:
    """Remove it once QEMU lets it: the last of the device goes after a grace period of its own (RCU)."""
    end = asyncio.get_running_loop().time() + RELEASE_SECONDS
    while True:
        try:
            await qemu.execute("chardev-remove", {"id": chardev})
        except CommandFailedError as error:
            if "busy" not in error.description or asyncio.get_running_loop().time() > end:
                raise
            await asyncio.sleep(RELEASE_POLL_SECONDS)
        else:
            return


async def _await_removal(qemu: Drives, device: str, seconds: float) -> None:
    """Wait until the device is gone. An event of an earlier device of this name may still be on the queue."""
    end = asyncio.get_running_loop().time() + seconds
    while device in dict(await children(qemu, _PERIPHERALS)):
        left = end - asyncio.get_running_loop().time()
        try:
            event = await qemu.wait_event(
                "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", seconds=max(0.0, left)
            )
        except DeadlineError as error:
            raise DeadlineError(
                f"the guest has not let go of {device!r} in {seconds:g} s, and still has it: a guest needs a running "
                "system with PCI hotplug for that; asked once, it may do so later, or at a reset"
            ) from error
        if event["event"] == "DEVICE_UNPLUG_GUEST_ERROR" and _device_of(event) == device:
            raise AttachError(f"the guest refuses to let go of {device!r}: see what its kernel says")


def _device_of(event: Mapping[str, object]) -> object:
    data = event.get("data")
    return data.get("device") if isinstance(data, dict) else None
