"""The picture of a measurement: what the host held over time, arm over arm, every run, with the phases. PNG only.

Runs are laid over each other where they free, for no two guests boot equally fast; the axis is the first run's time.
matplotlib costs half a second to import, so this module is imported when there is something to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import balloonlab.plot  # noqa: F401  (sets matplotlib's backend and where its cache is)
from balloonlab.measure import words
from balloonlab.measure.evidence import Evidence
from balloonlab.measure.report import Report
from balloonlab.measure.scenario import Arm
from balloonlab.printable import printable
from balloonlab.timeline import Sample

_MEBIBYTE = 1 << 20
# What there is room for.
_NAME_CHARACTERS = 20
_TITLE_CHARACTERS = 140
_COLOURS: dict[Arm, str] = {"ours": "#0b6e4f", "qemu": "#c1440e", "off": "#6c757d"}
# The two that give memory back lie on each other where both do well: one is dashed, over the other.
_STYLES: dict[Arm, tuple[int, tuple[float, float]]] = {"qemu": (0, (4, 1.5))}
_LAYERS: dict[Arm, float] = {"off": 2.0, "ours": 2.2, "qemu": 2.4}


def timeline_png(report: Report, evidence: Sequence[Evidence]) -> bytes:
    """Return the picture as a PNG."""
    file = BytesIO()
    make_figure(report, evidence).savefig(file, format="png")
    return file.getvalue()


def make_figure(report: Report, evidence: Sequence[Evidence]) -> Figure:
    """Draw the footprint of every run that counts and has samples, the first one of each arm bold, and what its guest uses.

    The first run is the first that was measured to its end, if there is one.
    """
    drawn = sorted(
        (of for of in evidence if of.samples and of.run.counted), key=lambda of: of.run.ending != "measured"
    )
    figure = Figure(figsize=(11, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if drawn:
        _draw_runs(axes, drawn, report.scenario.guest.memory)
        _draw_phases(axes, drawn[0])
        figure.legend(loc="outside lower center", ncols=5, frameon=False)
    _label(axes, report)
    return figure


def _draw_runs(axes: Axes, drawn: Sequence[Evidence], memory: int) -> None:
    """In the order of the legend; what lies on top of what is said by each."""
    named: set[Arm] = set()
    for of in drawn:
        _draw_run(axes, of, bold=of.run.arm not in named, shift=shift(of, drawn[0]))
        named.add(of.run.arm)
    _draw_guest(axes, drawn[0].samples, memory)
    early = [of for of in drawn if of.run.ending != "measured"]
    if early:
        ends = [
            (of.samples[-1].seconds + shift(of, drawn[0]), of.samples[-1].footprint_bytes) for of in early
        ]
        heights = [footprint / _MEBIBYTE for _, footprint in ends]
        axes.plot(
            [x for x, _ in ends], heights, "x", color="#b00020", zorder=5, label="ended before its time"
        )


def shift(of: Evidence, first: Evidence) -> float:
    """Return by how many seconds a run is moved, for its last free phase to begin when the first run's does.

    Where one of the two had none, for their guests to be up together; where one was never up, not at all.
    """
    for of_one, of_other in zip(_moments(of), _moments(first), strict=True):
        if of_one is not None and of_other is not None:
            return of_other - of_one
    return 0.0


def _moments(of: Evidence) -> tuple[float | None, float | None]:
    """When a run freed last and when its guest was up, as far as it came."""
    frees = [phase.begin for phase in of.run.phases if phase.do == "free"]
    booted = [phase.begin for phase in of.run.phases[1:]]
    return frees[-1] if frees else None, booted[0] if booted else None


def _draw_run(axes: Axes, of: Evidence, *, bold: bool, shift: float) -> None:
    axes.plot(
        [sample.seconds + shift for sample in of.samples],
        [sample.footprint_bytes / _MEBIBYTE for sample in of.samples],
        color=_COLOURS[of.run.arm],
        linestyle=_STYLES.get(of.run.arm, "solid") if bold else "solid",
        linewidth=2.2 if bold else 0.8,
        alpha=1.0 if bold else 0.45,
        zorder=_LAYERS[of.run.arm] + bold,
        label=f"{words.ARM_NAMES[of.run.arm]}" if bold else None,
    )


def _draw_guest(axes: Axes, samples: Sequence[Sample], memory: int) -> None:
    looked = [sample for sample in samples if sample.guest_memfree_bytes is not None]
    axes.plot(
        [sample.seconds for sample in looked],
        [(memory - (sample.guest_memfree_bytes or 0)) / _MEBIBYTE for sample in looked],
        color="#3d5a80",
        linewidth=1.2,
        linestyle="--",
        label="not free in the first run's guest",
    )


def _draw_phases(axes: Axes, first: Evidence) -> None:
    """Each phase's name at its beginning, above the lines; every other one is lower where they are close."""
    for number, phase in enumerate(first.run.phases):
        axes.axvline(phase.begin, color="black", linewidth=0.6, alpha=0.35)
        axes.annotate(
            printable(phase.name, _NAME_CHARACTERS),
            (phase.begin, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(3, -10 - 11 * (number % 2)),
            textcoords="offset points",
            fontsize=8,
            parse_math=False,
            color="#444444",
        )


def _label(axes: Axes, report: Report) -> None:
    axes.set_title(
        f"What the host holds of guest RAM\n{printable(words.subject(report), _TITLE_CHARACTERS)}",
        loc="left",
        fontsize=10,
        parse_math=False,
    )
    axes.set_xlabel(
        "seconds since QEMU's start, of the first run; the others are shifted so that all free together"
    )
    axes.set_ylabel("MiB")
    axes.margins(x=0.01)
    axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.12)
    axes.grid(visible=True, alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
