"""A scenario as values: which guest, what is done to it in which order, and what it may cost.

Declarations only: scenario_file.py reads them from TOML and says what is wrong with one, runner.py carries them out.
Sizes are bytes and durations seconds here, however people wrote them.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from balloonlab.timeline import SETTLE_SECONDS
from guest_images.agent_client import FillKind

Arm: TypeAlias = Literal["ours", "qemu", "off"]
ARMS: tuple[Arm, ...] = ("ours", "qemu", "off")

# Seconds from QEMU's start to the agent's greeting: 4 to 8 s under TCG, and CI machines share their cores.
BOOT_SECONDS = 120.0
# A fill writes some 500 MB/s under TCG; on a machine that is ten times slower 8 GiB still end in time.
FILL_SECONDS = 180.0
COMMAND_SECONDS = 300.0


class GuestSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The guest. kernel: a Debian suite, or the path of a kernel package, a bzImage, a vmlinux, or a folder that has one.

    modules: lib/modules/VERSION for an image of one's own; where it is left out, next to the image, or none.
    flavour: of a Debian suite's kernel, linux-image-FLAVOUR. files: path in the guest -> path of the file on the host.
    page_reporting_order, page_reporting_delay_ms: the kernel's parameters of these names; None leaves them as they are.
    """

    kernel: str = "bookworm-backports"
    flavour: str = "cloud-amd64"
    modules: str | None = None
    memory: int = 512 << 20
    cpus: int = 1
    machine: Literal["q35", "microvm"] = "q35"
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    command_line: str = ""
    files: dict[str, str] = {}
    page_reporting_order: int | None = None
    page_reporting_delay_ms: int | None = None


class DeviceSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Our device: its options of these names. For the other arms they mean nothing."""

    discard: Literal["auto", "remove", "dontneed", "none"] = "auto"
    features: str = ""


class _Phase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="do"):
    """One phase. name: what its figures are called; the kind, with a number where it comes again, if left empty."""

    name: str = ""


class Boot(_Phase, frozen=True, kw_only=True, tag="boot"):
    """From QEMU's start to the agent's greeting. Always the first phase, and put there where a scenario has none."""

    deadline: float = BOOT_SECONDS


class Idle(_Phase, frozen=True, kw_only=True, tag="idle"):
    """Wait for the plateau: the guest has reported what it has to report and the host's footprint stays."""

    deadline: float = SETTLE_SECONDS


class Fill(_Phase, frozen=True, kw_only=True, tag="fill"):
    """Hold memory with known contents, and go on holding it for so many seconds."""

    size: int
    kind: FillKind = "anonymous"
    hold: float = 1.0
    deadline: float = FILL_SECONDS


class Churn(_Phase, frozen=True, kw_only=True, tag="churn"):
    """Fill and free size bytes again and again, rounds times, beside whatever is held."""

    size: int
    kind: FillKind = "anonymous"
    rounds: int = 3
    deadline: float = FILL_SECONDS


class Free(_Phase, frozen=True, kw_only=True, tag="free"):
    """Free all that is held, and wait for the plateau."""

    deadline: float = SETTLE_SECONDS


class DropCaches(_Phase, frozen=True, kw_only=True, tag="drop-caches"):
    """Have the guest drop its page cache, dentries and inodes, and wait for the plateau."""

    deadline: float = SETTLE_SECONDS


class Command(_Phase, frozen=True, kw_only=True, tag="run"):
    """Run a shell line in the guest. settle: wait for the plateau afterwards. status: the exit status that is right."""

    command: str
    deadline: float = COMMAND_SECONDS
    settle: bool = False
    status: int = 0


Phase: TypeAlias = Boot | Idle | Fill | Churn | Free | DropCaches | Command


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a figure may be, in the figure's own unit, both ends included. figure: its name in figures.py, or PHASE.NAME."""

    figure: str
    most: float | None = None
    least: float | None = None


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole scenario. Phase names are unique and the first phase is a Boot."""

    name: str
    guest: GuestSpec = GuestSpec()
    device: DeviceSpec = DeviceSpec()
    phases: tuple[Phase, ...] = ()
    budgets: tuple[Budget, ...] = ()
