"""The command balloonlab simulate: fleets of modelled guests, real devices as far as this machine's memory goes.

fleet.py is the simulation; this file gives it options, a screen, a run folder and a verdict.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from balloonlab.durations import parse_duration
from balloonlab.errors import UsageError
from balloonlab.fleet import MODELS, FleetPlan, FleetRun, Observer, run_fleet
from balloonlab.fleet_results import FleetResult, result_of, sentences
from balloonlab.fleet_timeline import FleetSample, write_csv
from balloonlab.options import Commands
from balloonlab.progress import Progress
from balloonlab.results import write_json
from balloonlab.runs import environment, make_folder
from balloonlab.sizes import human, parse_size
from balloonlab.timeline import Sample
from guest_images.free_lists import PAGEBLOCK_ORDER
from guest_images.modelled_guest import zones_of
from guest_images.page_reporting import (
    DEFAULT_CAPACITY,
    DEFAULT_SHARE,
    Parameters,
    Variant,
)
from guest_images.workloads import WORKLOADS
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS

# A fleet that this many events would not finish is a slip of the keyboard.
MAX_GUESTS = 100_000
# Samples are kept and drawn: a day at one a second.
MAX_SAMPLES = 86_400
# What the guests may take of what the machine has to give, unless told.
_MEMORY_SHARE = 2


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "simulate",
        help="run a fleet of modelled guests, with real devices, and see what the host holds",
        description="Model Linux guests that report their free pages, each with a device of its own, in simulated time.",
    )
    _add_fleet_options(parser)
    _add_reporting_options(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder (default: runs/TIME, and runs/latest)"
    )
    parser.set_defaults(run=run)


def _add_fleet_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fleet")
    group.add_argument("--guests", type=int, default=20, metavar="N", help="how many (default: %(default)s)")
    group.add_argument(
        "--memory", default="256M", metavar="SIZE", help="of each guest (default: %(default)s)"
    )
    group.add_argument(
        "--workload",
        choices=tuple(WORKLOADS),
        default="staggered",
        help="what they do (default: %(default)s)",
    )
    group.add_argument(
        "--duration", default="10min", metavar="TIME", help="simulated time (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=1, metavar="N", help="a seed repeats a run to the byte")
    group.add_argument(
        "--sample", default="1s", metavar="TIME", help="between two samples (default: %(default)s)"
    )
    group.add_argument(
        "--model",
        choices=tuple(MODELS),
        default="pages",
        help="page-exact, or by pageblocks for thousands of guests, only counted (default: %(default)s)",
    )
    group.add_argument(
        "--resident-limit",
        metavar="SIZE",
        help="host memory that guests may really take, the rest is only counted; 0 for no devices "
        "(default: half of what is available)",
    )


def _add_reporting_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("page reporting in the guests")
    group.add_argument(
        "--variant",
        choices=tuple(variant.value for variant in Variant),
        default=Variant.MERGED.value,
        help="Linux 5.7 and later, or the patch as acked (default: %(default)s)",
    )
    group.add_argument(
        "--order",
        type=int,
        default=PAGEBLOCK_ORDER,
        metavar="N",
        help="least that is reported, 2**N pages (default: %(default)s)",
    )
    group.add_argument("--delay", default="2s", metavar="TIME", help="between passes (default: %(default)s)")
    group.add_argument(
        "--capacity",
        type=int,
        default=DEFAULT_CAPACITY,
        metavar="N",
        help="blocks in a report (default: %(default)s)",
    )
    group.add_argument(
        "--budget",
        metavar="N",
        help=f"a pass reports one in N blocks of a list, or none for all (default: {DEFAULT_SHARE}; v17: none)",
    )


# Options to a plan: everything that can be wrong is found here, before anything is made.


def plan_of(options: argparse.Namespace) -> FleetPlan:
    """Return what the options say. Raises UsageError and ModelError."""
    plan = FleetPlan(
        guests=options.guests,
        memory_bytes=parse_size(options.memory),
        workload=options.workload,
        parameters=_parameters(options),
        duration=parse_duration(options.duration),
        seed=options.seed,
        resident_limit=_resident_limit(options.resident_limit),
        model=options.model,
        sample_seconds=parse_duration(options.sample),
    )
    zones_of(plan.memory_bytes)
    if plan.model == "blocks" and plan.parameters.order < PAGEBLOCK_ORDER:
        raise UsageError(
            f"--model blocks cannot tell --order {options.order}: give {PAGEBLOCK_ORDER} or 10, or --model pages"
        )
    if not 1 <= plan.guests <= MAX_GUESTS:
        raise UsageError(f"--guests {plan.guests}: give 1 to {MAX_GUESTS}")
    if plan.seed < 0:
        raise UsageError(f"--seed {plan.seed}: give 0 or more")
    if plan.duration <= 0:
        raise UsageError(f"--duration {options.duration}: give more than nothing")
    if plan.sample_seconds <= 0 or plan.duration / plan.sample_seconds > MAX_SAMPLES:
        raise UsageError(f"--sample {options.sample}: give more, for {MAX_SAMPLES} samples at most")
    return plan


def _parameters(options: argparse.Namespace) -> Parameters:
    variant = Variant(options.variant)
    return Parameters(
        variant=variant,
        order=options.order,
        delay=parse_duration(options.delay),
        capacity=options.capacity,
        share=_share(options.budget, variant),
    )


def _share(budget: str | None, variant: Variant) -> int | None:
    if budget is None:
        return DEFAULT_SHARE if variant is Variant.MERGED else None
    if budget == "none":
        return None
    if not budget.isascii() or not budget.isdigit():
        raise UsageError(f"--budget {budget}: give a number, or none")
    return int(budget)


def _resident_limit(text: str | None) -> int:
    return parse_size(text) if text is not None else available_bytes() // _MEMORY_SHARE


def available_bytes() -> int:
    """Memory that this machine has to give, by /proc/meminfo's MemAvailable."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _colon, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise UsageError("/proc/meminfo has no MemAvailable: give --resident-limit")


