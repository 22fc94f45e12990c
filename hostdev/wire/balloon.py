"""What a virtio-balloon driver and device say to each other: feature bits, config space, PFNs, statistics.

virtio 1.3, section 5.5. Layouts and numbers only; hostdev.balloon gives them meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

from construct import Int16ul, Int32ul, Int64ul, Struct

from hostdev.wire.layout import Layout, lower

VIRTIO_ID_BALLOON = 5


class Feature(IntFlag):
    """Feature bits that mean something to this device (sections 5.5.3 and 6)."""

    MUST_TELL_HOST = 1 << 0
    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    FREE_PAGE_HINT = 1 << 3
    PAGE_POISON = 1 << 4
    REPORTING = 1 << 5
    RING_INDIRECT_DESC = 1 << 28
    VERSION_1 = 1 << 32


def names(features: Feature) -> list[str]:
    """Return the names of the features in a mask."""
    return [feature.name or hex(feature) for feature in Feature if feature & features]


# MUST_TELL_HOST and DEFLATE_ON_OOM change what the guest sees, so they stay off unless asked for, as in QEMU.
# STATS_VQ, FREE_PAGE_HINT and REPORTING are offered together: then dense and fixed ring numbering agree, and Linux 6.11
# and later do not trip over a hole in the numbering when the driver is unbound. PAGE_POISON must be offered, or a guest
# that initialises or poisons freed pages drops REPORTING (virtballoon_validate, Linux 5.7).
DEFAULT_FEATURES = (
    Feature.STATS_VQ
    | Feature.FREE_PAGE_HINT
    | Feature.PAGE_POISON
    | Feature.REPORTING
    | Feature.RING_INDIRECT_DESC
    | Feature.VERSION_1
)


class Role(IntEnum):
    """What a virtqueue is for. The value is its fixed number in section 5.5.2."""

    INFLATE = 0
    DEFLATE = 1
    STATISTICS = 2
    FREE_PAGE_HINT = 3
    REPORTING = 4


QUEUE_COUNT = len(Role)


@dataclass(frozen=True, slots=True)
class Config:
    """The config space (section 5.5.4).

    num_pages: the target, actual: what the driver says it holds, both in units of 4096 bytes.
    """

    num_pages: int = 0
    actual: int = 0
    free_page_hint_cmd_id: int = 0
    poison_val: int = 0


@dataclass(frozen=True, slots=True)
class Statistic:
    """One entry of the statistics buffer: 10 bytes, packed (section 5.5.6.3)."""

    tag: int
    value: int


CONFIG = Layout(
    Struct(
        "num_pages" / Int32ul,
        "actual" / Int32ul,
        "free_page_hint_cmd_id" / Int32ul,
        "poison_val" / Int32ul,
    ),
    Config,
)
CONFIG_SIZE = lower(CONFIG.declaration).size
STATISTIC = Layout(Struct("tag" / Int16ul, "value" / Int64ul), Statistic)
STATISTIC_STRUCT = lower(STATISTIC.declaration)

# Tags 0 to 15 by QEMU's names. The text names the first ten, Linux (uapi/linux/virtio_balloon.h) the others since 6.12.
STATISTIC_NAMES = (
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
    "stat-oom-kills",
    "stat-alloc-stalls",
    "stat-async-scans",
    "stat-direct-scans",
    "stat-async-reclaims",
    "stat-direct-reclaims",
)

# What a driver writes into a readable buffer of the hinting queue: a command id (section 5.5.6.4).
COMMAND_ID_STRUCT = lower(Int32ul)

# A page frame number counts in units of 4096 bytes on every guest architecture (section 5.5.6: "PFNs are ... 4096").
PFN_SHIFT = 12
PFN_STRUCT = lower(Int32ul)
