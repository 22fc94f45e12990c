"""A balloon that comes and goes while its guest runs, in a root port of a q35.

The connection to the device is there from QEMU's start (commandline.VhostUserBalloon with ``plugged=False``) and stays
when the balloon goes, so that it may come again; attach.py makes one of its own. Guest tests use it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from qmp_glue.board import root_port
from qmp_glue.commandline import BALLOON_CHARDEV
from qmp_glue.device_words import DRIVERS, PROPERTIES
from qmp_glue.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmp_glue.vm import VirtualMachine

__all__ = ["plug_balloon", "unplug_balloon"]

BALLOON_ID = "balloon"
# A guest lets its user change their mind for 5 s after the button (PCI Express 5.0, 6.7.1.5), then unbinds the driver.
UNPLUG_SECONDS = 30.0


async def plug_balloon(vm: VirtualMachine, port: int = 0) -> None:
    """Plug the balloon into a root port. The guest's driver takes it up in its own time. Raises VmError."""
    place = {"driver": DRIVERS["pci"], "id": BALLOON_ID, "bus": root_port(port), "chardev": BALLOON_CHARDEV}
    await vm.execute("device_add", {**place, **PROPERTIES})


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
