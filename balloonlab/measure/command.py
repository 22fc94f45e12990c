"""The command balloonlab measure: a scenario, run as often as asked, its figures, budgets and reports in a run folder.

It has the options, the screen and the folder; runner.py measures, summary.py judges, outputs.py writes what others read.
Whatever ends it, what was measured until then is in the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from balloonlab import signals
from balloonlab.errors import UsageError
from balloonlab.fleet_options import available_bytes
from balloonlab.measure.exit_style import add_option, exit_status
from balloonlab.measure.guest_setup import for_arm, prepare
from balloonlab.measure.outputs import unwritable, write_outputs, write_result
from balloonlab.measure.report import SCHEMA, Report, Run
from balloonlab.measure.runner import Order, Runner
from balloonlab.measure.scenario import ARMS, Arm, Scenario
from balloonlab.measure.scenario_file import STANDARD, Overrides, apply, read_scenario
from balloonlab.measure.schedule import check_room, in_slots, room, turns
from balloonlab.measure.screen import Screen
from balloonlab.measure.summary import arm_results, passed
from balloonlab.options import Commands
from balloonlab.progress import Progress
from balloonlab.rig import Setup
from balloonlab.runs import environment, make_folder
from guest_images.overlay import digests

# Each run has a folder and a process or two; more is a slip of the keyboard.
MAX_REPEAT = 1000
# A disk without room, which says nothing about the guest.
_FULL = (errno.ENOSPC, errno.EDQUOT)


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
        help="one more run of our device, whose figures do not count, to prove that nothing in use was released",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder (default: runs/TIME, and runs/latest)"
    )
    add_option(parser)
    parser.set_defaults(run=run)


@dataclass
class _Measuring:
    """One invocation. proved: the arm that is verified, in a run of its own. environment: as it was before any run.

    runs: as they have ended so far.
    """

    scenario: Scenario
    arms: tuple[Arm, ...]
    repeat: int
    jobs: int
    setup: Setup
    folder: Path
    proved: Arm | None
    screen: Screen
    environment: dict[str, Any]
    began: float = field(default_factory=time.monotonic)
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Before the runs: what changes meanwhile is not what was measured.
        self._files = digests(self.scenario.guest.files)

    def orders(self) -> list[Order]:
        """Return the runs that are to be measured."""
        setups = {arm: for_arm(self.setup, arm) for arm in self.arms}
        return [
            Order(self.scenario, setups[arm], arm, number, self.folder / f"{arm}-{number}")
            for arm, number in turns(self.arms, self.repeat)
        ]

    def proof(self) -> list[Order]:
        """Return the run that is to prove something, if one is."""
        if self.proved is None:
            return []
        setup, folder = for_arm(self.setup, self.proved), self.folder / f"{self.proved}-verify"
        return [Order(self.scenario, setup, self.proved, self.repeat + 1, folder, verify=True)]

    async def measure(self) -> None:
        """Make the runs, and the one with the proof by itself afterwards: it would cost the others their time.

        Raises what keeps one from beginning.
        """
        await self._make(self.orders(), self.jobs)
        await self._make(self.proof(), 1)

    async def _make(self, orders: list[Order], slots: int) -> None:
        async def one(order: Order) -> Run:
            order.folder.mkdir()
            with self.screen.run(order) as watcher:
                try:
                    return await Runner(order, watcher).run()
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                    raise unwritable(self.folder, error) from error

        async with contextlib.aclosing(in_slots(one, orders, slots)) as ended:
            async for run in ended:
                self.runs.append(run)
                self.screen.ended(run)

    def report(self) -> Report:
        """Return what there is so far."""
        runs = sorted(self.runs, key=lambda run: (self.arms.index(run.arm), run.number))
        results = arm_results(self.arms, runs, self.scenario.budgets)
        planned = len(self.arms) * self.repeat + (self.proved is not None)
        return Report(
            schema=SCHEMA,
            passed=passed(runs, results, planned),
            scenario=self.scenario,
            environment=self.environment,
            kernel=next((run.kernel for run in runs if run.kernel), self.setup.image.kernel_version),
            qemu=self.setup.qemu.version,
            accelerator=self.setup.accelerator,
            seconds=time.monotonic() - self.began,
            arms=results,
            runs=runs,
            planned=planned,
            jobs=self.jobs,
            files=self._files,
        )


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Run the command. Returns the exit status: 0 all is well, 1 a budget is broken or a run went wrong."""
    return exit_status(options.exit_style, _measure(options, progress))


def _measure(options: argparse.Namespace, progress: Progress) -> Report:
    scenario = _scenario(options)
    arms = tuple(dict.fromkeys(options.arm or ("ours",)))
    _check_numbers(options)
    proved = proved_arm(arms) if options.verify else None
    runs = len(arms) * options.repeat
    jobs = min(options.jobs or room(scenario.guest.memory, scenario.guest.cpus), runs)
    check_room(scenario.guest.memory, jobs, available_bytes())
    chosen = make_folder(options.out) if options.out is not None else None
    setup = prepare(scenario.guest, scenario.device, progress=progress.say)
    # Not before there is something to run: runs/latest stays at the last run.
    folder = chosen or make_folder(None)
    screen = Screen(progress, jobs, runs + options.verify)
    screen.begin(scenario, setup)
    measuring = _Measuring(scenario, arms, options.repeat, jobs, setup, folder, proved, screen, environment())
    try:
        signals.run(measuring.measure())
    except BaseException:
        _keep(measuring.report(), folder, screen)
        raise
    report = measuring.report()
    # Shown whatever becomes of the files.
    try:
        write_result(report, folder)
    finally:
        screen.conclude(report, folder)
    write_outputs(report, folder, screen.warn)
    return report


def _keep(report: Report, folder: Path, screen: Screen) -> None:
    """Leave what there is of a measurement that something ends, which is what is raised afterwards."""
    try:
        write_result(report, folder)
        write_outputs(report, folder, screen.warn)
    except UsageError as error:
        screen.warn(str(error))


def proved_arm(arms: tuple[Arm, ...]) -> Arm:
    """Return the arm that --verify is about: our device's, or the only one that there is. Raises UsageError."""
    if "ours" in arms or len(arms) == 1:
        return "ours" if "ours" in arms else arms[0]
    raise UsageError(
        f"--verify proves one arm, and there are {' and '.join(arms)}: add --arm ours, or name one only"
    )


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
