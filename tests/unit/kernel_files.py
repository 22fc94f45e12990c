"""Kernel images, module folders and packages for tests, as small as what reads them allows."""

from __future__ import annotations

import gzip
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.unit import elf_files

PVH = elf_files.vmlinux(elf_files.note("Xen", 18, struct.pack("<Q", 0x1000850)))
NO_PVH = elf_files.vmlinux(elf_files.note("Xen", 6, b"linux\0"))
# Where an image's own version lies, behind the setup header.
VERSION_AT = 0x300


def bzimage(
    payload: bytes, *, protocol: int = 0x20F, length: int | None = None, version: str | None = None
) -> bytes:
    sectors, offset = 3, 20
    image = bytearray((sectors + 1) * 512 + offset)
    image[0x1F1] = sectors
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, protocol)
    struct.pack_into("<II", image, 0x248, offset, len(payload) if length is None else length)
    if version is not None:
        text = f"{version} (someone@somewhere) #1 SMP".encode()
        struct.pack_into("<H", image, 0x20E, VERSION_AT - 0x200)
        image[VERSION_AT : VERSION_AT + len(text)] = text
    return bytes(image) + payload


def vmlinuz(version: str) -> bytes:
    """A bzImage that boots in PVH mode."""
    return bzimage(gzip.compress(PVH), version=version)


def vmlinux(version: str, *, pvh: bool = True) -> bytes:
    return (PVH if pvh else NO_PVH) + f"Linux version {version} (someone@somewhere) #1 SMP".encode()


def module(name: str, depends: str = "") -> bytes:
    return elf_files.module(f"name={name}", f"depends={depends}")


def write(root: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files below a root and return it."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def installed(version: str, root: str = "lib/modules") -> dict[str, bytes | str]:
    """What make modules_install leaves of a kernel that has all but the balloon built in."""
    return {
        f"{root}/{version}/kernel/drivers/virtio/virtio_balloon.ko": module("virtio_balloon"),
        f"{root}/{version}/modules.order": "kernel/drivers/virtio/virtio_balloon.ko\n",
        f"{root}/{version}/modules.builtin": "kernel/drivers/virtio/virtio_pci.ko\nkernel/drivers/char/virtio_console.ko\n",
    }


def package(
    folder: Path, name: str, files: Mapping[str, bytes | str], *, version: str = "1-1", depends: str = ""
) -> Path:
    """Build a package file."""
    root = write(folder / f"{name}-{version}.root", files)
    control = {"Package": name, "Version": version, "Architecture": "amd64", "Depends": depends}
    control |= {"Maintainer": "Nobody <nobody@invalid>", "Description": "test"}
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "".join(f"{key}: {value}\n" for key, value in control.items() if value)
    )
    deb = folder / f"{name}_{version}_amd64.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "--build", root, deb],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return deb
