"""A balloon that comes and goes while its guest runs, in a root port of a q35.

The connection to the device is there from QEMU's start (commandline.VhostUserBalloon with ``plugged=False``) and serves
one plugging: a second device on it would tell its memory as if the first had not told it. Guest tests use it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from qmp_glue.board import root_port
from qmp_glue.commandline import BALLOON_ID, VHOST_USER_DEVICE, balloon_properties
from qmp_glue.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmp_glue.vm import VirtualMachine

__all__ = ["plug_balloon", "unplug_balloon"]

# A guest lets its user change their mind for 5 s after the button (PCI Express 5.0, 6.7.1.5), then unbinds the driver.
UNPLUG_SECONDS = 30.0


async def plug_balloon(vm: VirtualMachine, port: int = 0) -> None:
    """Plug the balloon into a root port. The guest's driver takes it up in its own time. Raises VmError."""
    place = {"driver": f"{VHOST_USER_DEVICE}-pci", "id": BALLOON_ID, "bus": root_port(port)}
    await vm.execute("device_add", {**place, **balloon_properties()})


async def unplug_balloon(vm: VirtualMachine, *, seconds: float = UNPLUG_SECONDS) -> None:
    """Ask the guest to let go of the balloon and wait until it is gone. Raises DeadlineError."""
    with vm.monitor.listen("DEVICE_DELETED") as deleted:
        await vm.execute("device_del", {"id": BALLOON_ID})
        try:
            async with asyncio.timeout(seconds):
                while not _is_balloon(await deleted.get()):
                    pass
        except TimeoutError as error:
            raise DeadlineError(
                f"the guest has not let go of the balloon in {seconds:g} s: see its console, does it know hot-plug?"
            ) from error


def _is_balloon(event: Mapping[str, object]) -> bool:
    data = event["data"]
    return isinstance(data, dict) and data.get("device") == BALLOON_ID
