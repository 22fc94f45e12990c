"""Measures a scenario on one kernel after another and writes what came of it into docs/results/: a table and exact figures.

scripts/kernels calls it. Each measurement is balloonlab measure's own, by its command line; this file only puts their
results side by side, with commit, date and machine. Nobody edits what it writes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from balloonlab.measure.figures import find_figure
from balloonlab.measure.report import Report, read_report
from balloonlab.measure.words import spread
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS
from tests.results import FOLDER, commit

# Every suite's cloud kernel, and one that Debian builds for any machine.
KERNELS = ("bookworm", "bookworm-backports", "trixie-backports", "forky", "bookworm/amd64")
FIGURES = (
    "boot_seconds", "floor_bytes", "peak_bytes", "residual_bytes", "guest_held_bytes", "returned_bytes", "t50_seconds",
    "t90_seconds", "reports", "release_p99_seconds", "device_cpu_seconds", "qemu_anonymous_bytes",
)  # fmt: skip
STANDARD = Path("docs/scenarios/standard.toml")


def main(arguments: Sequence[str]) -> int:
    """Measure and write. Returns the exit status: 0 all were measured, or the worst that a measurement ended with.

    A kernel that cannot be measured is named in the table, and the others are measured all the same.
    """
    parser = argparse.ArgumentParser(prog="scripts/kernels")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", default=KERNELS)
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--scenario", type=Path, default=STANDARD, metavar="FILE.toml")
    options = parser.parse_args(arguments)
    reports: dict[str, Report] = {}
    failed: dict[str, int] = {}
    worst = EXIT_PASS
    with tempfile.TemporaryDirectory(prefix="kernels-") as scratch:
        for kernel in options.kernels:
            folder = Path(scratch) / kernel.replace("/", "-")
            status = measure(kernel, options.scenario, options.repeat, folder)
            worst = max(worst, abs(status))  # less than 0 is the signal that ended it
            if status in (EXIT_PASS, EXIT_CHECK_FAILED):
                reports[kernel] = read_report(folder)
            else:
                failed[kernel] = status
    if reports:
        write(reports, failed, options.repeat, options.scenario)
    return worst


def measure(kernel: str, scenario: Path, repeat: int, folder: Path) -> int:
    """Measure one kernel into a folder. Returns the status of balloonlab measure."""
    suite, _, flavour = kernel.partition("/")
    command = [sys.executable, "-m", "balloonlab.cli", "measure", str(scenario), "--kernel", suite]
    options = [*(["--flavour", flavour] if flavour else []), "--repeat", str(repeat), "--out", str(folder)]
    return subprocess.run([*command, *options], check=False).returncode


def write(reports: dict[str, Report], failed: dict[str, int], repeat: int, scenario: Path) -> None:
    """Write the table and the figures. failed: the status for each kernel that was not measured."""
    document = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}",
        "scenario": str(scenario),
        "repeat": repeat,
        "kernels": {name: _plain(report) for name, report in reports.items()},
        "not_measured": failed,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "kernels.json").write_text(json.dumps(document, indent=2) + "\n")
    (FOLDER / "kernels.md").write_text(render(document, reports))


def _plain(report: Report) -> dict[str, Any]:
    return {
        "kernel": report.kernel,
        "passed": report.passed,
        "endings": [run.ending for run in report.runs],
        "figures": msgspec.to_builtins(report.arms[0].figures),
    }


def render(document: dict[str, Any], reports: dict[str, Report]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# The same scenario on one kernel after another",
        "",
        "Written by `scripts/kernels`, not by hand. The exact figures are in [kernels.json](kernels.json).",
        "",
        f"- commit `{document['commit']}`, {document['date']}",
        f"- {document['machine']}; " + _machine(reports),
        f"- `{document['scenario']}`, {document['repeat']} runs of each kernel: medians, and the ends",
        *(
            f"- **{name} was not measured**: status {status}"
            for name, status in document["not_measured"].items()
        ),
        "",
        "| | " + " | ".join(reports) + " |",
        "|---" * (len(reports) + 1) + "|",
        "| Linux | " + " | ".join(report.kernel for report in reports.values()) + " |",
    ]
    for name in FIGURES:
        cells = (spread(name, report.arms[0].figures.get(name)) for report in reports.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    endings = (", ".join(dict.fromkeys(run.ending for run in report.runs)) for report in reports.values())
    lines += ["| ended | " + " | ".join(endings) + " |", ""]
    lines += [f"- `{name}`: {find_figure(name).meaning}" for name in FIGURES]
    return "\n".join(lines) + "\n"


def _machine(reports: dict[str, Report]) -> str:
    versions = {f"QEMU {report.qemu} ({report.accelerator})" for report in reports.values()}
    return ", ".join(sorted(versions))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
