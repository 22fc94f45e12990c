"""From options to something that can boot: QEMU found or fetched, the guest built, the accelerator chosen.

Everything here may download and takes its time, so it runs before any experiment, outside of asyncio, where Ctrl-C works
at once. Used by every command that boots a guest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from balloonlab.errors import UsageError
from balloonlab.rig import Setup
from balloonlab.sizes import human
from guest_images.build import GuestImage, build_guest, build_own_guest
from qmp_glue.debian import SUITES
from qmp_glue.find import accelerator, find_qemu

DEFAULT_SUITE = "bookworm-backports"
DEFAULT_MEMORY = "1G"
# Below this the guest's own user space and the watermarks leave nothing to report.
MIN_MEMORY = 128 << 20


@dataclass(frozen=True)
class GuestOptions:
    """What a person says of the guest to boot. Raises UsageError at once, before anything is fetched or made."""

    suite: str = DEFAULT_SUITE
    kernel: Path | None = None
    modules: Path | None = None
    memory_bytes: int = 1 << 30
    cpus: int = 1
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    append: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise UsageError(f"--cpus {self.cpus}: give one or more")
        if self.memory_bytes < MIN_MEMORY:
            raise UsageError(
                f"--memory {human(self.memory_bytes)} is too little: give the guest 128M or more"
            )
        if self.suite not in SUITES:
            raise UsageError(f"--suite {self.suite} is not known: choose one of {', '.join(SUITES)}")
        if (self.kernel is None) != (self.modules is None):
            raise UsageError(
                "--kernel and --modules go together: give the kernel's lib/modules/VERSION folder"
            )


def prepare(options: GuestOptions, *, discard: str, features: str, progress: Callable[[str], None]) -> Setup:
    """Make everything ready. Raises QemuNotFoundError, DebianError, ImageError."""
    qemu = find_qemu(progress=progress)
    return Setup(
        qemu=qemu,
        image=build_image(options, progress),
        memory_bytes=options.memory_bytes,
        accelerator=accelerator() if options.accelerator == "auto" else options.accelerator,
        cpus=options.cpus,
        discard=discard,
        features=features,
        append=options.append,
    )


def build_image(options: GuestOptions, progress: Callable[[str], None]) -> GuestImage:
    """Build the guest: Debian's kernel of a suite, or the user's own."""
    if options.kernel is None or options.modules is None:
        return build_guest(options.suite, progress=progress)
    return build_own_guest(options.kernel, options.modules, progress=progress)
