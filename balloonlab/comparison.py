"""A real guest's passes and its model's, side by side, with a verdict.

Pure. fidelity.py makes the recordings that are compared here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import msgspec

from balloonlab.recording import SCHEMA, Recording
from balloonlab.sizes import human
from balloonlab.timeline import NOISE_BYTES
from guest_images.page_reporting import Pass

# How far the model may be off, in the real guest's terms; in time, one pass (a delay) is forgiven if that is more.
TOLERANCE = 0.2


class Duration(msgspec.Struct, frozen=True):
    """Seconds from the free to a share of the fall."""

    share: float
    real: float
    model: float

    @property
    def off(self) -> float:
        """How far the model is off, as a share of the real guest's."""
        return abs(self.model - self.real) / self.real


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A real guest and its model. passes: pairs of what each did, None where one had none any more.

    interval_seconds: between the real guest's passes; the model's are a delay apart. per_cpu_bytes: what the free left
    in per-CPU lists, where neither reports it. notes: what is not as it should be.
    """

    schema: int
    passed: bool
    notes: list[str]
    suite: str
    kernel: str
    memory_bytes: int
    filled_bytes: int
    fill_kind: str
    order: int
    delay: float
    real_bytes: int
    model_bytes: int
    footprint_fall_bytes: int
    per_cpu_bytes: int
    interval_seconds: float
    durations: list[Duration]
    passes: list[tuple[Pass | None, Pass | None]]


def seconds_to(passes: Sequence[Pass], share: float) -> float:
    """Seconds until so large a share of all that the passes reported was reported; 0 if there are none."""
    wanted, seen = share * sum(one.bytes for one in passes), 0
    for one in passes:
        seen += one.bytes
        if seen >= wanted:
            return one.time
    return 0.0


def compare(recording: Recording, modelled: Sequence[Pass]) -> Comparison:
    """Compare a real guest's passes with a model's."""
    real = recording.passes
    durations = [
        Duration(share, seconds_to(real, share), seconds_to(modelled, share)) for share in (0.5, 0.9)
    ]
    pairs = list(zip_longest(real, modelled))
    notes = [*_judge_passes(pairs), *_judge_durations(durations, recording.delay)]
    levels = [size for _, size in recording.footprint]
    return Comparison(
        schema=SCHEMA,
        passed=not notes,
        notes=notes,
        suite=recording.suite,
        kernel=recording.kernel,
        memory_bytes=recording.memory_bytes,
        filled_bytes=recording.filled_bytes,
        fill_kind=recording.fill_kind,
        order=recording.order,
        delay=recording.delay,
        real_bytes=sum(one.bytes for one in real),
        model_bytes=sum(one.bytes for one in modelled),
        footprint_fall_bytes=levels[0] - levels[-1] if levels else 0,
        per_cpu_bytes=recording.after.per_cpu_bytes,
        interval_seconds=(real[-1].time - real[0].time) / (len(real) - 1) if len(real) > 1 else 0.0,
        durations=durations,
        passes=pairs,
    )


def _judge_passes(pairs: Sequence[tuple[Pass | None, Pass | None]]) -> list[str]:
    if not any(real for real, _ in pairs):
        return ["the real guest reported nothing after the free: there is nothing to compare"]
    notes = []
    for number, (real, model) in enumerate(pairs, 1):
        there, said = real.bytes if real else 0, model.bytes if model else 0
        if abs(said - there) > max(TOLERANCE * there, NOISE_BYTES):
            notes.append(f"pass {number}: the model reports {human(said)}, the real guest {human(there)}")
    return notes


def _judge_durations(durations: Sequence[Duration], delay: float) -> list[str]:
    return [
        f"{one.share * 100:.0f} % of the fall: {one.model:.2f} s in the model, {one.real:.2f} s in the real guest"
        for one in durations
        if abs(one.model - one.real) > max(TOLERANCE * one.real, delay)
    ]


def sentences(comparison: Comparison) -> list[str]:
    """Return a comparison in words."""
    lines = ["", f"Linux {comparison.kernel} ({comparison.suite}), {human(comparison.filled_bytes)} freed"]
    for number, (real, model) in enumerate(comparison.passes, 1):
        lines.append(f"pass {number}      real {_words(real)}      model {_words(model)}")
    lines += [
        f"{one.share * 100:.0f} % back   real {one.real:.2f} s, model {one.model:.2f} s, {one.off * 100:.1f} % off"
        for one in comparison.durations
    ]
    lines.append(f"per-CPU     {human(comparison.per_cpu_bytes)} free in per-CPU lists: neither reports them")
    lines += [f"note        {note}" for note in comparison.notes]
    lines.append(f"The model {'was right' if comparison.passed else 'was NOT right'}.")
    return lines


def _words(one: Pass | None) -> str:
    return f"{one.time:6.2f} s {human(one.bytes)} in {one.reports}" if one else "none"
