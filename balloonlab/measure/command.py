"""The command balloonlab measure: a scenario, run as often as asked, its figures, budgets and reports in a run folder.

It has the options, the screen and the folder; runner.py measures, summary.py judges, outputs.py writes what others read.
Whatever ends it, what was measured until then is in the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path

from balloonlab import signals
from balloonlab.errors import UsageError
from balloonlab.measure.exit_style import add_option, exit_status
from balloonlab.measure.guest_setup import for_arm, prepare
from balloonlab.measure.outputs import write_outputs
from balloonlab.measure.report import NAME, SCHEMA, Report, Run
from balloonlab.measure.runner import Order, Runner
from balloonlab.measure.scenario import ARMS, Arm, Scenario
from balloonlab.measure.scenario_file import STANDARD, Overrides, apply, read_scenario
from balloonlab.measure.schedule import in_slots, room, turns
from balloonlab.measure.screen import Screen
from balloonlab.measure.summary import arm_results, passed
from balloonlab.options import Commands
from balloonlab.progress import Progress
from balloonlab.results import write_json
from balloonlab.rig import Setup
from balloonlab.runs import environment, make_folder
from guest_images.overlay import digests

# Each run has a folder and a process or two; more is a slip of the keyboard.
MAX_REPEAT = 1000


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "measure",
        help="boot a guest, run a workload, say what it costs, fail when a budget is broken",
        description="Boot a real Linux guest, put it through a scenario, and measure what it costs the host.",
    )
    parser.add_argument(
        "scenario", type=Path, nargs="?", metavar="SCENARIO.toml", help="default: the standard scenario"
    )
    parser.add_argument(
        "--kernel", metavar="SUITE|PATH", help="a Debian suite, a package, a bzImage, a vmlinux, or a folder"
    )
    parser.add_argument(
        "--flavour", metavar="NAME", help="of a Debian suite's kernel, such as amd64 or cloud-amd64"
    )
    parser.add_argument("--modules", metavar="DIR", help="lib/modules/VERSION of a kernel of your own")
    parser.add_argument("--memory", metavar="SIZE", help="guest memory")
    parser.add_argument("--cpus", type=int, metavar="N", help="virtual CPUs")
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="FIGURE=VALUE",
        help="fail if the median is more, or with >= if it is less: residual=128M, t90=10s, returned>=200M",
    )
    parser.add_argument(
        "--arm",
        action="append",
        choices=ARMS,
        help="our device (the default), QEMU's own balloon, no balloon; again to have several side by side",
    )
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="runs of each arm (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="guests at once (default: as CPUs and memory allow)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="one more run, whose figures do not count, to prove page by page that nothing in use was released",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder (default: runs/TIME, and runs/latest)"
    )
    add_option(parser)
    parser.set_defaults(run=run)


@dataclass
class _Measuring:
    """One invocation. runs: as they have ended so far."""

    scenario: Scenario
    arms: tuple[Arm, ...]
    repeat: int
    jobs: int
    setup: Setup
    folder: Path
    verify: bool
    screen: Screen
    began: float = field(default_factory=time.monotonic)
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Before the runs: what changes meanwhile is not what was measured.
        self._files = digests(self.scenario.guest.files)

    def orders(self) -> list[Order]:
        """Return the runs that there are to be, each with its folder made."""
        setups = {arm: for_arm(self.setup, arm) for arm in self.arms}
        orders = [
            Order(self.scenario, setups[arm], arm, number, self.folder / f"{arm}-{number}")
            for arm, number in turns(self.arms, self.repeat)
        ]
        if self.verify:
            first, number = self.arms[0], self.repeat + 1
            folder = self.folder / f"{first}-verify"
            orders.append(Order(self.scenario, setups[first], first, number, folder, verify=True))
        for order in orders:
            order.folder.mkdir()
        return orders

    async def measure(self) -> None:
        """Make the runs. Raises what keeps one from beginning."""

        async def one(order: Order) -> Run:
            with self.screen.run(order) as watcher:
                return await Runner(order, watcher).run()

        async with contextlib.aclosing(in_slots(one, self.orders(), self.jobs)) as ended:
            async for run in ended:
                self.runs.append(run)
                self.screen.ended(run)

    def report(self) -> Report:
        """Return what there is so far."""
        runs = sorted(self.runs, key=lambda run: (self.arms.index(run.arm), run.number))
        results = arm_results(self.arms, runs, self.scenario.budgets)
        planned = len(self.arms) * self.repeat + self.verify
        return Report(
            schema=SCHEMA,
            passed=passed(runs, results, planned),
            scenario=self.scenario,
            environment=environment(),
            kernel=next((run.kernel for run in runs if run.kernel), self.setup.image.kernel_version),
            qemu=self.setup.qemu.version,
            accelerator=self.setup.accelerator,
            seconds=time.monotonic() - self.began,
            arms=results,
            runs=runs,
            planned=planned,
            files=self._files,
        )


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Run the command. Returns the exit status: 0 all is well, 1 a budget is broken or a run went wrong."""
    return exit_status(options.exit_style, _measure(options, progress))


def _measure(options: argparse.Namespace, progress: Progress) -> Report:
    scenario = _scenario(options)
    arms = tuple(dict.fromkeys(options.arm or ("ours",)))
    _check_numbers(options)
    chosen = make_folder(options.out) if options.out is not None else None
    setup = prepare(scenario.guest, scenario.device, progress=progress.say)
    # Not before there is something to run: runs/latest stays at the last run.
    folder = chosen or make_folder(None)
    jobs = options.jobs or room(scenario.guest.memory, scenario.guest.cpus)
    screen = Screen(progress, jobs, len(arms) * options.repeat + options.verify)
    screen.begin(scenario, setup)
    measuring = _Measuring(scenario, arms, options.repeat, jobs, setup, folder, options.verify, screen)
    try:
        signals.run(measuring.measure())
    finally:
        report = measuring.report()
        write_json(report, folder / NAME)
    write_outputs(report, folder)
    screen.conclude(report, folder)
    return report


def _scenario(options: argparse.Namespace) -> Scenario:
    said = Overrides(
        kernel=options.kernel,
        flavour=options.flavour,
        modules=options.modules,
        memory=options.memory,
        cpus=options.cpus,
        budgets=tuple(options.budget),
    )
    return apply(STANDARD if options.scenario is None else read_scenario(options.scenario), said)


def _check_numbers(options: argparse.Namespace) -> None:
    if not 1 <= options.repeat <= MAX_REPEAT:
        raise UsageError(f"--repeat {options.repeat}: give 1 to {MAX_REPEAT}")
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: give one or more")
