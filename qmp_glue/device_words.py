"""What QEMU is told to front the device: the one place where its driver's name and properties are written.

Pure values and words. commandline.py puts them on a command line, attach.py into device_add, paste.py in front of
people; find.py probes for the driver, machine_setup.py recognizes the device by them. Texts that cannot import this
(the device's --help, the README) are compared with it by a test.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

from hostdev.wire.balloon import CONFIG_SIZE, QUEUE_COUNT, VIRTIO_ID_BALLOON

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["DRIVERS", "PROPERTIES", "Transport", "device_option", "escaped", "socket_option"]

Transport: TypeAlias = Literal["pci", "mmio"]

DRIVERS: Mapping[Transport, str] = MappingProxyType(
    {"pci": "vhost-user-test-device-pci", "mmio": "vhost-user-test-device"}
)
# As QEMU's own balloon has it (hw/virtio/virtio-balloon.c, virtio_add_queue(vdev, 128, ...)).
QUEUE_SIZE = 128
PROPERTIES: Mapping[str, int] = MappingProxyType(
    {
        "virtio-id": VIRTIO_ID_BALLOON,
        "num_vqs": QUEUE_COUNT,
        "config_size": CONFIG_SIZE,
        "vq_size": QUEUE_SIZE,
    }
)


def escaped(value: str | Path) -> str:
    """Write a value for one of QEMU's option lists, where a comma is doubled (qemu(1), -drive file=)."""
    return str(value).replace(",", ",,")


def device_option(chardev: str, *, transport: Transport = "pci") -> str:
    """Return the value of -device for a device behind this chardev."""
    properties = "".join(f",{name}={value}" for name, value in PROPERTIES.items())
    return f"{DRIVERS[transport]},chardev={escaped(chardev)}{properties}"


def socket_option(chardev: str, path: str | Path) -> str:
    """Return the value of -chardev that connects to the device's socket. Without reconnect: QEMU aborts when it does."""
    return f"socket,id={escaped(chardev)},path={escaped(path)}"
