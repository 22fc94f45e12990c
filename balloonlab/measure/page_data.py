"""What the script in the HTML report draws: every run's footprint over time, in numbers that are short to write.

Pure. page.js reads it; times are milliseconds, footprints KiB.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from balloonlab.measure import words
from balloonlab.measure.cases import arms
from balloonlab.measure.evidence import Evidence
from balloonlab.measure.report import Report
from balloonlab.printable import printable
from balloonlab.timeline import Sample

# More than a screen has columns for; a run of 60 s has 600 samples and is not thinned.
POINTS = 1600
_NAME_CHARACTERS = 40
_KIBIBYTE = 1 << 10


class DrawnPhase(msgspec.Struct, frozen=True):
    """One phase of a run."""

    name: str
    begin: int
    end: int


class DrawnRun(msgspec.Struct, frozen=True):
    """One run. times, held: its footprint; looks, used: what its guest had not free; ended: how, where early."""

    arm: str
    number: int
    ended: str
    phases: list[DrawnPhase]
    times: list[int]
    held: list[int]
    looks: list[int]
    used: list[int]


class Drawn(msgspec.Struct, frozen=True):
    """All that is drawn. arms: their names by what runs call them. align: the phase where runs are to meet, if any."""

    arms: dict[str, str]
    align: str
    runs: list[DrawnRun]


def drawn(report: Report, evidence: Sequence[Evidence]) -> Drawn:
    """Return what is drawn of the runs that count and have samples, measured ones first."""
    shown = sorted(
        (of for of in evidence if of.samples and of.run.counted), key=lambda of: of.run.ending != "measured"
    )
    names: dict[str, str] = {arm: words.ARM_NAMES[arm] for arm in arms(report)}
    frees = [_name(phase.name) for of in shown[:1] for phase in of.run.phases if phase.do == "free"]
    memory = report.scenario.guest.memory
    return Drawn(arms=names, align=["", *frees][-1], runs=[_run(of, memory) for of in shown])


def embedded(data: Drawn) -> str:
    """Return it as JSON that may stand in a <script>: nothing in it can end one, nor begin a comment."""
    return (
        msgspec.json.encode(data)
        .decode()
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
    )


def thin(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Return at most so many samples (4 at least), in order: first, last, and the least and the most of each stretch.

    So that neither a short peak nor a short dip is lost.
    """
    if len(samples) <= most:
        return list(samples)
    stretches = (most - 2) // 2
    inner = range(1, len(samples) - 1)
    kept = {0, len(samples) - 1}
    for number in range(stretches):
        stretch = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        kept.add(min(stretch, key=lambda at: samples[at].footprint_bytes))
        kept.add(max(stretch, key=lambda at: samples[at].footprint_bytes))
    return [samples[at] for at in sorted(kept)]


def _run(of: Evidence, memory: int) -> DrawnRun:
    samples = thin(of.samples, POINTS)
    looked = [(s.seconds, s.guest_memfree_bytes) for s in of.samples if s.guest_memfree_bytes is not None]
    phases = [
        DrawnPhase(_name(phase.name), _ms(phase.begin), _ms(phase.begin + phase.seconds))
        for phase in of.run.phases
    ]
    return DrawnRun(
        arm=of.run.arm,
        number=of.run.number,
        ended="" if of.run.ending == "measured" else words.ENDINGS[of.run.ending],
        phases=phases,
        times=[_ms(sample.seconds) for sample in samples],
        held=[sample.footprint_bytes // _KIBIBYTE for sample in samples],
        looks=[_ms(seconds) for seconds, _ in looked],
        used=[max(0, memory - free) // _KIBIBYTE for _, free in looked],
    )


def _name(name: str) -> str:
    return printable(name, _NAME_CHARACTERS)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
