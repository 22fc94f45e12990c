"""Every figure that a run has, declared once: its name, its unit, what it says, and which way is better.

Budgets, tables, reports, comparisons and the documentation follow from this list. Pure; runner.py takes the figures.
A figure of one phase is called PHASE.NAME, such as return.footprint_gib_minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from balloonlab.errors import UsageError
from balloonlab.measure.scenario_table import did_you_mean
from balloonlab.sizes import human

Unit: TypeAlias = Literal["bytes", "seconds", "GiB min", "count"]
Better: TypeAlias = Literal["less", "more", "neither"]

# A block that page reporting reports on x86, pageblock_order. A block or two more are kept or given back from run to run.
BLOCK_BYTES = 2 << 20
_NOISE_BYTES = 2 * BLOCK_BYTES
# The most that two runs of one guest were apart, in tests/unit/recorded/measure (quiet and busy machines, TCG), and a half
# more: memory 4.1 MiB, what a guest has in use and so what is in excess of it 10 MiB, a boot 10.5 s, a t90 a pass of page
# reporting and what it took, 2.4 s.
_APART_BYTES = 3 * BLOCK_BYTES
_HELD_APART_BYTES = 8 * BLOCK_BYTES
_BOOT_APART_SECONDS = 15.0
_PASS_APART_SECONDS = 3.5


@dataclass(frozen=True)
class Figure:
    """One figure. noise: a difference that says nothing, in its unit, whatever statistics make of it.

    apart: what two single runs must be apart before that says anything. None: two runs of one guest may be apart by as much
    as it happens to be, as times and counts are on a busy machine.
    """

    name: str
    unit: Unit
    better: Better
    noise: float
    meaning: str
    apart: float | None = None


FIGURES: tuple[Figure, ...] = (
    Figure("boot_seconds", "seconds", "less", 0.1, "from the start of QEMU, and of our device, to the agent in user space", _BOOT_APART_SECONDS),
    Figure("boot_resident_bytes", "bytes", "less", _NOISE_BYTES, "held by the host when user space answers", _APART_BYTES),
    Figure("floor_bytes", "bytes", "less", _NOISE_BYTES, "held once the booted guest has settled: end of the first idle phase", _APART_BYTES),
    Figure("peak_bytes", "bytes", "less", _NOISE_BYTES, "the most that the host held", _APART_BYTES),
    Figure("residual_bytes", "bytes", "less", _NOISE_BYTES, "held at the end of the last phase", _APART_BYTES),
    Figure("guest_held_bytes", "bytes", "less", _NOISE_BYTES, "what of the residual the guest itself has in use: memory less MemFree at the end", _HELD_APART_BYTES),
    Figure("excess_bytes", "bytes", "less", _NOISE_BYTES, "residual less what the guest has in use: free in the guest, still held by the host", _HELD_APART_BYTES),
    Figure("returned_bytes", "bytes", "more", _NOISE_BYTES, "footprint before the last free phase less that at its end", _APART_BYTES),
    Figure("t50_seconds", "seconds", "less", 0.25, "from the last free until half of what came back was back", _PASS_APART_SECONDS),
    Figure("t90_seconds", "seconds", "less", 2.1, "from the last free until nine tenths of what came back were back", _PASS_APART_SECONDS),
    Figure("footprint_gib_minutes", "GiB min", "less", 0.001, "the host's footprint over time, all phases"),
    Figure("reports", "count", "neither", 0, "reports that our device answered"),
    Figure("released_bytes", "bytes", "neither", _NOISE_BYTES, "given back by our device, the same page as often as it was"),
    Figure("refault_bytes", "bytes", "less", _NOISE_BYTES, "released by our device and touched again within ten seconds"),
    Figure("release_p50_seconds", "seconds", "less", 0.001, "from taking a report to its answer: half of the reports took less"),
    Figure("release_p99_seconds", "seconds", "less", 0.001, "from taking a report to its answer: 99 of 100 took less"),
    Figure("release_most_seconds", "seconds", "less", 0.005, "from taking a report to its answer: the longest"),
    Figure("device_cpu_seconds", "seconds", "less", 0.05, "CPU time of our device, all its processes"),
    Figure("qemu_cpu_seconds", "seconds", "less", 0.2, "CPU time of QEMU, the guest's included"),
    Figure("qemu_anonymous_bytes", "bytes", "less", _NOISE_BYTES, "RssAnon of QEMU at the end: not guest RAM", _APART_BYTES),
    Figure("device_proportional_bytes", "bytes", "less", _NOISE_BYTES, "PSS of our device at the end, what it maps of guest RAM included", _APART_BYTES),
    Figure("guest_faults", "count", "less", 500, "page faults in the guest, boot to end (pgfault)"),
    Figure("guest_major_faults", "count", "less", 10, "page faults in the guest that had to read (pgmajfault)"),
    Figure("host_faults", "count", "less", 500, "page faults of QEMU, which touching given-back memory costs"),
    Figure("command_seconds", "seconds", "less", 0.1, "the commands' own time, all run phases together"),
    Figure("command_status", "count", "neither", 0, "exit status of the last command, negative for a signal"),
)  # fmt: skip
PHASE_FIGURES: tuple[Figure, ...] = (
    Figure("seconds", "seconds", "less", 0.1, "how long the phase took"),
    Figure("footprint_gib_minutes", "GiB min", "less", 0.001, "the host's footprint over its time"),
    Figure("peak_bytes", "bytes", "less", _NOISE_BYTES, "the most that the host held in it", _APART_BYTES),
    Figure("end_bytes", "bytes", "less", _NOISE_BYTES, "held by the host at its end", _APART_BYTES),
)

_SUFFIXES = ("_bytes", "_seconds", "_gib_minutes")


def find_figure(name: str) -> Figure:
    """Return the figure of a name, which may lack its unit (residual, t90, PHASE.peak). Raises UsageError."""
    phase, _, own = name.rpartition(".")
    known = PHASE_FIGURES if phase else FIGURES
    wanted = {own, *(own + suffix for suffix in _SUFFIXES)}
    found = [figure for figure in known if figure.name in wanted]
    if len(found) != 1:
        names = [figure.name for figure in known]
        near = did_you_mean(own, [*names, *(one.removesuffix(end) for one in names for end in _SUFFIXES)])
        raise UsageError(f"there is no figure {name!r}{near or ':'} choose one of {', '.join(names)}")
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
