"""Kernels to boot: Debian's kernel of a suite, of the cloud flavour or another, or a user's own image and its modules.

Only the packages that hold the image and the modules are fetched, and unpacked without root. The compressed image is
unpacked to a `vmlinux` that QEMU boots in PVH mode, which saves the guest the decompression (1.3 s under TCG).
It looks for nothing: `guest_images.sources` finds image and modules in what people have. `guest_images.build` uses both.

Layouts: up to Linux 6.12 Debian ships /boot/vmlinuz-VERSION and lib/modules/VERSION in one package; from 7.x on the image
lies beside its modules, in several packages. bzImage header: Documentation/arch/x86/boot.rst of Linux 6.12.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from construct import Const, ConstructError, Int8ul, Int16ul, Int32ul, Pointer, Struct

from guest_images.decompress import lz4, zstd
from guest_images.elf import pvh_entry
from guest_images.errors import ElfError, KernelError
from guest_images.files import write_atomically
from guest_images.tree import package_tree
from qmp_glue.debian import cache_root

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Debian's flavours of a kernel, linux-image-FLAVOUR. amd64 can poison freed pages (CONFIG_PAGE_POISONING, in each suite
# from bookworm to forky); cloud-amd64 cannot, and is a third of its size.
CLOUD = "cloud-amd64"
GENERIC = "amd64"
# linux-base-VERSION holds modules.builtin from 7.x on; plain linux-base is a tool for other boot loaders.
KERNEL_PACKAGE = re.compile(r"linux-(image|binary|modules|base)-\d")

ELF_MAGIC = b"\x7fELF"
SECTOR = 512
# boot.rst: payload_offset and payload_length exist since boot protocol 2.08.
PROTOCOL_WITH_PAYLOAD = 0x0208
SETUP_HEADER = Struct(
    "setup_sectors" / Pointer(0x1F1, Int8ul),
    "magic" / Pointer(0x202, Const(b"HdrS")),
    "protocol" / Pointer(0x206, Int16ul),
    "version_offset" / Pointer(0x20E, Int16ul),
    "payload_offset" / Pointer(0x248, Int32ul),
    "payload_length" / Pointer(0x24C, Int32ul),
)
# boot.rst, "kernel_version": its offset counts from here, and 0 stands for none.
VERSION_BASE = 0x200
# init/version-timestamp.c of Linux 6.12, linux_banner: in every vmlinux, for /proc/version and the first line of the log.
BANNER = re.compile(rb"Linux version (\d+\.\d+\S*) \(")
# The kernel's build appends the uncompressed size to every payload; gzip's own trailer is that size already
# (scripts/Makefile.lib, size_append, Linux 6.12).
UNCOMPRESSED_SIZE = Int32ul
# boot.rst, "payload_offset": what each payload starts with. Beside the filter, how much was appended for it to ignore.
DECOMPRESSORS: dict[bytes, tuple[Callable[[bytes], bytes], int]] = {
    b"\x1f\x8b": (gzip.decompress, 0),
    b"\x42\x5a": (bz2.decompress, UNCOMPRESSED_SIZE.sizeof()),
    b"\x5d\x00": (lzma.decompress, UNCOMPRESSED_SIZE.sizeof()),
    b"\xfd\x37": (lzma.decompress, UNCOMPRESSED_SIZE.sizeof()),
    b"\x02\x21": (lz4, UNCOMPRESSED_SIZE.sizeof()),
    b"\x28\xb5": (zstd, UNCOMPRESSED_SIZE.sizeof()),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel to boot: `image` is a PVH `vmlinux` if `pvh`, a bzImage otherwise; `suite` is "own" for a user's.

    modules_dir: None for a kernel of which only the image is there; whatever it needs must then be built in.
    """

    suite: str
    version: str
    image: Path
    modules_dir: Path | None
    pvh: bool


def debian_kernel(
    suite: str, *, flavour: str = CLOUD, progress: Callable[[str], None] = lambda _line: None
) -> Kernel:
    """Return Debian's kernel of a suite, fetched if it is not in the cache.

    Raises DebianError where packages cannot be had, KernelError where their layout is unknown.
    """
    keep = lambda name: bool(KERNEL_PACKAGE.match(name))  # noqa: E731 - used once, right here
    tree = package_tree(suite, [f"linux-image-{flavour}"], keep=keep, progress=progress)
    directories = [path.parent for path in tree.root.glob("usr/lib/modules/*/kernel")]
    if len(directories) != 1:
        raise KernelError(
            f"{len(directories)} kernels below {tree.root}, expected one: remove that tree and try again"
        )
    version = directories[0].name
    places = (directories[0] / "vmlinuz", tree.root / "boot" / f"vmlinuz-{version}")
    image = next((place for place in places if place.is_file()), None)
    if image is None:
        raise KernelError(
            f"no vmlinuz of {version} below {tree.root}: Debian's layout changed, teach it to kernel.py"
        )
    return own_kernel(image, directories[0], suite=suite, progress=progress)


