"""balloonlab simulate --sweep: the same fleet once for each set of page reporting parameters, and what moves its footprint.

The question is that of the HyperAlloc paper (Wrenger et al., "HyperAlloc: Efficient VM Memory De/Inflation via
Hypervisor-Shared Page-Frame Allocators", EuroSys 2025), which varied order, delay and capacity of a real guest that
builds clang. Its figures stand beside ours for their shape only: guest, work and time are others.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from balloonlab.errors import UsageError
from balloonlab.fleet import FleetPlan, run_fleet
from balloonlab.fleet_options import plan_of
from balloonlab.fleet_results import FleetResult, result_of
from balloonlab.progress import Progress
from balloonlab.results import write_json
from balloonlab.runs import environment, make_folder
from balloonlab.sizes import human
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS

# The options that can be swept.
NAMES = ("order", "delay", "capacity", "budget", "variant")
# More cells than anybody reads.
MAX_CELLS = 200

Cell = tuple[tuple[str, str], ...]
Key = tuple[int, float, int]

# Mean footprint in GiB: GiB·min of QEMU's resident memory by minutes of the build, which takes longer at order 0. Means of
# six runs, from the raw data of the paper's artifact (luhsra/hyperalloc-bench at a385a2d3), by (order, delay in seconds,
# capacity); 16 GiB guest, clang 16, 12 CPUs.
PAPER_WITHOUT = 478 / 41.2
PAPER: dict[Key, float] = {
    (9, 2.0, 32): 434.5 / 41.2,
    (9, 2.0, 512): 431.3 / 41.2,
    (9, 0.1, 32): 438.3 / 41.2,
    (9, 0.1, 512): 435.5 / 41.1,
    (0, 2.0, 32): 390.1 / 48.6,
    (0, 2.0, 512): 379.0 / 48.8,
    (0, 0.1, 32): 449.3 / 61.1,
    (0, 0.1, 512): 441.9 / 61.1,
}


def parse_grid(words: Sequence[str]) -> list[Cell]:
    """Return the combinations of "order=0,9 delay=2s", the last name varying fastest. Raises UsageError."""
    grid: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if name not in NAMES or not equals:
            raise UsageError(f"--sweep {word}: write NAME=VALUE,VALUE with a name of {', '.join(NAMES)}")
        if name in grid:
            raise UsageError(f"--sweep has {name} twice: give all of its values at once")
        grid[name] = values.split(",")
        if "" in grid[name] or len(set(grid[name])) < len(grid[name]):
            raise UsageError(f"--sweep {word}: a value is missing or there twice, write {name}=VALUE,VALUE")
    cells = [tuple(zip(grid, values, strict=True)) for values in product(*grid.values())]
    if len(cells) > MAX_CELLS:
        raise UsageError(f"--sweep has {len(cells)} combinations: give {MAX_CELLS} at most")
    return cells


def plans_of(options: argparse.Namespace) -> list[FleetPlan]:
    """One plan for each combination. Raises UsageError and ModelError, before anything runs."""
    given = vars(options)
    if given["resident_limit"] is None:
        given = {**given, "resident_limit": "0"}
    return [plan_of(argparse.Namespace(**{**given, **_typed(cell)})) for cell in parse_grid(options.sweep)]


def _typed(cell: Cell) -> dict[str, str | int]:
    """Values as argparse would have them. Raises UsageError."""
    typed: dict[str, str | int] = {}
    for name, value in cell:
        whole = value.isascii() and value.isdigit()
        if name in ("order", "capacity") and not whole:
            raise UsageError(f"--sweep {name}={value}: give whole numbers")
        if name == "variant" and value not in ("merged", "v17"):
            raise UsageError(f"--sweep variant={value}: give merged or v17")
        typed[name] = int(value) if name in ("order", "capacity") else value
    return typed


def leverage(footprints: Mapping[Key, float], without: float) -> tuple[float, float, float]:
    """How far order, delay and capacity move a footprint, each with the other two held: the mean of most less least,
    as a share of the footprint without reporting. Pure.
    """
    order, delay, capacity = (_moved(footprints, index) / without for index in range(3))
    return order, delay, capacity


def _moved(footprints: Mapping[Key, float], index: int) -> float:
    groups = defaultdict(list)
    for key, footprint in footprints.items():
        groups[key[:index] + key[index + 1 :]].append(footprint)
    return sum(max(group) - min(group) for group in groups.values()) / len(groups)


# The run


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Run all combinations. Returns the exit status, as simulate does."""
    plans = plans_of(options)
    folder = make_folder(options.out)
    write_json(environment(), folder / "meta.json")
    silent = replace(plans[0], reporting=False)
    progress.say(
        f"{silent.guests} guests of {human(silent.memory_bytes)}, {silent.workload}, {silent.duration:g} s of "
        f"simulated time, {len(plans)} combinations; {silent.devices} devices"
    )
    progress.say(_HEAD)
    results: list[FleetResult] = []
    for plan in (silent, *plans):
        results.append(result_of(run_fleet(plan, lambda _sample: None)))
        progress.say(_row(results[-1], results[0]))
        write_json(results, folder / "sweep.json")
    _write_csv(results, folder / "sweep.csv")
    for line in _conclusion(results):
        progress.say(line)
    progress.say(f"Figures: {folder}")
    return EXIT_PASS if all(result.passed for result in results) else EXIT_CHECK_FAILED