# The run


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Run the command. Returns the exit status: 0 all pages held what they must, 1 they did not."""
    plan = plan_of(options)
    folder = make_folder(options.out)
    limit = f", {human(plan.resident_limit)} of this host's memory at most" if plan.devices else ""
    progress.say(
        f"{plan.guests} guests of {human(plan.memory_bytes)}, {plan.workload}, {plan.duration:g} s of simulated time; "
        f"{plan.devices} devices{limit}"
    )
    write_json(environment(), folder / "meta.json")
    with _screen(plan, progress) as observe:
        fleet = run_fleet(plan, observe)
    result = _keep(fleet, folder)
    for label, text in sentences(result):
        progress.say(f"{label:<10}  {text}")
    progress.say(f"{_verdict(result)} Figures and picture: {folder}")
    return EXIT_PASS if result.passed else EXIT_CHECK_FAILED


def _verdict(result: FleetResult) -> str:
    if not result.devices.count:
        return "Counted only, no page was written."
    return "Every page held what it must." if result.passed else "A page did NOT hold what it must."


@contextmanager
def _screen(plan: FleetPlan, progress: Progress) -> Iterator[Observer]:
    """Show the samples as they come; a line a tenth of the way where that is no terminal."""
    total, shown = plan.guests * plan.memory_bytes, 0

    def observe(sample: FleetSample) -> None:
        nonlocal shown
        free = total - sample.used_bytes
        progress.sample(Sample(sample.seconds, "", sample.footprint_bytes, free))
        tenth = int(10 * sample.seconds / plan.duration)
        if tenth > shown:
            shown = tenth
            progress.end(f"{sample.seconds:g} s simulated, the host holds {human(sample.footprint_bytes)}")

    with progress.run(total):
        progress.begin("life")
        yield observe


def _keep(fleet: FleetRun, folder: Path) -> FleetResult:
    """Write the run's files."""
    from balloonlab.fleet_plot import draw_fleet  # noqa: PLC0415  (matplotlib costs half a second)

    plan = fleet.plan
    result = result_of(fleet)
    write_csv(fleet.samples, folder / "timeline.csv")
    write_json(result, folder / "result.json")
    title = f"{plan.guests} modelled guests of {human(plan.memory_bytes)}, {plan.workload}, order {plan.parameters.order}"
    draw_fleet(fleet.samples, folder / "timeline.png", title=title)
    return result
