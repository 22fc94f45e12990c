"""Options of fleets of modelled guests, and the plan that they make.

Everything that can be wrong with a command line is found here, before anything is made. Used by simulate.py and sweep.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from balloonlab.durations import parse_duration
from balloonlab.errors import UsageError
from balloonlab.fleet import MODELS, FleetPlan
from balloonlab.sizes import parse_size
from guest_images.free_lists import PAGEBLOCK_ORDER
from guest_images.modelled_guest import zones_of
from guest_images.page_reporting import (
    DEFAULT_CAPACITY,
    DEFAULT_SHARE,
    Parameters,
    Variant,
)
from guest_images.workloads import WORKLOADS
from hostdev.errors import UnsupportedHostError

# A fleet that this many events would not finish is a slip of the keyboard.
MAX_GUESTS = 100_000
# Samples are kept and drawn: a day at one a second.
MAX_SAMPLES = 86_400
# What the guests may take of what the machine has to give, unless told.
_MEMORY_SHARE = 2


def add_fleet_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the guests and their time."""
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


def add_reporting_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the guests' page reporting, which a sweep varies."""
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
    """Memory that this machine has to give, by /proc/meminfo's MemAvailable. Raises UnsupportedHostError."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _colon, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise UnsupportedHostError("/proc/meminfo has no MemAvailable, which Linux has had since 3.14")