_SILENT = (
    "where nothing was reported: a zone reports while it has more free than its low watermark and a full report, "
    "capacity blocks of the order; give more --memory to report more at once"
)
_HEAD = (
    f"{'variant':<8}{'order':>6}{'delay':>8}{'capacity':>9}{'share':>6} |{'GiB·min':>9}{'of none':>8}{'paper':>7} |"
    f"{'reports':>9}{'reported':>9}{'settled':>9}{'device':>8}"
)


def _row(result: FleetResult, without: FleetResult) -> str:
    given = result.parameters
    share = _share_of(result, without)
    if given.reporting:
        chosen = f"{given.variant:<8}{given.order:>6}{given.delay_seconds:>6g} s{given.capacity:>9}{given.share or 'all':>6}"
    else:
        chosen = f"{'no reporting':<37}"
    paper = PAPER.get(_key(result)) if given.reporting else PAPER_WITHOUT
    beside = f"{paper / PAPER_WITHOUT * 100:.0f} %" if paper is not None else "-"
    settled = f"{result.settle.median_seconds:.1f} s" if result.settle.falls else "-"
    cpu = f"{result.devices.cpu_seconds:.1f} s" if result.devices.count else "-"
    return (
        f"{chosen} |{result.footprint_gib_minutes:>9.2f}{share * 100:>6.0f} %{beside:>7} |"
        f"{result.reports:>9}{human(result.reported_bytes):>9}{settled:>9}{cpu:>8}"
    )


def _key(result: FleetResult) -> Key:
    given = result.parameters
    return given.order, given.delay_seconds, given.capacity


def _share_of(result: FleetResult, without: FleetResult) -> float:
    return (
        result.footprint_gib_minutes / without.footprint_gib_minutes if without.footprint_gib_minutes else 0.0
    )


def _conclusion(results: Sequence[FleetResult]) -> list[str]:
    """The levers, where the grid is one of order, delay and capacity; the paper's beside them."""
    without, *reporting = results
    remarks = [failure for result in results for failure in result.page_check_failures]
    if any(not result.reports for result in reporting):
        remarks.append(_SILENT)
    footprints = {_key(result): result.footprint_gib_minutes for result in reporting}
    if len(footprints) < len(reporting) or not without.footprint_gib_minutes:
        return remarks
    ours = leverage(footprints, without.footprint_gib_minutes)
    theirs = leverage(PAPER, PAPER_WITHOUT)
    return [
        "",
        f"moves the footprint by, of that without reporting: {_levers(ours)}",
        f"in the HyperAlloc paper (16 GiB, building clang):   {_levers(theirs)}",
        *remarks,
    ]


def _levers(levers: tuple[float, float, float]) -> str:
    order, delay, capacity = (f"{share * 100:.1f} %" for share in levers)
    return f"order {order}, delay {delay}, capacity {capacity}"


COLUMNS = (
    "reporting",
    "variant",
    "order",
    "delay_seconds",
    "capacity",
    "share",
    "footprint_gib_minutes",
    "peak_bytes",
    "reports",
    "reported_bytes",
    "settle_median_seconds",
    "device_cpu_seconds",
    "passed",
)


def _write_csv(results: Sequence[FleetResult], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for result in results:
            given = result.parameters
            writer.writerow(
                (
                    *(getattr(given, name) for name in COLUMNS[:6]),
                    *(getattr(result, name) for name in COLUMNS[6:10]),
                    result.settle.median_seconds,
                    result.devices.cpu_seconds,
                    result.passed,
                )
            )
