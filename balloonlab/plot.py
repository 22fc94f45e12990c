"""Pictures of runs: footprint and guest memory over time, with the phases. PNG only; nothing is shown on a screen.

matplotlib costs half a second to import, so this module is imported when there is something to draw.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from balloonlab.timeline import Sample
from qmp_glue.debian import cache_root

# Its font cache belongs into ours: a run leaves nothing elsewhere.
os.environ.setdefault("MPLCONFIGDIR", str(cache_root() / "matplotlib"))

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_MEBIBYTE = 1 << 20
# The control runs lie on top of each other where they show what they are to show: one of them is dotted.
_STYLES = {"none": (0, (1, 1.5))}
_COLOURS = {"auto": "#0b6e4f", "remove": "#0b6e4f", "dontneed": "#c1440e", "none": "#6c757d"}


def draw_timeline(runs: Mapping[str, Sequence[Sample]], path: Path, *, title: str, memory_bytes: int) -> None:
    """Draw the footprint of each run, by its discard method, and what the guest of the first one uses.

    Times are the first run's; the others are shifted so that all free at the same moment.
    """
    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    first = next(iter(runs.values()))
    for discard, samples in runs.items():
        _draw_footprint(axes, discard, samples, _return(first) - _return(samples))
    _draw_guest(axes, first, memory_bytes)
    _draw_phases(axes, first)
    axes.set_title(title, loc="left")
    axes.set_xlabel("seconds since QEMU's start")
    axes.set_ylabel("MiB")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(path)


def _return(samples: Sequence[Sample]) -> float:
    """When the memory was freed: runs are laid over each other there, for no two guests boot equally fast."""
    return next((sample.seconds for sample in samples if sample.phase == "return"), 0.0)


def _draw_footprint(axes: Axes, discard: str, samples: Sequence[Sample], shift: float) -> None:
    axes.plot(
        [sample.seconds + shift for sample in samples],
        [sample.footprint_bytes / _MEBIBYTE for sample in samples],
        color=_COLOURS.get(discard, "#22577a"),
        linewidth=2,
        linestyle=_STYLES.get(discard, "solid"),
        label=f"held by the host, --discard {discard}",
    )


def _draw_guest(axes: Axes, samples: Sequence[Sample], memory_bytes: int) -> None:
    looked = [sample for sample in samples if sample.guest_memfree_bytes is not None]
    used = [(memory_bytes - (sample.guest_memfree_bytes or 0)) / _MEBIBYTE for sample in looked]
    axes.plot(
        [sample.seconds for sample in looked],
        used,
        color="#3d5a80",
        linewidth=1.2,
        linestyle="--",
        label="not free in the guest",
    )


def _draw_phases(axes: Axes, samples: Sequence[Sample]) -> None:
    begins: dict[str, float] = {}
    for sample in samples:
        if sample.phase:
            begins.setdefault(sample.phase, sample.seconds)
    if "return" in begins:
        begins.pop("free", None)  # a moment before: the two names would lie on each other
    for phase, seconds in begins.items():
        axes.axvline(seconds, color="black", linewidth=0.6, alpha=0.4)
        axes.annotate(
            "freed" if phase == "return" else phase,
            (seconds, 0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(3, 4),
            textcoords="offset points",
            fontsize=8,
            color="#555555",
        )
