"""What is read from ELF files: PVH notes, module information, the files a program needs."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import pytest

from guest_images.elf import ModuleInfo, module_info, needs, pvh_entry, runtime_files
from guest_images.errors import ElfError
from tests.unit import elf_files

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("form", ["<Q", "<I"])
def test_the_pvh_entry_is_the_note_of_type_18(form: str) -> None:
    notes = [
        elf_files.note("GNU", 18, struct.pack("<Q", 1)),
        elf_files.note("Xen", 6, b"linux\0"),
        elf_files.note("Xen", 18, struct.pack(form, 0x1000850)),
    ]
    assert pvh_entry(io.BytesIO(elf_files.vmlinux(*notes)), "vmlinux") == 0x1000850


def test_a_kernel_without_the_note_has_no_pvh_entry() -> None:
    assert pvh_entry(io.BytesIO(elf_files.vmlinux(elf_files.note("Xen", 6, b"linux\0"))), "vmlinux") is None


def test_a_pvh_note_that_holds_no_address_is_an_error() -> None:
    damaged = elf_files.vmlinux(elf_files.note("Xen", 18, b"abc"))
    with pytest.raises(ElfError, match="3 bytes, not an address"):
        pvh_entry(io.BytesIO(damaged), "vmlinux")


def test_module_information() -> None:
    data = elf_files.module(
        "name=virtio-thing",
        "depends=virtio,virtio-ring",
        "alias=virtio:d5v*",
        "softdep=pre: crc32c a-b post: late",
    )
    assert module_info(io.BytesIO(data), "x.ko") == ModuleInfo(
        "virtio_thing", ("virtio", "virtio_ring"), ("crc32c", "a_b"), ("virtio:d5v*",)
    )


def test_a_module_must_name_itself() -> None:
    with pytest.raises(ElfError, match="names no module"):
        module_info(io.BytesIO(elf_files.module("license=GPL")), "x.ko")


def test_a_file_without_modinfo_is_no_module() -> None:
    with pytest.raises(ElfError, match="no kernel module"):
        module_info(io.BytesIO(elf_files.vmlinux()), "x.ko")


@pytest.mark.parametrize(
    "data", [b"", b"\x7fELF", b"not an ELF file at all", b"\x7fELF\2\1\1" + b"\xff" * 80]
)
def test_what_is_no_elf_file_is_a_typed_error(data: bytes) -> None:
    for reader in (pvh_entry, module_info, needs):
        with pytest.raises(ElfError, match="x is no ELF file"):
            reader(io.BytesIO(data), "x")


def _install(root: Path, path: str, data: bytes) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(data)


def test_runtime_files_follow_libraries_and_the_interpreter(tmp_path: Path) -> None:
    loader = "usr/lib/x86_64-linux-gnu/ld.so"
    _install(tmp_path, "usr/bin/p", elf_files.program("/lib64/ld.so", ["liba.so", "libb.so"]))
    _install(tmp_path, "usr/lib/x86_64-linux-gnu/liba.so", elf_files.program(None, ["libb.so"]))
    _install(tmp_path, "usr/lib/libb.so", elf_files.program(None, ["liba.so"]))
    _install(tmp_path, loader, elf_files.program(None, []))
    found = runtime_files(tmp_path, ["usr/bin/p"])
    assert found == sorted(["usr/bin/p", "usr/lib/x86_64-linux-gnu/liba.so", "usr/lib/libb.so", loader])


def test_a_library_that_the_tree_lacks_is_named(tmp_path: Path) -> None:
    _install(tmp_path, "p", elf_files.program(None, ["libgone.so.1"]))
    with pytest.raises(ElfError, match=r"p needs libgone\.so\.1"):
        runtime_files(tmp_path, ["p"])


def test_a_program_that_the_tree_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ElfError, match="cannot read usr/bin/p"):
        runtime_files(tmp_path, ["usr/bin/p"])