def own_kernel(
    image: Path,
    modules_dir: Path | None,
    *,
    suite: str = "own",
    progress: Callable[[str], None] = lambda _line: None,
) -> Kernel:
    """Return a kernel made of an image (bzImage or vmlinux) and its modules directory (lib/modules/VERSION), if any.

    Raises KernelError where the image is neither, or damaged.
    """
    data = read_image(image)
    version = image_version(data) or (modules_dir.name if modules_dir is not None else "unknown")
    if data.startswith(ELF_MAGIC):
        return Kernel(suite, version, image, modules_dir, pvh=_boots_pvh(data, image))
    place = cache_root() / "kernels" / f"vmlinux-{hashlib.sha256(data).hexdigest()[:16]}"
    if not place.is_file():
        progress(f"unpacking the kernel image {image.name}")
        vmlinux = unpack_image(data, str(image))
        if not _boots_pvh(vmlinux, image):
            return Kernel(suite, version, image, modules_dir, pvh=False)
        write_atomically(place, vmlinux)
    return Kernel(suite, version, place, modules_dir, pvh=True)


def read_image(image: Path) -> bytes:
    """Return all of a kernel image. Raises KernelError."""
    try:
        return image.read_bytes()
    except OSError as error:
        raise KernelError(
            f"cannot read the kernel image {image} ({error}): give the path of a vmlinuz"
        ) from error


def image_version(data: bytes) -> str | None:
    """Return the version that a bzImage or a vmlinux names, as `uname -r` will; None where it names none."""
    if data.startswith(ELF_MAGIC):
        banner = BANNER.search(data)
        return banner[1].decode(errors="replace") if banner else None
    try:
        offset = SETUP_HEADER.parse(data).version_offset
    except ConstructError:
        return None
    words = data[VERSION_BASE + offset :].partition(b"\0")[0].split() if offset else []
    return words[0].decode(errors="replace") if words else None


def _boots_pvh(vmlinux: bytes, image: Path) -> bool:
    try:
        return pvh_entry(io.BytesIO(vmlinux), str(image)) is not None
    except ElfError as error:
        raise KernelError(f"{image} does not hold a Linux kernel: {error}") from error


def unpack_image(data: bytes, name: str) -> bytes:
    """Return the `vmlinux` inside a bzImage. Raises KernelError where it is none or damaged."""
    try:
        header = SETUP_HEADER.parse(data)
    except ConstructError as error:
        raise KernelError(
            f"{name} is neither a bzImage nor a vmlinux: give a kernel image for x86-64"
        ) from error
    if header.protocol < PROTOCOL_WITH_PAYLOAD:
        raise KernelError(
            f"{name} uses boot protocol {header.protocol:#x}, older than 2.08: take a kernel since 2.6.26"
        )
    start = (header.setup_sectors + 1) * SECTOR + header.payload_offset
    return _decompressed(data[start : start + header.payload_length], header.payload_length, name)


def _decompressed(payload: bytes, length: int, name: str) -> bytes:
    if len(payload) != length or length < UNCOMPRESSED_SIZE.sizeof():
        raise KernelError(f"{name} ends after {len(payload)} of {length} payload bytes: fetch it again")
    size = UNCOMPRESSED_SIZE.parse(payload[-UNCOMPRESSED_SIZE.sizeof() :])
    known = DECOMPRESSORS.get(payload[:2])
    if known is None:
        raise KernelError(
            f"{name} is compressed in an unknown way ({payload[:2].hex()}): give its vmlinux instead"
        )
    decompressed, appended = known
    try:
        vmlinux = decompressed(payload[: length - appended])
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise KernelError(f"{name}: its payload is damaged ({error}): fetch it again") from error
    if len(vmlinux) != size:
        raise KernelError(f"{name}: unpacked to {len(vmlinux)} bytes, its header says {size}: fetch it again")
    return vmlinux
