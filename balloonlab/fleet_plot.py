"""Pictures of simulations: what the host holds of all guests over time, and how the guests differ. PNG only.

Imported when there is something to draw: matplotlib costs half a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from balloonlab import plot  # noqa: F401  (puts matplotlib's cache and back end in order)
from balloonlab.fleet_timeline import FleetSample

from matplotlib.axes import Axes  # isort: skip  (after plot)
from matplotlib.figure import Figure  # isort: skip

_GIBIBYTE = 1 << 30
_MEBIBYTE = 1 << 20


def draw_fleet(samples: Sequence[FleetSample], path: Path, *, title: str) -> None:
    """Draw the sum above, the quantiles below."""
    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _draw_sum(above, samples)
    _draw_quantiles(below, samples)
    figure.suptitle(title, x=0.01, ha="left")
    below.set_xlabel("seconds of simulated time")
    for axes in (above, below):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        # Above the axes: fleets fill them to any corner.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    figure.savefig(path)


def _draw_sum(axes: Axes, samples: Sequence[FleetSample]) -> None:
    seconds = [sample.seconds for sample in samples]
    held = [sample.footprint_bytes / _GIBIBYTE for sample in samples]
    axes.plot(seconds, held, color="#0b6e4f", linewidth=2, label="held by the host, all guests")
    measured = [(s.seconds, s.resident_bytes / _GIBIBYTE) for s in samples if s.resident_bytes is not None]
    if measured:
        axes.plot(
            *zip(*measured, strict=True),
            color="#c1440e",
            linewidth=1.2,
            linestyle=":",
            label="measured on this host",
        )
    used = [sample.used_bytes / _GIBIBYTE for sample in samples]
    axes.plot(seconds, used, color="#3d5a80", linewidth=1.2, linestyle="--", label="not free in the guests")
    axes.set_ylabel("GiB")


def _draw_quantiles(axes: Axes, samples: Sequence[FleetSample]) -> None:
    seconds = [sample.seconds for sample in samples]
    spreads = [sample.spread for sample in samples]
    for bounds, alpha, label in (
        ([(one.least_bytes, one.most_bytes) for one in spreads], 0.15, "all guests"),
        ([(one.quarter_bytes, one.three_quarters_bytes) for one in spreads], 0.35, "the middle half of them"),
    ):
        low = [least / _MEBIBYTE for least, _most in bounds]
        high = [most / _MEBIBYTE for _least, most in bounds]
        axes.fill_between(seconds, low, high, color="#0b6e4f", alpha=alpha, linewidth=0, label=label)
    median = [one.median_bytes / _MEBIBYTE for one in spreads]
    axes.plot(seconds, median, color="#0b6e4f", linewidth=1.5, label="median guest")
    axes.set_ylabel("MiB held of a guest")
