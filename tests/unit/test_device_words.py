"""The device's words are declared once; what people copy from texts that cannot import them is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostdev import launch
from qmp_glue.device_words import DRIVERS, PROPERTIES, device_option, socket_option

ROOT = Path(__file__).parents[2]


def test_the_words() -> None:
    assert device_option("c") == (
        "vhost-user-test-device-pci,chardev=c,virtio-id=5,num_vqs=5,config_size=16,vq_size=128"
    )
    assert device_option("c", transport="mmio").startswith("vhost-user-test-device,chardev=c,virtio-id=5,")
    assert socket_option("c", "/a,b") == "socket,id=c,path=/a,,b"


@pytest.mark.parametrize("text", ["README.md", "docs/guide.md"])
def test_documents_have_them(text: str) -> None:
    words = ",".join(f"{name}={value}" for name, value in PROPERTIES.items())
    assert words in (ROOT / text).read_text()


def test_the_devices_own_help_has_them() -> None:
    assert device_option("balloon") in launch.EXAMPLES


def test_no_second_copy_in_the_code() -> None:
    """Only what is declared to be outside of it names the driver: the device's help."""
    allowed = {ROOT / "qmp_glue/device_words.py", ROOT / "hostdev/launch.py"}
    folders = ("hostdev", "qmp_glue", "guest_images", "balloonlab")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    assert [path for path in files if f"{DRIVERS['pci']}," in path.read_text() and path not in allowed] == []
