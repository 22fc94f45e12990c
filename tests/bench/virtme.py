"""What virtme-ng needs to boot a Debian kernel on a machine that has none of it, in a folder that is gone afterwards.

virtme-ng itself is the user's. QEMU is the one that our guests run on; virtiofsd, kmod and busybox are Debian's, unpacked
into the cache and run there. Used by boot_time.py.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from guest_images.kernel import Kernel, debian_kernel
from guest_images.tree import package_tree
from qmp_glue.find import accelerator, find_qemu

# Suite and program of each; virtiofsd is a package of its own since trixie.
TOOLS = {
    "virtiofsd": ("trixie", "virtiofsd", "usr/libexec/virtiofsd"),
    "modprobe": ("bookworm", "kmod", "usr/bin/kmod"),
    "depmod": ("bookworm", "kmod", "usr/bin/kmod"),
}
# Goes into virtme-ng's initramfs, so it has to be the static program itself.
BUSYBOX = ("bookworm", "busybox-static", "usr/bin/busybox")
# Without udev in the root that the guest shares, virtme-ng's ports have no names, its command no output and vng no exit
# status; the ports themselves are there. With udev this changes nothing.
WITHOUT_UDEV = """if [ -e /dev/virtio-ports/virtme.ret ]; then
    {command}
else
    said=$({{ {command}
}} 2>&1); status=$?
    for port in /sys/class/virtio-ports/*; do
        case $(cat $port/name) in
        virtme.stdout) echo "$said" >/dev/${{port##*/}} ;;
        virtme.ret) echo $status >/dev/${{port##*/}} ;;
        esac
    done
fi"""
# depmod reads each of some thousand modules.
DEPMOD_SECONDS = 120.0


@dataclass(frozen=True)
class Virtme:
    """virtme-ng, ready to run: its program, an environment that has its tools, and the kernel as it wants it."""

    program: Path
    environment: Mapping[str, str]
    image: Path

    def argv(self, command: str, *, memory: str) -> list[str]:
        """Return the command line that boots, runs a shell line and ends, with its output and exit status."""
        words = [str(self.program), "--run", str(self.image), "--memory", memory, "--cpus", "1"]
        words += ["--disable-kvm"] if accelerator() == "tcg" else []
        return [*words, "--", WITHOUT_UDEV.format(command=command)]


def prepare(program: Path, suite: str, folder: Path) -> Virtme:
    """Make everything ready in an empty folder of the cache's file system. Raises DebianError, QemuNotFoundError, OSError."""
    tools = folder / "bin"
    tools.mkdir()
    qemu = find_qemu()
    settings = [f"{name}={value}" for name, value in qemu.env.items()]
    _write_script(tools / "qemu-system-x86_64", ["env", *settings, *qemu.argv])
    for name, (release, package, path) in TOOLS.items():
        # kmod is what it is called.
        *loader, tool = package_tree(release, [package]).command(path)
        _write_script(tools / name, [*loader, "--argv0", name, tool])
    release, package, path = BUSYBOX
    (tools / "busybox").symlink_to(package_tree(release, [package]).root / path)
    places = [str(tools), str(program.parent), os.environ.get("PATH", os.defpath)]
    environment = {**os.environ, "PATH": os.pathsep.join(places)}
    return Virtme(program, environment, _kernel(debian_kernel(suite), folder / "kernel", tools / "depmod"))


def _write_script(path: Path, argv: list[str]) -> None:
    path.write_text(f'#!/bin/sh\nexec {shlex.join(argv)} "$@"\n')
    path.chmod(0o755)


def _kernel(kernel: Kernel, folder: Path, depmod: Path) -> Path:
    """Copy an unpacked kernel by hard links, with the list of modules that only an installation makes."""
    assert kernel.modules_dir is not None
    root = kernel.modules_dir.parents[3]
    shutil.copytree(root, folder, copy_function=os.link, symlinks=True)
    subprocess.run([depmod, "-b", folder, kernel.version], check=True, timeout=DEPMOD_SECONDS)
    boot = folder / "boot" / f"vmlinuz-{kernel.version}"
    return boot if boot.is_file() else folder / "usr/lib/modules" / kernel.version / "vmlinuz"
