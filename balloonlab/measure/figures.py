"""Every figure that a run has, declared once: its name, its unit, what it says, and which way is better.

Budgets, tables, reports, comparisons and the documentation follow from this list. Pure; runner.py takes the figures.
A figure of one phase is called PHASE.NAME, such as return.footprint_gib_minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from balloonlab.errors import UsageError
from balloonlab.sizes import human

Unit: TypeAlias = Literal["bytes", "seconds", "GiB min", "count"]
Better: TypeAlias = Literal["less", "more", "neither"]

# A block that page reporting reports on x86, pageblock_order: differences below it are the guest's own noise.
BLOCK_BYTES = 2 << 20


@dataclass(frozen=True)
class Figure:
    """One figure. noise: a difference that says nothing, in its unit, whatever statistics make of it."""

    name: str
    unit: Unit
    better: Better
    noise: float
    meaning: str


FIGURES: tuple[Figure, ...] = (
    Figure("boot_seconds", "seconds", "less", 0.1, "from the start of QEMU, and of our device, to the agent in user space"),
    Figure("boot_resident_bytes", "bytes", "less", BLOCK_BYTES, "held by the host when user space answers"),
    Figure("floor_bytes", "bytes", "less", BLOCK_BYTES, "held once the booted guest has settled: end of the first idle phase"),
    Figure("peak_bytes", "bytes", "less", BLOCK_BYTES, "the most that the host held"),
    Figure("residual_bytes", "bytes", "less", BLOCK_BYTES, "held at the end of the last phase"),
    Figure("guest_held_bytes", "bytes", "less", BLOCK_BYTES, "what of the residual the guest itself has in use: memory less MemFree at the end"),
    Figure("excess_bytes", "bytes", "less", BLOCK_BYTES, "residual less what the guest has in use: free in the guest, still held by the host"),
    Figure("returned_bytes", "bytes", "more", BLOCK_BYTES, "footprint before the last free phase less that at its end"),
    Figure("t50_seconds", "seconds", "less", 0.1, "from the last free until half of what came back was back"),
    Figure("t90_seconds", "seconds", "less", 0.1, "from the last free until nine tenths of what came back were back"),
    Figure("footprint_gib_minutes", "GiB min", "less", 0.001, "the host's footprint over time, all phases"),
    Figure("reports", "count", "neither", 0, "reports that our device answered"),
    Figure("released_bytes", "bytes", "neither", BLOCK_BYTES, "given back by our device, the same page as often as it was"),
    Figure("refault_bytes", "bytes", "less", BLOCK_BYTES, "released by our device and touched again within ten seconds"),
    Figure("release_p50_seconds", "seconds", "less", 0.001, "from taking a report to its answer: half of the reports took less"),
    Figure("release_p99_seconds", "seconds", "less", 0.001, "from taking a report to its answer: 99 of 100 took less"),
    Figure("release_most_seconds", "seconds", "less", 0.005, "from taking a report to its answer: the longest"),
    Figure("device_cpu_seconds", "seconds", "less", 0.05, "CPU time of our device, all its processes"),
    Figure("qemu_cpu_seconds", "seconds", "less", 0.2, "CPU time of QEMU, the guest's included"),
    Figure("qemu_anonymous_bytes", "bytes", "less", BLOCK_BYTES, "RssAnon of QEMU at the end: not guest RAM"),
    Figure("device_proportional_bytes", "bytes", "less", BLOCK_BYTES, "PSS of our device at the end, what it maps of guest RAM included"),
    Figure("guest_faults", "count", "less", 500, "page faults in the guest, boot to end (pgfault)"),
    Figure("guest_major_faults", "count", "less", 10, "page faults in the guest that had to read (pgmajfault)"),
    Figure("host_faults", "count", "less", 500, "page faults of QEMU, which touching given-back memory costs"),
    Figure("command_seconds", "seconds", "less", 0.1, "the commands' own time, all run phases together"),
    Figure("command_status", "count", "neither", 0, "exit status of the last command, negative for a signal"),
)  # fmt: skip
PHASE_FIGURES: tuple[Figure, ...] = (
    Figure("seconds", "seconds", "less", 0.1, "how long the phase took"),
    Figure("footprint_gib_minutes", "GiB min", "less", 0.001, "the host's footprint over its time"),
    Figure("peak_bytes", "bytes", "less", BLOCK_BYTES, "the most that the host held in it"),
    Figure("end_bytes", "bytes", "less", BLOCK_BYTES, "held by the host at its end"),
)

_SUFFIXES = ("_bytes", "_seconds", "_gib_minutes")


def find_figure(name: str) -> Figure:
    """Return the figure of a name, which may lack its unit (residual, t90, PHASE.peak). Raises UsageError."""
    phase, _, own = name.rpartition(".")
    known = PHASE_FIGURES if phase else FIGURES
    wanted = {own, *(own + suffix for suffix in _SUFFIXES)}
    found = [figure for figure in known if figure.name in wanted]
    if len(found) != 1:
        names = ", ".join(figure.name for figure in known)
        raise UsageError(f"there is no figure {name!r}: choose one of {names}")
    return found[0]


def full_name(name: str) -> str:
    """Return a figure's name with its phase, as results have it. Raises UsageError."""
    phase, dot, _ = name.rpartition(".")
    return f"{phase}{dot}{find_figure(name).name}"


def show(figure: Figure, value: float | None) -> str:
    """Return a value as people read it; what was not measured is a dash."""
    if value is None:
        return "-"
    match figure.unit:
        case "bytes":
            return human(value)
        case "seconds":
            return f"{value * 1000:.1f} ms" if abs(value) < 0.1 else f"{value:.2f} s"
        case "GiB min":
            return f"{value:.3f} GiB min"
        case "count":
            return f"{value:,.0f}"
