"""What a simulation leaves behind: its result.json as declared values, and the same in words.

Used by simulate.py and sweep.py; schema as in results.py. Sizes in bytes, times in seconds of simulated time unless they
say otherwise.
"""

from __future__ import annotations

import msgspec

from balloonlab.fleet import FleetPlan, FleetRun
from balloonlab.fleet_timeline import gib_minutes, quantile
from balloonlab.sizes import human

SCHEMA = 1


class ParametersResult(msgspec.Struct, frozen=True, kw_only=True):
    """The guests' page reporting. share: a pass reports one in so many blocks of a list; None for no bound."""

    variant: str
    order: int
    delay_seconds: float
    capacity: int
    share: int | None
    reporting: bool


class SettleResult(msgspec.Struct, frozen=True, kw_only=True):
    """From a guest's letting go of 1/16 of its memory or more until 90 % of the fall had come. falls: their number."""

    falls: int
    median_seconds: float
    ninety_percent_seconds: float
    most_seconds: float


class DevicesResult(msgspec.Struct, frozen=True, kw_only=True):
    """The real devices. cpu_seconds: user and system time of all their processes, from start to end.

    resident_peak_bytes: the most that this host held for the guests, measured. uncharged_bytes: what guests took beyond
    the limit, which was only counted.
    """

    count: int
    cpu_seconds: float
    resident_limit_bytes: int
    resident_peak_bytes: int
    uncharged_bytes: int


class FleetResult(msgspec.Struct, frozen=True, kw_only=True):
    """One simulation. footprint: what a host with enough memory holds of all guests; used: not free in the guests.

    passed: every page held what it must, and the host held what it must, at the end as well. digest: of every pass of
    every guest; equal where a run repeats.
    """

    schema: int
    passed: bool
    page_check_failures: list[str]
    notes: list[str]
    model: str
    guests: int
    memory_bytes: int
    workload: str
    seed: int
    duration_seconds: float
    parameters: ParametersResult
    footprint_gib_minutes: float
    used_gib_minutes: float
    peak_bytes: int
    mean_bytes: int
    end_bytes: int
    passes: int
    reports: int
    reported_bytes: int
    settle: SettleResult
    devices: DevicesResult
    digest: str
    wall_seconds: float


def result_of(run: FleetRun) -> FleetResult:
    """Take the figures of a run that has at least one sample."""
    plan, samples = run.plan, run.samples
    footprints = [(sample.seconds, sample.footprint_bytes) for sample in samples]
    area, lived = gib_minutes(footprints), samples[-1].seconds
    return FleetResult(
        schema=SCHEMA,
        passed=not run.failures,
        page_check_failures=run.failures,
        notes=_notes(run),
        model=run.plan.model,
        guests=plan.guests,
        memory_bytes=plan.memory_bytes,
        workload=plan.workload,
        seed=plan.seed,
        duration_seconds=lived,
        parameters=_parameters(plan),
        footprint_gib_minutes=area,
        used_gib_minutes=gib_minutes([(sample.seconds, sample.used_bytes) for sample in samples]),
        peak_bytes=max(size for _seconds, size in footprints),
        mean_bytes=int(area * (60 << 30) / lived) if lived else footprints[-1][1],
        end_bytes=footprints[-1][1],
        passes=run.passes,
        reports=run.reports,
        reported_bytes=run.reported_bytes,
        settle=_settle(run.settle_seconds),
        devices=DevicesResult(
            count=plan.devices,
            cpu_seconds=run.cpu_seconds,
            resident_limit_bytes=plan.resident_limit,
            resident_peak_bytes=max(sample.resident_bytes or 0 for sample in samples),
            uncharged_bytes=run.uncharged_bytes,
        ),
        digest=run.digest,
        wall_seconds=run.wall_seconds,
    )


def _parameters(plan: FleetPlan) -> ParametersResult:
    given = plan.parameters
    return ParametersResult(
        variant=given.variant.value,
        order=given.order,
        delay_seconds=given.delay,
        capacity=given.capacity,
        share=given.share,
        reporting=plan.reporting,
    )


def _settle(seconds: list[float]) -> SettleResult:
    ordered = sorted(seconds)
    return SettleResult(
        falls=len(ordered),
        median_seconds=quantile(ordered, 0.5),
        ninety_percent_seconds=quantile(ordered, 0.9),
        most_seconds=quantile(ordered, 1.0),
    )


def _notes(run: FleetRun) -> list[str]:
    notes = []
    if run.failed_allocations:
        notes.append(f"{run.failed_allocations} allocations found no memory in their guest")
    if run.uncharged_bytes:
        notes.append(
            f"{human(run.uncharged_bytes)} were only counted, for --resident-limit was reached: "
            "their pages were neither written nor checked"
        )
    without = run.plan.guests - run.plan.devices
    if without and run.plan.devices:
        notes.append(f"{without} guests beyond {run.plan.devices} have no device and are only counted")
    return notes


def sentences(result: FleetResult) -> list[tuple[str, str]]:
    """Return a simulation in words, as rows of a label and a text."""
    settle, devices = result.settle, result.devices
    total = result.guests * result.memory_bytes
    rows = [
        ("guests", f"{result.guests} of {human(result.memory_bytes)}, together {human(total)}"),
        ("host holds", f"{human(result.mean_bytes)} on average, {human(result.peak_bytes)} at most"),
        (
            "over time",
            f"{result.footprint_gib_minutes:.1f} GiB·min, of which the guests used {result.used_gib_minutes:.1f}",
        ),
        (
            "reported",
            f"{human(result.reported_bytes)} in {result.reports} reports and {result.passes} passes",
        ),
    ]
    if settle.falls:
        text = f"{settle.falls} falls, 90 % of each after {settle.median_seconds:.1f} s (median), {settle.most_seconds:.1f} s at most"
        rows.append(("settled", text))
    if devices.count:
        text = f"{devices.count}, {devices.cpu_seconds:.1f} s of CPU in {result.wall_seconds:.1f} s; they held {human(devices.resident_peak_bytes)} at most"
        rows.append(("devices", text))
    rows += [("page check", failure) for failure in result.page_check_failures]
    rows += [("note", note) for note in result.notes]
    return rows
