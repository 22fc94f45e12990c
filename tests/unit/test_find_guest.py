"""What find_guest puts together of a kernel and its modules; packages of the user space and their packing are not here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from guest_images import build
from guest_images.build import GuestImage, find_guest
from guest_images.errors import GuestFileError, ModuleMissingError
from guest_images.modules import BALLOON, MMIO, PCI, Module
from guest_images.tree import Tree
from tests.cpio_reader import read_all
from tests.unit.kernel_files import installed, module, vmlinux, vmlinuz, write

LISTING = "lib/modules/6.99/modules.builtin"


@pytest.fixture(autouse=True)
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that the guest loads, in order."""
    names: list[str] = []

    def initramfs(_: Tree, modules: Sequence[Module]) -> Path:
        names[:] = [one.name for one in modules]
        (tmp_path / "base.cpio").write_bytes(b"")
        return tmp_path / "base.cpio"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "userland_tree", lambda _suite, **_: Tree(tmp_path, ()))
    monkeypatch.setattr(build, "initramfs", initramfs)
    return names


def test_a_kernel_with_its_modules(tmp_path: Path, loaded: list[str]) -> None:
    folder = write(tmp_path / "given", {"vmlinuz": vmlinuz("6.99"), **installed("6.99")})
    image = find_guest(str(folder), optional=(BALLOON, PCI, MMIO))
    assert (image.suite, image.kernel_version, image.pvh, image.lacks) == ("own", "6.99", True, (MMIO,))
    assert loaded == [BALLOON]


def test_a_kernel_without_the_balloons_driver_where_that_is_a_result(
    tmp_path: Path, loaded: list[str]
) -> None:
    files = {"vmlinuz": vmlinuz("6.99"), LISTING: installed("6.99")[LISTING]}
    folder = write(tmp_path / "given", files)
    assert find_guest(str(folder), optional=(BALLOON,)).lacks == (BALLOON,)
    assert loaded == []
    with pytest.raises(ModuleMissingError, match="no module virtio_balloon"):
        find_guest(str(folder))


def test_an_image_by_itself_has_all_built_in(tmp_path: Path, loaded: list[str]) -> None:
    write(tmp_path, {"vmlinux": vmlinux("6.99")})
    image = find_guest(str(tmp_path / "vmlinux"))
    expected = GuestImage("own", "6.99", tmp_path / "vmlinux", tmp_path / "base.cpio", pvh=True)
    assert image == expected
    assert loaded == []


def test_what_loose_modules_need_and_do_not_bring_is_built_in(tmp_path: Path, loaded: list[str]) -> None:
    balloon = module("virtio_balloon", depends="virtio,virtio_ring")
    write(tmp_path, {"bzImage": vmlinuz("6.99"), "virtio_balloon.ko": balloon})
    assert find_guest(str(tmp_path / "bzImage"), optional=(BALLOON, PCI)).lacks == ()
    assert loaded == [BALLOON]


def test_files_go_behind_the_image(tmp_path: Path) -> None:
    write(tmp_path, {"vmlinux": vmlinux("6.99"), "tool": "text"})
    image = find_guest(str(tmp_path / "vmlinux"), files={"/opt/tool": str(tmp_path / "tool")})
    found = read_all(image.initrd.read_bytes())
    assert {name: one.data for name, one in found.items()} == {"opt": b"", "opt/tool": b"text"}
    with pytest.raises(GuestFileError, match="gone"):
        find_guest(str(tmp_path / "vmlinux"), files={"/opt/tool": str(tmp_path / "gone")})
