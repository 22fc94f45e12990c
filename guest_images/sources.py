"""Finds a kernel in what a kernel team has: a package file, an image, a folder, or a tree in which it was built.

It knows where images and modules lie in each, and which modules are an image's own. It builds nothing and boots nothing:
`guest_images.kernel` makes of an image what QEMU boots. `guest_images.build` uses it.

A word for a kernel is one of these:

    bookworm-backports                   a Debian suite, whose kernel is fetched
    linux-image-6.12.95_amd64.deb        package files, joined by commas; those that belong to one are found beside it
    arch/x86/boot/bzImage, vmlinux       an image; its modules are found beside it, and without any all must be built in
    unpacked/, installed/, linux/        a folder: an unpacked package, INSTALL_MOD_PATH with an image in it, a build tree
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from guest_images.errors import KernelError
from guest_images.kernel import CLOUD, ELF_MAGIC, Kernel, debian_kernel, image_version, own_kernel, read_image
from guest_images.modules import LISTING, ORDER, SUFFIXES
from guest_images.package_files import SUFFIX, unpacked
from qmp_glue.debian import SUITES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Where a build leaves its image, from the top of its tree (arch/x86/Makefile; x86_64 is a link to the same).
BUILT = ("arch/x86/boot/bzImage", "arch/x86_64/boot/bzImage")
# Images in a folder, the first kind that there is: what was just built, what packages install, what lies there by itself.
IMAGES = (
    BUILT,
    ("boot/vmlinuz-*", "boot/vmlinuz", "lib/modules/*/vmlinuz", "usr/lib/modules/*/vmlinuz"),
    ("vmlinuz-*", "vmlinuz", "bzImage"),
    ("boot/vmlinux-*", "vmlinux-*", "vmlinux"),
)
# What installkernel calls the image before the last.
OLD = ".old"
MODULE_ROOTS = ("lib/modules", "usr/lib/modules")


def find_kernel(
    kernel: str,
    *,
    flavour: str = CLOUD,
    modules: Path | None = None,
    progress: Callable[[str], None] = lambda _line: None,
) -> Kernel:
    """Return the kernel that a word names, see above. flavour: of a suite's. modules: of an image or a folder.

    Raises KernelError, ElfError; AptMissingError for package files without dpkg-deb; DebianError for a suite.
    """
    if kernel in SUITES:
        if modules is not None:
            raise KernelError(f"the kernel of {kernel} has its own modules: leave {modules} out")
        return debian_kernel(kernel, flavour=flavour, progress=progress)
    image, found = _find(kernel, modules, progress)
    made = own_kernel(image, found, progress=progress)
    if not made.pvh and _is_elf(image):
        raise KernelError(
            f"{image} has no PVH entry, so QEMU cannot boot it: give its bzImage, or build it with CONFIG_PVH=y"
        )
    return made


def _find(kernel: str, modules: Path | None, progress: Callable[[str], None]) -> tuple[Path, Path | None]:
    """Return image and modules."""
    path = Path(kernel).expanduser()
    if path.is_dir():
        return _in_folder(path, modules)
    words = [path] if path.exists() else [Path(word).expanduser() for word in kernel.split(",")]
    if any(word.suffix == SUFFIX for word in words):
        return _in_packages(words, modules, progress)
    if not path.exists():
        raise KernelError(
            f"there is no kernel {kernel}: give a Debian suite ({', '.join(SUITES)}), or the path of a kernel package, "
            "a bzImage, a vmlinux, or a folder that has one"
        )
    version = image_version(read_image(path))
    return path, _given(modules, version) if modules is not None else _beside(path, version)


def _is_elf(image: Path) -> bool:
    with image.open("rb") as file:
        return file.read(len(ELF_MAGIC)) == ELF_MAGIC


def _in_packages(
    paths: list[Path], modules: Path | None, progress: Callable[[str], None]
) -> tuple[Path, Path | None]:
    for path in paths:
        if not path.is_file():
            raise KernelError(f"there is no package file {path}: name files that are there, joined by commas")
    try:
        return _in_folder(unpacked(paths, progress=progress), modules)
    except _NoImageError as error:
        raise KernelError(
            f"{paths[0]} has no kernel image: name the linux-image-*.deb of the same version"
        ) from error


class _NoImageError(KernelError):
    """A folder has no image."""


def _in_folder(folder: Path, modules: Path | None) -> tuple[Path, Path | None]:
    image, version = _one_image(folder)
    if modules is not None:
        return image, _given(modules, version)
    return image, _modules_in(folder, version) or _beside(image, version)


def _one_image(folder: Path) -> tuple[Path, str | None]:
    """Return an image of the one kernel in a folder, of which it may have several, and its version."""
    for patterns in IMAGES:
        places = [place for pattern in patterns for place in sorted(folder.glob(pattern))]
        images = [place for place in places if place.is_file() and not place.name.endswith(OLD)]
        found = {_identity(image): image for image in reversed(images)}
        if len(found) > 1:
            names = ", ".join(str(image) for image in sorted(found.values()))
            raise KernelError(f"{folder} has {len(found)} kernels: name one of {names}")
        if found:
            (version, _), image = next(iter(found.items()))
            return image, version
    raise _NoImageError(
        f"{folder} has no kernel image (boot/vmlinuz-VERSION, lib/modules/VERSION/vmlinuz, vmlinuz, bzImage, vmlinux, "
        f"{BUILT[0]}): name the folder that has one, or the image itself"
    )


def _identity(image: Path) -> tuple[str | None, bytes]:
    """Return an image's version and a hash of it: two builds of one version are two kernels."""
    data = read_image(image)
    return image_version(data), hashlib.sha256(data).digest()


