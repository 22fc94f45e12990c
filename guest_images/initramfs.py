"""Packs the initramfs of a guest: init, busybox, Python, the agent and the modules, in load order.

The archive is not compressed: QEMU copies it faster than an emulated guest unpacks it, and its memory is freed after
boot. Images lie in the cache under the hash of everything that went in. `guest_images.build` uses it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from guest_images import cpio
from guest_images.files import atomic_file
from guest_images.userland import userland
from qmp_glue.debian import cache_root

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from guest_images.modules import Module
    from guest_images.tree import Tree

SOURCES = Path(__file__).parent
INIT = SOURCES / "init"
MODULES_DIR = "usr/lib/modules"
MERGED = ("bin", "lib", "lib64", "sbin")
EMPTY_DIRECTORIES = ("dev", "proc", "sys", "mnt", "tmp", "run")
# An image of whole pages ends one page below the top of a microvm's RAM, any other within the last one (QEMU 11.1,
# hw/i386/x86-common.c): there its firmware has put the ACPI tables, and what is left of them is a matter of luck.
PAGE = 4096
# For the command line of a guest that somebody waits for: without its agent it ends, and does not offer a shell.
AGENT_WANTED = "guest_agent=wanted"
CONSOLE = (5, 1)  # Documentation/admin-guide/devices.txt: /dev/console, which init's own output needs


def kernel_command_line(*words: str) -> str:
    """Return the kernel's command line: the console on the serial port, a panic that ends the VM, and extra `words`.

    QEMU must run with -no-reboot: panic=-1 reboots at once. Extra words are for example "init_on_free=1" or
    "page_reporting.page_reporting_order=9" (since Linux 5.14).
    """
    # quiet: each console line costs an emulated serial port some milliseconds; warnings and worse still show.
    # oops=panic is left out: an oops in a driver is for the agent's dmesg to show.
    # Without its self-tests of ciphers a kernel boots in a sixth less of emulated CPU time, and no figure is about them.
    return " ".join(("console=ttyS0", "panic=-1", "quiet", "loglevel=4", "cryptomgr.notests", *words))


# What an image is made by and of; the modelled guests of this package are not.
IMAGE_SOURCES = (
    "agent",
    "build",
    "cpio",
    "decompress",
    "elf",
    "initramfs",
    "kernel",
    "modules",
    "tree",
    "userland",
)


def source_digest() -> str:
    """Return the hash of the sources that decide what is in an image, the agent and init among them."""
    digest = hashlib.sha256()
    for path in (*(SOURCES / f"{name}.py" for name in IMAGE_SOURCES), INIT):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def initramfs(tree: Tree, modules: Sequence[Module]) -> Path:
    """Return the image for a user space and modules, built if the cache lacks it. Raises ImageError."""
    place = cache_root() / "images" / f"{_digest(tree, modules)}.cpio"
    if not place.is_file():
        with atomic_file(place) as output:
            write_padded(members(tree, modules), output)
    return place


def write_padded(entries: Iterable[cpio.Entry], output: BinaryIO) -> None:
    """Write an archive of whole pages: the kernel skips zeroes behind the trailer (init/initramfs.c, do_reset)."""
    cpio.write(with_parents(entries), output)
    output.write(bytes(-output.tell() % PAGE))


def _digest(tree: Tree, modules: Sequence[Module]) -> str:
    digest = hashlib.sha256(f"{source_digest()} {tree.packages!r}".encode())
    for module in modules:
        digest.update(module.name.encode() + b"\0" + hashlib.sha256(module.data).digest())
    return digest.hexdigest()[:32]


def members(tree: Tree, modules: Sequence[Module]) -> list[cpio.Entry]:
    """Return the image's members without their directories."""
    order = "".join(f"{module.name}\n" for module in modules).encode()
    return [
        cpio.file("init", INIT.read_bytes(), executable=True),
        *(cpio.directory(name) for name in EMPTY_DIRECTORIES),
        cpio.character_device("dev/console", *CONSOLE),
        *(cpio.symlink(name, "usr/bin" if name == "sbin" else f"usr/{name}") for name in MERGED),
        cpio.file(f"{MODULES_DIR}/order", order),
        *(cpio.file(f"{MODULES_DIR}/{module.name}.ko", module.data) for module in modules),
        *userland(tree),
    ]


def with_parents(entries: Iterable[cpio.Entry]) -> list[cpio.Entry]:
    """Return the entries, each preceded by the directories it lies in, each directory once."""
    result: dict[str, cpio.Entry] = {}
    for entry in entries:
        parents = [str(parent) for parent in Path(entry.name).parents if str(parent) != "."]
        for parent in reversed(parents):
            result.setdefault(parent, cpio.directory(parent))
        result[entry.name] = entry
    return list(result.values())
