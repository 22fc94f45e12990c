"""How long "boot this kernel, run this command, end" takes: balloonlab measure against virtme-ng, as whole processes.

    scripts/bench --virtme-ng PATH [--runs N] [--suite SUITE] [--command LINE] [--json FILE]

Same kernel, memory, QEMU and accelerator; one after the other, whoever was first the time before is second. virtme-ng is
no part of this project: "pip install virtme-ng" into an environment of its own, whose bin/vng is the PATH.

Exit status: 0 ours is no slower by the medians, 1 it is, 2 set-up, 3 no virtme-ng, or it does not boot here.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from guest_images.errors import GuestError
from qmp_glue.debian import SUITES, cache_root
from qmp_glue.errors import QmpGlueError
from qmp_glue.find import accelerator
from qmp_glue.scratch import scratch_directory
from tests.bench.virtme import Virtme, prepare

ROOT = Path(__file__).parent.parent.parent
EXIT_NO_SLOWER, EXIT_SLOWER, EXIT_SETUP, EXIT_MISSING = 0, 1, 2, 3
# A boot takes 4 to 15 s under TCG on two shared cores.
RUN_SECONDS = 180.0
# Characters of what a failed run said last.
SHOWN = 2000
MEMORY = "512M"
SCENARIO = """
name = "boot and run"
[guest]
kernel = {suite}
memory = "{memory}"
[[phase]]
do = "run"
command = {command}
"""


class BenchError(Exception):
    """A run failed, so that its time says nothing."""


class VirtmeError(BenchError):
    """virtme-ng does not run the command here."""


@dataclass(frozen=True)
class Time:
    """One run, in seconds: by the clock, and of CPU as far as its processes were waited for."""

    wall: float
    cpu: float


def main(arguments: Sequence[str]) -> int:
    """Return the exit status."""
    chosen = _parser().parse_args(arguments)
    if chosen.virtme_ng is None or not os.access(chosen.virtme_ng, os.X_OK):
        print(
            f"no virtme-ng at {chosen.virtme_ng}: pip install virtme-ng into an environment of its own, "
            "and name its bin/vng with --virtme-ng",
            file=sys.stderr,
        )
        return EXIT_MISSING
    try:
        with scratch_directory(cache_root(), "bench") as folder:
            return _compare(chosen, folder)
    except VirtmeError as error:
        print(error, file=sys.stderr)
        return EXIT_MISSING
    except (BenchError, GuestError, QmpGlueError, OSError, subprocess.CalledProcessError) as error:
        print(f"set-up: {error}", file=sys.stderr)
        return EXIT_SETUP


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--virtme-ng", type=Path, metavar="PATH", help="the program vng")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--suite", choices=tuple(SUITES), default="bookworm-backports", help="of the kernel")
    parser.add_argument("--command", default="uname -r", metavar="LINE", help="for the guest's shell")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there")
    return parser


def _compare(chosen: argparse.Namespace, folder: Path) -> int:
    virtme = prepare(chosen.virtme_ng.absolute(), chosen.suite, folder)
    print(f"{chosen.suite}, {MEMORY}, {accelerator()}: {chosen.command}")
    contestants: dict[str, Callable[[], Time]] = {
        "balloonlab measure": lambda: _ours(chosen, folder),
        "virtme-ng": lambda: _virtme(virtme, chosen.command),
    }
    interleaved(contestants, 1)  # what is made or read on a first run is in a cache from then on
    times = interleaved(contestants, chosen.runs)
    for name, own in times.items():
        print(f"{name:20} median {median(one.wall for one in own):6.2f} s  {_list(own)}")
        print(f"{'':20} of CPU {median(one.cpu for one in own):6.2f} s")
    ratio = _ratio(times)
    print(f"ours / virtme-ng: {ratio:.2f}")
    if chosen.json is not None:
        chosen.json.write_text(
            json.dumps({name: [asdict(one) for one in own] for name, own in times.items()})
        )
    return EXIT_NO_SLOWER if ratio <= 1 else EXIT_SLOWER


def _list(times: Sequence[Time]) -> str:
    return "  ".join(f"{one.wall:.2f}" for one in times)


def _ratio(times: Mapping[str, Sequence[Time]]) -> float:
    ours, theirs = (median(one.wall for one in own) for own in times.values())
    return ours / theirs


def _virtme(virtme: Virtme, command: str) -> Time:
    """Raises VirtmeError unless the command's output came, which a guest that panics does not send."""
    argv = virtme.argv(f"{command} && echo runs-$((6 * 7))", memory=MEMORY)
    try:
        own, said = timed(argv, virtme.environment)
    except BenchError as error:
        raise VirtmeError(f"virtme-ng does not boot here: {error}") from error
    if "runs-42" not in said:
        raise VirtmeError(f"virtme-ng did not run the command:\n{said[-SHOWN:]}")
    return own


def _ours(chosen: argparse.Namespace, folder: Path) -> Time:
    scenario = folder / "scenario.toml"
    words = {"suite": json.dumps(chosen.suite), "memory": MEMORY, "command": json.dumps(chosen.command)}
    scenario.write_text(SCENARIO.format(**words))
    with scratch_directory(folder, "out") as out:
        argv = [sys.executable, "-m", "balloonlab.cli", "measure", str(scenario), "--out", str(out / "run")]
        return timed(argv, os.environ)[0]


def interleaved(contestants: Mapping[str, Callable[[], Time]], runs: int) -> dict[str, list[Time]]:
    """Let each run so often, in turns; who was last is first the next time, so that nobody always runs on warm caches."""
    times: dict[str, list[Time]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(runs):
        for name in order:
            times[name].append(contestants[name]())
        order.reverse()
    return times


def timed(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[Time, str]:
    """Run a program to its end. Returns what it took and what it said. Raises BenchError where it fails."""
    before, cpu = time.monotonic(), _children_seconds()
    said = _run(argv, environment)
    return Time(time.monotonic() - before, _children_seconds() - cpu), said


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run a program to its end and return what it said; what it leaves behind of its group is ended."""
    with subprocess.Popen(
        argv,
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=RUN_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BenchError(f"{argv[0]} has not ended in {RUN_SECONDS:g} s") from error
            raise
    if process.returncode != 0:
        raise BenchError(f"{argv[0]} ended with status {process.returncode}:\n{said[-SHOWN:]}")
    return said


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
