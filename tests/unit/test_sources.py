"""A kernel out of whatever a team has: each kind of word, what is found beside what, and what each mistake says."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from guest_images.errors import KernelError
from guest_images.sources import find_kernel
from tests.unit.kernel_files import (
    NO_PVH,
    PVH,
    installed,
    module,
    package,
    vmlinux,
    vmlinuz,
    write,
)

Files = Mapping[str, bytes | str]

BUILT: Files = {
    "Makefile": "",
    "modules.builtin": "",
    "modules.order": "",
    "arch/x86/boot/bzImage": vmlinuz("6.99"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/vhost-user-balloon"


@pytest.fixture
def dpkg(unmet: Callable[[str], None]) -> None:
    if shutil.which("dpkg-deb") is None:
        unmet("dpkg-deb is not on this machine")


FOLDERS: dict[str, tuple[Files, str | None]] = {
    "an unpacked package": (
        {"boot/vmlinuz-6.99": vmlinuz("6.99"), **installed("6.99")},
        "lib/modules/6.99",
    ),
    "an unpacked package of 7.x": (
        {"usr/lib/modules/6.99/vmlinuz": vmlinuz("6.99"), **installed("6.99", "usr/lib/modules")},
        "usr/lib/modules/6.99",
    ),
    "modules_install with an image": (
        {"vmlinuz": vmlinuz("6.99"), **installed("6.99"), **installed("6.98")},
        "lib/modules/6.99",
    ),
    "lib/modules/VERSION of 7.x": (
        {"kernel/a.ko": module("a"), "modules.builtin": "", "vmlinuz": vmlinuz("6.99")},
        ".",
    ),
    "a build tree": ({**BUILT, "vmlinux": vmlinux("6.99")}, "."),
    "a build tree with its vmlinux alone": (
        {"Makefile": "", "modules.builtin": "", "vmlinux": vmlinux("6.99")},
        ".",
    ),
    "the image before this one beside it": (
        {"boot/vmlinuz-6.99": vmlinuz("6.99"), "boot/vmlinuz-6.98.old": vmlinuz("6.98"), **installed("6.99")},
        "lib/modules/6.99",
    ),
    "a kernel without modules": ({"vmlinuz": vmlinuz("6.99")}, None),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder(name: str, tmp_path: Path) -> None:
    files, modules = FOLDERS[name]
    folder = write(tmp_path / "given", files)
    kernel = find_kernel(str(folder))
    assert kernel.version == "6.99"
    assert kernel.modules_dir == (None if modules is None else folder / modules)
    assert kernel.pvh


def test_an_image_of_no_version_takes_the_only_modules(tmp_path: Path) -> None:
    folder = write(tmp_path, {"vmlinux": PVH, **installed("6.99")})
    kernel = find_kernel(str(folder))
    assert (kernel.version, kernel.modules_dir) == ("6.99", folder / "lib/modules/6.99")


IMAGES: dict[str, tuple[str, Files, str | None]] = {
    "in boot": ("boot/vmlinuz-6.99", installed("6.99"), "lib/modules/6.99"),
    "in boot, beyond a merged usr": (
        "boot/vmlinuz",
        installed("6.99", "usr/lib/modules"),
        "usr/lib/modules/6.99",
    ),
    "in lib/modules": ("lib/modules/6.99/vmlinuz", installed("6.99"), "lib/modules/6.99"),
    "in a build tree": ("arch/x86/boot/bzImage", BUILT, "."),
    "beside lib/modules": ("bzImage", installed("6.99"), "lib/modules/6.99"),
    "beside loose modules": ("bzImage", {"virtio_balloon.ko": module("virtio_balloon")}, "."),
    "beside the modules of another": ("bzImage", installed("6.98"), None),
    "alone": ("bzImage", {}, None),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image(name: str, tmp_path: Path) -> None:
    place, files, modules = IMAGES[name]
    write(tmp_path / "given", {**files, place: vmlinuz("6.99")})
    kernel = find_kernel(str(tmp_path / "given" / place))
    assert (kernel.version, kernel.pvh) == ("6.99", True)
    assert kernel.modules_dir == (None if modules is None else tmp_path / "given" / modules)


@pytest.mark.parametrize("named", ["elsewhere/lib/modules/6.99", "elsewhere"])
def test_modules_that_are_named(named: str, tmp_path: Path) -> None:
    write(tmp_path, {"vmlinux": vmlinux("6.99"), **installed("6.99")})
    write(tmp_path / "elsewhere", installed("6.99"))
    kernel = find_kernel(str(tmp_path / "vmlinux"), modules=tmp_path / named)
    assert kernel.modules_dir == tmp_path / "elsewhere/lib/modules/6.99"


# --- packages ---


def split_kernel(folder: Path, version: str = "1-1") -> dict[str, Path]:
    """The packages of one kernel, as Debian makes them from 7.x on."""
    of = "7.99-cloud-amd64"
    modules = installed(of, "usr/lib/modules")
    listing = {name: data for name, data in modules.items() if "modules.builtin" in name}
    needs = (
        f"linux-base-{of} (= {version}), linux-binary-{of} (= {version}), linux-modules-{of} (= {version})"
    )
    parts: dict[str, tuple[dict[str, bytes | str], str]] = {
        "image": ({}, f"dracut | initramfs-tools, {needs}"),
        "binary": ({f"usr/lib/modules/{of}/vmlinuz": vmlinuz(of)}, f"linux-base-{of} (= {version})"),
        "modules": (
            {name: data for name, data in modules.items() if name not in listing},
            f"kmod, linux-base-{of} (= {version})",
        ),
        "base": (listing, ""),
    }
    return {
        part: package(folder, f"linux-{part}-{of}", files, version=version, depends=depends)
        for part, (files, depends) in parts.items()
    }


@pytest.mark.usefixtures("dpkg")
def test_a_package_that_is_all_of_a_kernel(tmp_path: Path, cache: Path) -> None:
    deb = package(tmp_path, "linux-image-6.99", {"boot/vmlinuz-6.99": vmlinuz("6.99"), **installed("6.99")})
    told: list[str] = []
    kernel = find_kernel(str(deb), progress=told.append)
    assert kernel.version == "6.99"
    assert kernel.modules_dir is not None
    assert kernel.modules_dir.is_relative_to(cache / "trees")
    assert (kernel.modules_dir / "kernel/drivers/virtio/virtio_balloon.ko").is_file()
    again = find_kernel(str(deb), progress=told.append)
    assert again == kernel
    assert told == [
        "unpacking linux-image-6.99_1-1_amd64.deb",
        f"unpacking the kernel image {kernel_name(told)}",
    ]


def kernel_name(told: list[str]) -> str:
    return told[1].rpartition(" ")[2]


@pytest.mark.usefixtures("dpkg")
@pytest.mark.parametrize("part", ["image", "binary", "modules", "base"])
def test_of_a_split_kernel_any_part_finds_the_others(part: str, tmp_path: Path) -> None:
    debs = split_kernel(tmp_path)
    split_kernel(tmp_path, version="1-2")
    kernel = find_kernel(str(debs[part]))
    assert kernel.version == "7.99-cloud-amd64"
    assert kernel.modules_dir is not None
    assert (kernel.modules_dir / "modules.order").is_file()
    assert (kernel.modules_dir / "modules.builtin").is_file()


@pytest.mark.usefixtures("dpkg")
def test_parts_may_lie_apart_and_be_named_together(tmp_path: Path) -> None:
    debs = split_kernel(tmp_path)
    apart = []
    for part, deb in debs.items():
        (tmp_path / part).mkdir()
        apart.append(str(deb.rename(tmp_path / part / deb.name)))
    kernel = find_kernel(",".join(apart))
    assert find_kernel(",".join(reversed(apart))) == kernel
    with pytest.raises(KernelError, match=r"put linux-base-7\.99-cloud-amd64_\*\.deb beside it, or name"):
        find_kernel(apart[1])


@pytest.mark.usefixtures("dpkg")
def test_parts_of_two_versions_are_no_kernel(tmp_path: Path) -> None:
    debs = split_kernel(tmp_path)
    newer = split_kernel(tmp_path / "newer", version="1-2")
    given = ",".join(str(deb) for deb in ({**debs, "modules": newer["modules"]}).values())
    with pytest.raises(
        KernelError, match=r"_1-1_amd64\.deb has version 1-1 and .*_1-2_amd64\.deb version 1-2"
    ):
        find_kernel(given)
    with pytest.raises(KernelError, match=r"version 1-2 and .*version 1-1: give packages of one version"):
        find_kernel(f"{debs['image']},{newer['image']}")
    debs["base"].unlink()
    newer["base"].rename(tmp_path / newer["base"].name)
    with pytest.raises(KernelError, match=r"has version 1-1 and .*linux-base-.* version 1-2"):
        find_kernel(str(debs["image"]))


@pytest.mark.usefixtures("dpkg")
def test_packages_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.deb").write_text("text")
    with pytest.raises(KernelError, match=r"text\.deb is no Debian package"):
        find_kernel(str(tmp_path / "text.deb"))
    whole = package(tmp_path, "linux-image-6.99", {"boot/vmlinuz-6.99": vmlinuz("6.99")})
    whole.write_bytes(whole.read_bytes()[:-1500])
    with pytest.raises(KernelError, match=r"linux-image-6\.99_1-1_amd64\.deb"):
        find_kernel(str(whole))
    modules = package(tmp_path, "linux-modules-6.99-generic", installed("6.99-generic"))
    with pytest.raises(KernelError, match=r"no kernel image: name the linux-image-\*\.deb"):
        find_kernel(str(modules))


# --- mistakes ---


MISTAKES: dict[str, tuple[dict[str, bytes | str], str, str | None, str]] = {
    "no such thing": ({}, "sid", None, r"no kernel .*sid: give a Debian suite \(bookworm, .*a vmlinux, or"),
    "no such package": ({}, "gone.deb", None, r"no package file .*gone\.deb: name files that are there"),
    "an empty folder": ({"empty/readme": ""}, "empty", None, r"empty has no kernel image \(boot/vmlinuz"),
    "two kernels": (
        {"both/boot/vmlinuz-6.98": vmlinuz("6.98"), "both/boot/vmlinuz-6.99": vmlinuz("6.99")},
        "both",
        None,
        r"both has 2 kernels: name one of .*vmlinuz-6\.98, .*vmlinuz-6\.99",
    ),
    "two kernels of one version": (
        {"both/boot/vmlinuz-6.99": vmlinuz("6.99"), "both/boot/vmlinuz": vmlinuz("6.99") + b"other"},
        "both",
        None,
        r"both has 2 kernels: name one of .*boot/vmlinuz, .*vmlinuz-6\.99",
    ),
    "modules of another": (
        {"other/vmlinuz": vmlinuz("6.99"), **{f"other/{k}": v for k, v in installed("6.98").items()}},
        "other",
        None,
        r"modules of Linux 6\.98, and the kernel is 6\.99: put its own",
    ),
    "named modules of another": (
        {"bzImage": vmlinuz("6.99"), **installed("6.98")},
        "bzImage",
        "lib/modules/6.98",
        r"6\.98 has the modules of Linux 6\.98, and the kernel is 6\.99",
    ),
    "named modules that are not there": (
        {"bzImage": vmlinuz("6.99")}, "bzImage", "gone", r"no folder .*gone: name lib/modules/VERSION",
    ),
    "named modules that are none": (
        {"bzImage": vmlinuz("6.99"), "text/readme": ""}, "bzImage", "text", r"no modules and no modules\.builtin",
    ),
    "neither": ({"text": "Linux"}, "text", None, "neither a bzImage nor a vmlinux"),
    "a vmlinux that QEMU cannot boot": (
        {"vmlinux": NO_PVH}, "vmlinux", None, r"no PVH entry.*give its bzImage, or build it with CONFIG_PVH=y",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_the_path_and_the_fix(name: str, tmp_path: Path) -> None:
    files, kernel, modules, message = MISTAKES[name]
    write(tmp_path, files)
    with pytest.raises(KernelError, match=message):
        find_kernel(str(tmp_path / kernel), modules=None if modules is None else tmp_path / modules)


def test_a_suite_has_its_own_modules(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="kernel of bookworm has its own modules"):
        find_kernel("bookworm", modules=tmp_path)