def _given(modules: Path, version: str | None) -> Path:
    """Return the modules that somebody named, as lib/modules/VERSION or as what holds that."""
    if not modules.is_dir():
        raise KernelError(f"there is no folder {modules}: name lib/modules/VERSION of the kernel")
    found = _modules_in(modules, version)
    if found is None:
        raise KernelError(
            f"{modules} has no modules and no {LISTING}: name lib/modules/VERSION of the kernel, or none"
        )
    return found


def _modules_in(folder: Path, version: str | None) -> Path | None:
    """Return the modules in a folder that are of a version, None if it has no modules. Raises KernelError."""
    if _holds_modules(folder):
        return _of_version(folder, version)
    roots = (folder / root for root in MODULE_ROOTS)
    found = {place.name: place for root in roots for place in sorted(root.glob("*")) if _holds_modules(place)}
    if version is None and len(found) == 1:
        return next(iter(found.values()))
    if found and version not in found:
        raise KernelError(
            f"{folder} has the modules of Linux {', '.join(found)}, and the kernel is {version or 'of no known version'}: "
            "put its own beside it (make modules_install), or name them"
        )
    return found.get(version or "")


def _of_version(folder: Path, version: str | None) -> Path:
    """A folder that is called by another version has modules that this kernel refuses to load."""
    if folder.parent.name == "modules" and version not in (None, folder.name):
        raise KernelError(
            f"{folder} has the modules of Linux {folder.name}, and the kernel is {version}: name those of that version"
        )
    return folder


def _beside(image: Path, version: str | None) -> Path | None:
    """Return the modules beside an image by itself, if there are any that are its own."""
    for folder in _around(image):
        places = [folder / root / version for root in MODULE_ROOTS] if version else []
        for place in (*places, folder):
            if _holds_modules(place):
                return _of_version(place, version)
    return None


def _around(image: Path) -> Iterator[Path]:
    """Where to look for an image's modules: its folder; above boot/; the top of the tree in which it was built."""
    folder = image.absolute().parent
    yield folder
    if folder.name == "boot":
        yield folder.parent
    if any(image.absolute().match(place) for place in BUILT):
        yield folder.parents[2]


def _holds_modules(folder: Path) -> bool:
    """Modules spread over a tree are listed at its top, whether it was built or installed."""
    if (folder / LISTING).is_file() or (folder / ORDER).is_file():
        return True
    return any(path.name.endswith(SUFFIXES) for path in folder.glob("*.ko*"))
