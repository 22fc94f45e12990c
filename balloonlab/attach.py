"""The commands balloonlab attach and detach: the device into a VM that already runs, and out of it.

What they do is qmp_glue.attach's; this file has their options, the device's control socket and what is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from pathlib import Path

from balloonlab import signals
from balloonlab.errors import UsageError
from balloonlab.options import Commands
from balloonlab.progress import Progress
from hostdev.acceptor import peer_of
from hostdev.errors import EXIT_PASS
from qmp_glue.attach import DEFAULT_ID, DETACH_SECONDS, Attachment, attach, detach
from qmp_glue.errors import CommandFailedError, DeadlineError
from qmp_glue.monitor import DEVICE_SERVES, Monitor, open_monitor

# The device knows its front end a moment after it has answered it.
INHIBIT_SECONDS = 5.0
INHIBIT_POLL_SECONDS = 0.05


def add_parsers(commands: Commands) -> None:
    """Declare the commands."""
    parser = commands.add_parser("attach", help="add the device to a VM that already runs")
    _add_machine_options(parser)
    parser.add_argument(
        "--socket-path", type=Path, required=True, metavar="PATH", help="where the device listens"
    )
    parser.add_argument("--bus", help="a hot-pluggable PCI bus (default: a free one that is found)")
    parser.add_argument(
        "--inhibit-if-unsafe",
        action="store_true",
        help="where giving memory back would be unsafe, attach all the same and have it inhibited",
    )
    parser.add_argument(
        "--control", type=Path, metavar="PATH", help="the device's own --control socket, for that"
    )
    parser.set_defaults(run=run_attach)
    parser = commands.add_parser("detach", help="take it out again: the guest has to let go of it")
    _add_machine_options(parser)
    parser.add_argument(
        "--timeout",
        type=float,
        default=DETACH_SECONDS,
        metavar="SECONDS",
        help="how long the guest may take (default: %(default)g)",
    )
    parser.set_defaults(run=run_detach)


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--qmp",
        type=Path,
        required=True,
        metavar="PATH",
        help="QEMU's QMP socket: -qmp unix:PATH,server=on,wait=off",
    )
    parser.add_argument("--id", default=DEFAULT_ID, help="the device's id in QEMU (default: %(default)s)")


def run_attach(options: argparse.Namespace, progress: Progress) -> int:
    """Attach, and say where and how."""
    if options.inhibit_if_unsafe and options.control is None:
        raise UsageError("--inhibit-if-unsafe needs --control: the control socket of the device")
    attachment = signals.run(_attach(options))
    progress.say(f"{attachment.device} is on bus {attachment.bus}, through chardev {attachment.chardev}")
    for line in _remarks(attachment):
        progress.say(line)
    return EXIT_PASS


async def _attach(options: argparse.Namespace) -> Attachment:
    async def inhibit(process: int) -> None:
        async with open_monitor(options.control, fix=DEVICE_SERVES) as device:
            _check_same(options.control, process)
            await _inhibit(device, options.socket_path)

    async with open_monitor(options.qmp) as qemu:
        return await attach(
            qemu,
            options.socket_path.absolute(),
            bus=options.bus,
            device=options.id,
            inhibit=inhibit if options.inhibit_if_unsafe else None,
        )


def _check_same(control: Path, process: int) -> None:
    """Raise UsageError if another process than this one listens there: the wrong device would be inhibited."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(control))
        if peer_of(connection).pid != process:
            raise UsageError(
                f"--control {control} is of another device than --socket-path: name the same one's"
            )


async def _inhibit(device: Monitor, socket_path: Path) -> None:
    """Have the device keep what the guest offers. Raises CommandFailedError, DeadlineError, UsageError."""
    end = asyncio.get_running_loop().time() + INHIBIT_SECONDS
    guest: dict[str, object] = {}
    while True:
        try:
            await device.execute("inhibit", guest)
        except CommandFailedError as error:
            if error.error_class == "GenericError" and not guest:
                guest = await _guest_at(device, socket_path, error)
                continue
            if error.error_class != "DeviceNotActive":
                raise
            if asyncio.get_running_loop().time() > end:
                raise DeadlineError(
                    f"the device knows of no front end after {INHIBIT_SECONDS:g} s: is --control of this device?"
                ) from error
            await asyncio.sleep(INHIBIT_POLL_SECONDS)
        else:
            return


async def _guest_at(device: Monitor, socket_path: Path, refused: CommandFailedError) -> dict[str, object]:
    """Name the guest whose front end connects there: a device that serves several wants to know which is meant.

    Raises refused where that was not the reason, UsageError if none of them is that one.
    """
    try:
        guests = await device.execute("query-guests")
    except CommandFailedError:
        raise refused from None
    assert isinstance(guests, list)
    for guest in guests:
        if "socket-path" in guest and Path(guest["socket-path"]).resolve() == socket_path.resolve():
            return {"guest": guest["name"]}
    raise UsageError(f"the device listens for no guest at {socket_path}: name the path that it was given")


def _remarks(attachment: Attachment) -> list[str]:
    lines = [f"{finding.severity}: {finding.message} [{finding.rule}]" for finding in attachment.findings]
    if attachment.inhibited:
        return [
            *lines,
            "so it is inhibited: it gives nothing back until its control socket is told to allow it",
        ]
    return lines


def run_detach(options: argparse.Namespace, progress: Progress) -> int:
    """Detach, and say so."""

    async def work() -> None:
        async with open_monitor(options.qmp) as qemu:
            await detach(qemu, device=options.id, seconds=options.timeout)

    signals.run(work())
    progress.say(f"{options.id} is gone, and its connection with it")
    return EXIT_PASS
