"""Kernel images: the payload of a bzImage in each compression, a user's own kernel, and what damage says."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from guest_images.errors import ElfError, KernelError, ModuleMissingError
from guest_images.kernel import KERNEL_PACKAGE, image_version, own_kernel, unpack_image
from guest_images.modules import ModuleTree, read_module
from tests.unit import elf_files
from tests.unit.kernel_files import NO_PVH, PVH, bzimage, vmlinux, vmlinuz

if TYPE_CHECKING:
    from pathlib import Path


def sized(data: bytes) -> bytes:
    return struct.pack("<I", len(data))


def by_program(program: str, *options: str) -> bytes:
    if shutil.which(program) is None:
        pytest.skip(f"this machine has no {program} to compress a test kernel with")
    return subprocess.run([program, *options], input=PVH, capture_output=True, check=True, timeout=30).stdout


def compressed(kind: str) -> bytes:
    match kind:
        case "gzip":
            return gzip.compress(PVH)
        case "bzip2":
            return bz2.compress(PVH) + sized(PVH)
        case "xz":
            return lzma.compress(PVH, check=lzma.CHECK_CRC32) + sized(PVH)
        case "lzma":
            return lzma.compress(PVH, lzma.FORMAT_ALONE) + sized(PVH)
        case "zstd":
            return by_program("zstd", "-c") + sized(PVH)
    return by_program("lz4", "-l", "-c") + sized(PVH)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "lzma", "zstd", "lz4"])
def test_a_payload_is_unpacked(kind: str) -> None:
    assert unpack_image(bzimage(compressed(kind)), "vmlinuz") == PVH


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "neither a bzImage nor a vmlinux"),
        (b"\0" * 4096, "neither a bzImage nor a vmlinux"),
        (bzimage(gzip.compress(PVH), protocol=0x207), "boot protocol 0x207"),
        (bzimage(gzip.compress(PVH))[:-1], "ends after"),
        (bzimage(b"\x99\x99 something else"), "unknown way"),
        (bzimage(gzip.compress(PVH)[:40] + b"\0" * 40), "payload is damaged"),
        (bzimage(lzma.compress(PVH) + sized(b"")), "header says 0"),
        (bzimage(b""), "0 of 0 payload bytes"),
    ],
)
def test_a_damaged_image_names_the_fault(image: bytes, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        unpack_image(image, "vmlinuz")


def test_own_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    modules = tmp_path / "lib/modules/6.99"
    for name, data in {"vmlinux": PVH, "old": NO_PVH, "vmlinuz": bzimage(gzip.compress(PVH))}.items():
        (tmp_path / name).write_bytes(data)
    plain = own_kernel(tmp_path / "vmlinux", modules)
    assert (plain.image, plain.pvh, plain.version) == (tmp_path / "vmlinux", True, "6.99")
    assert not own_kernel(tmp_path / "old", modules).pvh
    unpacked = own_kernel(tmp_path / "vmlinuz", modules)
    assert unpacked.pvh
    assert unpacked.image.read_bytes() == PVH
    assert own_kernel(tmp_path / "vmlinuz", modules) == unpacked


def test_a_bzimage_without_pvh_is_booted_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = tmp_path / "vmlinuz"
    image.write_bytes(bzimage(gzip.compress(NO_PVH)))
    kernel = own_kernel(image, tmp_path)
    assert (kernel.image, kernel.pvh) == (image, False)


@pytest.mark.parametrize(
    ("image", "version"),
    [
        (vmlinuz("6.12.95+deb12-cloud-amd64"), "6.12.95+deb12-cloud-amd64"),
        (vmlinux("7.3.0-rc4"), "7.3.0-rc4"),
        (bzimage(gzip.compress(PVH)), None),
        (PVH, None),
        (b"text", None),
    ],
)
def test_an_image_tells_its_version(image: bytes, version: str | None) -> None:
    assert image_version(image) == version


def test_an_image_without_modules_is_a_kernel_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bzImage").write_bytes(vmlinuz("6.99"))
    kernel = own_kernel(tmp_path / "bzImage", None)
    assert (kernel.version, kernel.modules_dir, kernel.pvh) == ("6.99", None, True)


def test_a_kernel_that_is_not_there_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="cannot read the kernel image"):
        own_kernel(tmp_path / "gone", tmp_path)


def test_the_packages_that_hold_a_kernel() -> None:
    kept = [
        "linux-image-6.1.0-50-cloud-amd64",
        "linux-modules-7.3.4+deb13-cloud-amd64",
        "linux-base-7.2.12+deb14-x",
        "linux-image-6.1.0-50-amd64",
    ]
    assert all(KERNEL_PACKAGE.match(name) for name in kept)
    assert not any(
        KERNEL_PACKAGE.match(name)
        for name in ["linux-base", "linux-image-cloud-amd64", "linux-image-amd64", "libc6"]
    )


# --- a modules directory ---


def modules_dir(root: Path, files: dict[str, bytes], builtin: str = "") -> Path:
    (root / "kernel/drivers").mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / "kernel/drivers" / name).write_bytes(data)
    (root / "modules.builtin").write_text(builtin)
    return root


def test_modules_are_found_in_every_compression_and_put_in_order(tmp_path: Path) -> None:
    directory = modules_dir(
        tmp_path,
        {
            "virtio-balloon.ko.xz": lzma.compress(elf_files.module("name=virtio_balloon", "depends=virtio")),
            "virtio.ko.gz": gzip.compress(elf_files.module("name=virtio", "depends=")),
            "virtio_console.ko": elf_files.module("name=virtio_console", "depends=virtio"),
        },
        "kernel/drivers/virtio/virtio_pci.ko\n",
    )
    found = ModuleTree(directory).closure()
    assert [module.name for module in found] == ["virtio", "virtio_console", "virtio_balloon"]
    assert all(module.data.startswith(b"\x7fELF") for module in found)


def test_an_optional_module_is_taken_where_there_is_one(tmp_path: Path) -> None:
    builtin = "drivers/virtio_pci.ko\ndrivers/virtio_console.ko\ndrivers/virtio_balloon.ko\n"
    assert ModuleTree(modules_dir(tmp_path / "without", {}, builtin)).closure() == []
    mmio = {"virtio_mmio.ko": elf_files.module("name=virtio_mmio", "depends=")}
    found = ModuleTree(modules_dir(tmp_path / "with", mmio, builtin)).closure()
    assert [module.name for module in found] == ["virtio_mmio"]


def test_a_driver_that_may_lack_is_told_and_not_an_error(tmp_path: Path) -> None:
    tree = ModuleTree(modules_dir(tmp_path, {}, "drivers/virtio_pci.ko\ndrivers/virtio_console.ko\n"))
    assert tree.closure(optional=("virtio_balloon",)) == []
    assert [name for name in ("virtio_balloon", "virtio_pci", "virtio_mmio") if tree.lacks(name)] == [
        "virtio_balloon",
        "virtio_mmio",
    ]


def test_modules_without_a_listing_are_all_that_is_not_built_in(tmp_path: Path) -> None:
    directory = tmp_path / "loose"
    directory.mkdir()
    (directory / "virtio_balloon.ko").write_bytes(
        elf_files.module("name=virtio_balloon", "depends=virtio_ring")
    )
    found = ModuleTree(directory, assume_builtin=True).closure()
    assert [module.name for module in found] == ["virtio_balloon"]
    with pytest.raises(ModuleMissingError, match="no module virtio_pci"):
        ModuleTree(directory).closure()


@pytest.mark.parametrize("suffix", [".o", ".ko"])
def test_a_tree_in_which_a_kernel_was_built_lists_its_modules(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "Makefile").write_text("")
    (tmp_path / "modules.builtin").write_text(
        "kernel/drivers/virtio/virtio_pci.ko\nkernel/drivers/char/virtio_console.ko\n"
    )
    (tmp_path / "modules.order").write_text(f"drivers/virtio/virtio_balloon{suffix}\nfs/not_built{suffix}\n")
    place = tmp_path / "drivers/virtio/virtio_balloon.ko"
    place.parent.mkdir(parents=True)
    place.write_bytes(elf_files.module("name=virtio_balloon", "depends="))
    (tmp_path / "left/over").mkdir(parents=True)
    (tmp_path / "left/over/virtio_mmio.ko").write_bytes(b"of an earlier build")
    assert [module.name for module in ModuleTree(tmp_path).closure()] == ["virtio_balloon"]


def test_a_kernel_without_the_balloon_names_the_module_and_the_fix(tmp_path: Path) -> None:
    directory = modules_dir(tmp_path, {}, "drivers/virtio_pci.ko\ndrivers/virtio_console.ko\n")
    with pytest.raises(ModuleMissingError, match=r"no module virtio_balloon.*CONFIG_VIRTIO_BALLOON=y or =m"):
        ModuleTree(directory).closure()


def test_a_module_compressed_with_zstd_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.ko.zst"
    path.write_bytes(by_program("zstd", "-c"))
    assert io.BytesIO(read_module(path)).read() == PVH


@pytest.mark.parametrize("suffix", ["xz", "gz"])
def test_a_damaged_module_is_a_typed_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.ko.{suffix}"
    path.write_bytes(b"damaged")
    with pytest.raises(ElfError, match="is damaged"):
        read_module(path)
