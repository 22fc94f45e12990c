"""The command balloonlab simulate: fleets of modelled guests, real devices as far as this machine's memory goes.

fleet.py is the simulation, fleet_options.py its options; this file gives it a screen, a run folder and a verdict. With
--sweep the same fleet lives once for each set of parameters: sweep.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from balloonlab import sweep
from balloonlab.fleet import FleetPlan, FleetRun, Observer, run_fleet
from balloonlab.fleet_options import add_fleet_options, add_reporting_options, plan_of
from balloonlab.fleet_results import FleetResult, result_of, sentences
from balloonlab.fleet_timeline import FleetSample, write_csv
from balloonlab.options import Commands
from balloonlab.progress import Progress
from balloonlab.results import write_json
from balloonlab.runs import environment, make_folder
from balloonlab.sizes import human
from balloonlab.timeline import Sample
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "simulate",
        help="run a fleet of modelled guests, with real devices, and see what the host holds",
        description="Model Linux guests that report their free pages, each with a device of its own, in simulated time.",
    )
    add_fleet_options(parser)
    add_reporting_options(parser)
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="NAME=VALUE,VALUE",
        help="one run for each combination, and one without reporting, e.g. order=0,9,10 delay=100ms,2s; only counted, "
        "unless a --resident-limit is given",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder (default: runs/TIME, and runs/latest)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Run the command. Returns the exit status: 0 all pages held what they must, 1 they did not."""
    if options.sweep:
        return sweep.run(options, progress)
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
