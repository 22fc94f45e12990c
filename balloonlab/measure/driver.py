"""Whether the guest's balloon driver serves its device and reports free pages, as the guest itself says.

Asked of sysfs, so that our device and QEMU's own are judged alike. Used by runner.py.
"""

from __future__ import annotations

import re

from balloonlab.printable import printable
from guest_images.agent_client import AgentClient
from hostdev.wire.balloon import Feature

# virtio 1.3, 5.5: a balloon's device ID; 2.1: DRIVER_OK, a bit of the status field.
_BALLOON = "0x0005"
_DRIVER_OK = 4
# "features" is a line of 0 and 1, bit 0 first (drivers/virtio/virtio.c, features_show, Linux 6.12).
_SAID = re.compile(r"\s*0x([0-9a-fA-F]{1,8}) ([01]{6,256})(?:\s|$)")
_SHOWN_CHARACTERS = 80
_LIST = f"""cd /sys/bus/virtio/devices 2>/dev/null || exit 0
for each in *; do
    [ "$(cat $each/device)" = {_BALLOON} ] && echo "$(cat $each/status) $(cat $each/features)"
done
true"""


async def missing(agent: AgentClient) -> str | None:
    """Return why the guest does not report free pages, None if it does. Raises AgentError."""
    ran = await agent.run(_LIST)
    return judge(ran.stdout)


def judge(text: str) -> str | None:
    """Read what the guest said of its balloons: a line with status and features each. The first one is judged."""
    if not text.strip():
        return "the guest sees no balloon: does its kernel have the bus that the device is on?"
    found = _SAID.match(text)
    if found is None:
        said = printable(text.strip(), _SHOWN_CHARACTERS)
        return f"unreadable what the guest says of its balloon in /sys/bus/virtio/devices: {said!r}"
    status, features = int(found[1], 16), found[2]
    if not status & _DRIVER_OK:
        return (
            "no driver serves the guest's balloon: virtio_balloon was not loaded, or failed; see console.log"
        )
    if features[Feature.REPORTING.bit_length() - 1] != "1":
        return (
            "the guest's driver does not report free pages: a kernel before 5.7, or one that initialises or poisons "
            "freed pages and was not offered PAGE_POISON"
        )
    return None
