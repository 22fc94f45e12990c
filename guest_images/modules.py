"""Finds a kernel's modules and the order in which to load them.

It reads each needed module's own `.modinfo` (depends, softdep pre) rather than `modules.dep`, which Debian makes at
installation and an unpacked package does not have. It loads nothing: the guest's init does, in the order given.
`guest_images.initramfs` uses it.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guest_images.decompress import zstd
from guest_images.elf import ModuleInfo, module_info
from guest_images.errors import ElfError, ModuleMissingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

# What a guest of ours needs, in the order of loading: a bus, that of a microvm or any other machine's, the agent's serial
# port, and the balloon itself.
BALLOON = "virtio_balloon"
MMIO, PCI = "virtio_mmio", "virtio_pci"
NEEDED = (MMIO, PCI, "virtio_console", BALLOON)
# Which a kernel may do without on any machine but a microvm.
OPTIONAL = (MMIO,)
# Written by the kernel's build at the top of its tree, and installed with the modules (Documentation/kbuild/kbuild.rst).
LISTING = "modules.builtin"
ORDER = "modules.order"
SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


@dataclass(frozen=True)
class Module:
    """A module ready to load: its name and its uncompressed bytes, signature included."""

    name: str
    data: bytes


def load_order(
    wanted: Iterable[str],
    info: Callable[[str], ModuleInfo | None],
    builtin: Callable[[str], bool],
) -> tuple[str, ...]:
    """Return the modules to load, each once and after everything it needs; built-in ones are left out.

    `info` knows the modules that exist, None for others. A soft dependency that does not exist is skipped, as modprobe
    does. Raises ModuleMissingError for a wanted or depended-on module that does not exist, and for a circle.
    """
    order: dict[str, None] = {}
    for name in wanted:
        _visit(name, (), order, info, builtin)
    return tuple(order)


def _visit(
    name: str,
    above: tuple[str, ...],
    order: dict[str, None],
    info: Callable[[str], ModuleInfo | None],
    builtin: Callable[[str], bool],
) -> None:
    if name in order or builtin(name):
        return
    if name in above:
        circle = " -> ".join((*above[above.index(name) :], name))
        raise ModuleMissingError(
            f"kernel modules need each other in a circle: {circle}: take another kernel package"
        )
    found = info(name)
    if found is None:
        raise ModuleMissingError(_missing(name, above))
    soft = [word for word in found.softdep_pre if info(word) is not None]
    for needed in (*soft, *found.depends):
        _visit(needed, (*above, name), order, info, builtin)
    order[name] = None


def _missing(name: str, above: tuple[str, ...]) -> str:
    reason = f" (needed by {above[-1]})" if above else ""
    return (
        f"this kernel has no module {name}{reason}, and it is not built in: take a kernel with "
        f"CONFIG_{name.upper()}=y or =m and its modules directory, such as Debian's linux-image-cloud-amd64"
    )


class ModuleTree:
    """The modules of one kernel, below `directory`: lib/modules/VERSION, or the top of a tree in which it was built."""

    def __init__(self, directory: Path, *, assume_builtin: bool = False) -> None:
        """assume_builtin: what is not there is built in, for a directory without modules.builtin to tell."""
        self.directory = directory
        self._paths = {_stem(path): path for path in _files(directory)}
        self._builtin = _builtin_names(directory)
        self._assume_builtin = assume_builtin
        self._modules: dict[str, tuple[Module, ModuleInfo]] = {}

    def info(self, name: str) -> ModuleInfo | None:
        """Return what a module says of itself, None where there is no such module. Raises ElfError."""
        return self._load(name)[1] if name in self._paths else None

    def builtin(self, name: str) -> bool:
        """Return whether a module is part of the kernel image."""
        return name in self._builtin or (self._assume_builtin and name not in self._paths)

    def lacks(self, name: str) -> bool:
        """Return whether a kernel has no such driver at all."""
        return name not in self._paths and not self.builtin(name)

    def closure(self, optional: Iterable[str] = OPTIONAL) -> list[Module]:
        """Return the modules to load, in order: those a guest needs, but of the optional ones those there are.

        Raises ModuleMissingError and ElfError.
        """
        may_lack = {*OPTIONAL, *optional}
        names = [name for name in NEEDED if name not in may_lack or not self.lacks(name)]
        return [self._load(name)[0] for name in load_order(names, self.info, self.builtin)]

    def _load(self, name: str) -> tuple[Module, ModuleInfo]:
        if name not in self._modules:
            data = read_module(self._paths[name])
            self._modules[name] = Module(name, data), module_info(io.BytesIO(data), str(self._paths[name]))
        return self._modules[name]


def _files(directory: Path) -> list[Path]:
    """Return the module files. A tree in which a kernel was built has ten times as many others, and lists them."""
    order = directory / ORDER
    if (directory / "Makefile").is_file() and order.is_file():
        # Objects are listed since Linux 6.3, modules before (scripts/Makefile.build, cmd_modules_order).
        places = [(directory / line).with_suffix(".ko") for line in order.read_text().split()]
        return [place for place in places if place.is_file()]
    return [path for path in directory.rglob("*.ko*") if path.name.endswith(SUFFIXES)]


def _stem(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _builtin_names(directory: Path) -> frozenset[str]:
    listing = directory / LISTING
    if not listing.is_file():
        return frozenset()
    return frozenset(_stem(directory / line) for line in listing.read_text().split())


def read_module(path: Path) -> bytes:
    """Return a module's uncompressed bytes. Raises ElfError where it is damaged."""
    data = path.read_bytes()
    try:
        if path.name.endswith(".xz"):
            return lzma.decompress(data)
        if path.name.endswith(".gz"):
            return gzip.decompress(data)
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ElfError(f"{path} is damaged ({error}): unpack its package again") from error
    return zstd(data) if path.name.endswith(".zst") else data
