"""Makes a guest that is ready to boot: `build_guest` and `find_guest` are the entry points of this package.

It joins a kernel, its modules, a user space and files of one's own into a kernel image and an initramfs in the cache. It
starts nothing. Who boots guests (`balloonlab`, tests) calls it; `python -m guest_images build` is the same for a person.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec

from guest_images.files import write_atomically
from guest_images.initramfs import initramfs, source_digest
from guest_images.kernel import CLOUD, Kernel, debian_kernel, own_kernel
from guest_images.modules import LISTING, Module, ModuleTree
from guest_images.overlay import with_files
from guest_images.sources import find_kernel
from guest_images.userland import userland_tree
from qmp_glue import debian
from qmp_glue.debian import SUITES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

# The release whose user space accompanies a user's own kernel: its libraries ask for Linux 3.2 at least.
OWN_KERNEL_SUITE = "bookworm"


@dataclass(frozen=True)
class GuestImage:
    """A guest to boot: `kernel` goes to QEMU's -kernel, `initrd` to -initrd; `pvh` says how the kernel starts.

    lacks: of the drivers that it may do without, those that this kernel does not have.
    """

    suite: str
    kernel_version: str
    kernel: Path
    initrd: Path
    pvh: bool
    lacks: tuple[str, ...] = ()


class _Record(msgspec.Struct, frozen=True):
    """What a build gave, so that the next one need not ask apt (2 s) for the same."""

    sources: str
    kernel_version: str
    kernel: str
    initrd: str
    pvh: bool


def build_guest(
    suite: str, *, flavour: str = CLOUD, progress: Callable[[str], None] = lambda _line: None
) -> GuestImage:
    """Return the guest with Debian's kernel of a suite, one of `qmp_glue.debian.SUITES`, and a flavour, see kernel.py.

    What is in the cache is used; Debian's archive is asked for something newer once a day. `progress` gets a line for
    each step that takes long. Raises DebianError where packages cannot be had, and ImageError.
    """
    record = debian.cache_root() / "guests" / f"{suite}-{flavour}.json"
    known = _remembered(record, suite)
    if known is not None:
        return known
    image = _join(debian_kernel(suite, flavour=flavour, progress=progress), suite, progress)
    _remember(record, image)
    return image


def build_own_guest(
    kernel: Path, modules_dir: Path, *, progress: Callable[[str], None] = lambda _line: None
) -> GuestImage:
    """Return a guest with a user's kernel (bzImage or vmlinux) and its lib/modules/VERSION directory.

    Raises ModuleMissingError where the kernel lacks a needed module, KernelError, ElfError, DebianError.
    """
    kernel_found = own_kernel(kernel, modules_dir, progress=progress)
    return _join(kernel_found, OWN_KERNEL_SUITE, progress)


def find_guest(
    kernel: str,
    *,
    flavour: str = CLOUD,
    modules: Path | None = None,
    optional: Iterable[str] = (),
    files: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[str], None] = lambda _line: None,
) -> GuestImage:
    """Return a guest with the kernel that a word names: a suite, package files, an image or a folder, see sources.py.

    flavour: of a suite's kernel. modules: of an image. optional: drivers it may lack, of modules.NEEDED. files: what else
    is put into the guest, path there -> path of a file or a folder here. Raises KernelError, ElfError,
    ModuleMissingError for a driver that is not optional, GuestFileError, DebianError.
    """
    if kernel in SUITES and modules is None:
        image = build_guest(kernel, flavour=flavour, progress=progress)
    else:
        found = find_kernel(kernel, flavour=flavour, modules=modules, progress=progress)
        image = _join(found, OWN_KERNEL_SUITE, progress, tuple(optional), strict=False)
    return replace(image, initrd=with_files(image.initrd, files)) if files else image


def _join(
    kernel: Kernel,
    suite: str,
    progress: Callable[[str], None],
    optional: tuple[str, ...] = (),
    *,
    strict: bool = True,
) -> GuestImage:
    modules, lacks = _modules(kernel, optional, strict=strict)
    tree = userland_tree(suite, progress=progress)
    progress(f"packing the initramfs for Linux {kernel.version}")
    initrd = initramfs(tree, modules)
    return GuestImage(kernel.suite, kernel.version, kernel.image, initrd, kernel.pvh, lacks)


def _modules(
    kernel: Kernel, optional: tuple[str, ...], *, strict: bool
) -> tuple[list[Module], tuple[str, ...]]:
    """Return what to load and what is lacking. strict: what is not there is lacking, though nothing lists what is built in."""
    if kernel.modules_dir is None:
        return [], ()
    listed = strict or (kernel.modules_dir / LISTING).is_file()
    modules = ModuleTree(kernel.modules_dir, assume_builtin=not listed)
    return modules.closure(optional), tuple(name for name in optional if modules.lacks(name))


def _remembered(record: Path, suite: str) -> GuestImage | None:
    """Return what the last build gave, None where it is old, of other sources, or gone."""
    try:
        fresh = time.time() - record.stat().st_mtime < debian.FRESH_SECONDS
        found = msgspec.json.decode(record.read_bytes(), type=_Record)
    except (OSError, msgspec.DecodeError):
        return None
    image = GuestImage(suite, found.kernel_version, Path(found.kernel), Path(found.initrd), found.pvh)
    there = image.kernel.is_file() and image.initrd.is_file()
    return image if fresh and there and found.sources == source_digest() else None


def _remember(record: Path, image: GuestImage) -> None:
    found = _Record(source_digest(), image.kernel_version, str(image.kernel), str(image.initrd), image.pvh)
    write_atomically(record, msgspec.json.encode(found))
