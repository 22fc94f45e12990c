"""The figures of one run, from what was seen of it: samples, phases, trace, and what host and guest say at its end.

Each name is one of figures.py; what could not be measured is None. Used by runner.py.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from balloonlab import process
from balloonlab.measure.curve import seconds_to
from balloonlab.measure.figures import PHASE_FIGURES
from balloonlab.measure.latency import quantile
from balloonlab.measure.meter import Meter
from balloonlab.measure.phases import Phases
from balloonlab.measure.report import PhaseResult
from balloonlab.rig import Rig
from balloonlab.timeline import Sample
from guest_images.errors import AgentRefusedError

Figures = dict[str, float | None]
# What a trace alone tells.
_OF_TRACE = ("refault_bytes", "release_p50_seconds", "release_p99_seconds", "release_most_seconds")


@dataclass(frozen=True)
class Ends:
    """What host and guest say when the last phase has ended. guest_faults, guest_major_faults: since its boot."""

    last: Sample
    qemu_cpu_seconds: float
    qemu_anonymous_bytes: int
    host_faults: int
    guest_faults: int | None
    guest_major_faults: int | None
    device_cpu_seconds: float | None
    device_proportional_bytes: int | None


async def ends(rig: Rig, last: Sample) -> Ends:
    """Ask host and guest. Raises AgentError."""
    counters: Mapping[str, int] = {}
    with contextlib.suppress(AgentRefusedError):  # a guest without it has no counters
        counters = vmstat(await rig.agent.read("/proc/vmstat"))
    ours = rig.setup.balloon == "vhost-user"
    return Ends(
        last=last,
        qemu_cpu_seconds=process.cpu_seconds(rig.vm.pid),
        qemu_anonymous_bytes=process.anonymous_bytes(rig.vm.pid),
        host_faults=process.faults(rig.vm.pid),
        guest_faults=counters.get("pgfault"),
        guest_major_faults=counters.get("pgmajfault"),
        device_cpu_seconds=rig.device.cpu_seconds() if ours else None,
        device_proportional_bytes=rig.device.proportional_bytes() if ours else None,
    )


def vmstat(text: str) -> Mapping[str, int]:
    """Read /proc/vmstat. What a guest says that is no counter of 64 bits is left out."""
    return {name: int(value) for name, value in re.findall(r"^(\w{1,64}) (\d{1,18})$", text, re.MULTILINE)}


def of_phases(phases: Phases, samples: list[Sample]) -> Figures:
    """Return what is known of a run however far it came."""
    figures: Figures = {
        f"{phase.name}.{figure.name}": getattr(phase, figure.name)
        for phase in phases.done
        for figure in PHASE_FIGURES
    }
    idle = next((phase for phase in phases.done if phase.do == "idle"), None)
    figures |= {
        "boot_seconds": phases.boot_seconds,
        "boot_resident_bytes": next((phase.end_bytes for phase in phases.done if phase.do == "boot"), None),
        "floor_bytes": idle.end_bytes if idle is not None else None,
        "peak_bytes": max((sample.footprint_bytes for sample in samples), default=None),
        "footprint_gib_minutes": sum(phase.footprint_gib_minutes for phase in phases.done),
        "command_seconds": phases.command_seconds,
        "command_status": phases.command_status,
        **_of_free(phases, samples),
    }
    return figures


def _of_free(phases: Phases, samples: list[Sample]) -> Figures:
    """Return what the last free brought back, and how soon."""
    freed = next((phase for phase in reversed(phases.done) if phase.do == "free"), None)
    if freed is None or phases.freed is None:
        return {"returned_bytes": None, "t50_seconds": None, "t90_seconds": None}
    end = freed.begin + freed.seconds
    before = _at(samples, freed)
    times = {
        name: seconds_to(samples, phases.freed, end, share, before)
        for name, share in (("t50", 0.5), ("t90", 0.9))
    }
    return {
        "returned_bytes": before - freed.end_bytes,
        **{f"{name}_seconds": value for name, value in times.items()},
    }


def _at(samples: list[Sample], phase: PhaseResult) -> int:
    """Return what was held when a phase began."""
    return [sample.footprint_bytes for sample in samples if sample.seconds <= phase.begin][-1]


def of_ends(ends: Ends, memory_bytes: int) -> Figures:
    """Return what is known once the last phase has ended. memory_bytes: all of the guest's RAM."""
    in_use = memory_bytes - (ends.last.guest_memfree_bytes or 0)
    return {
        "residual_bytes": ends.last.footprint_bytes,
        "guest_held_bytes": in_use,
        "excess_bytes": ends.last.footprint_bytes - in_use,
        "qemu_cpu_seconds": ends.qemu_cpu_seconds,
        "qemu_anonymous_bytes": ends.qemu_anonymous_bytes,
        "host_faults": ends.host_faults,
        "guest_faults": ends.guest_faults,
        "guest_major_faults": ends.guest_major_faults,
        "device_cpu_seconds": ends.device_cpu_seconds,
        "device_proportional_bytes": ends.device_proportional_bytes,
    }


def of_meter(meter: Meter, samples: Sequence[Sample], *, frees: bool) -> Figures:
    """Return what our device's trace says; where that is not whole, what the device itself has counted.

    frees: whether its method frees anything, so that what was released can be touched again.
    """
    if meter.fault is not None:
        counted = next((sample for sample in reversed(samples) if sample.reports is not None), None)
        return {
            **dict.fromkeys(_OF_TRACE),
            "reports": counted.reports if counted is not None else None,
            "released_bytes": counted.released_bytes if counted is not None else None,
        }
    seconds = meter.latencies.seconds
    return {
        "reports": len(seconds),
        "released_bytes": meter.latencies.released_bytes,
        "refault_bytes": meter.refaults.bytes if frees else None,
        "release_p50_seconds": quantile(seconds, 0.5),
        "release_p99_seconds": quantile(seconds, 0.99),
        "release_most_seconds": quantile(seconds, 1.0),
    }
