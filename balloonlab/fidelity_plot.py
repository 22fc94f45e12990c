"""The picture of balloonlab fidelity: what the host holds after a free, in a real guest and as its model predicts.

Imported when there is something to draw, as plot.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from balloonlab import plot  # noqa: F401  (puts matplotlib's cache and back end in order)
from balloonlab.comparison import seconds_to
from balloonlab.recording import Recording
from balloonlab.sizes import human
from guest_images.page_reporting import Pass

from matplotlib.figure import Figure  # isort: skip  (after plot)

_MEBIBYTE = 1 << 20
# Seconds that are shown after the last pass.
_MARGIN = 2.0


def draw_fidelity(recording: Recording, modelled: Sequence[Pass], path: Path) -> None:
    """Draw real footprint, real reports and modelled reports as one fall, with the moments of 50 % and 90 %."""
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    end = max((one.time for one in (*recording.passes, *modelled)), default=0.0) + _MARGIN
    start = recording.footprint[0][1] if recording.footprint else sum(one.bytes for one in recording.passes)
    shown = [(seconds, size) for seconds, size in recording.footprint if seconds <= end]
    axes.plot(
        [seconds for seconds, _ in shown],
        [size / _MEBIBYTE for _, size in shown],
        color="#9ad1bd",
        linewidth=6,
        label="held by the host (st_blocks)",
    )
    for name, passes, colour, style in (
        ("real guest's reports", recording.passes, "#0b6e4f", "solid"),
        ("model's reports", modelled, "#c1440e", "dashed"),
    ):
        axes.step(*_fall(passes, start, end), where="post", color=colour, linestyle=style, label=name)
        for share in (0.5, 0.9):
            axes.axvline(seconds_to(passes, share), color=colour, linestyle=style, linewidth=0.6, alpha=0.6)
    axes.set_title(
        f"{human(recording.filled_bytes)} freed in a guest of {human(recording.memory_bytes)}, Linux {recording.kernel}",
        loc="left",
    )
    axes.set_xlabel("seconds since the free (thin lines: 50 % and 90 % of the fall)")
    axes.set_ylabel("MiB")
    axes.set_xlim(0, end)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path)


def _fall(passes: Sequence[Pass], start: int, end: float) -> tuple[list[float], list[float]]:
    """Return a fall as the points of a step function, in seconds and MiB."""
    times, levels, left = [0.0], [start / _MEBIBYTE], start
    for one in passes:
        left -= one.bytes
        times.append(one.time)
        levels.append(left / _MEBIBYTE)
    return [*times, end], [*levels, levels[-1]]
