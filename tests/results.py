"""Runs pytest and writes what it found into docs/results/: the figures that the documentation quotes.

scripts/test --full calls it with pytest's arguments. Tests hand figures over with record_property. The file names commit,
date and machine, so that nobody has to trust a number without knowing where it comes from; nobody edits it by hand.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path("docs/results")
_COLUMNS = (
    "kernel",
    "discard",
    "floor_bytes",
    "peak_bytes",
    "residual_bytes",
    "returned_bytes",
    "memfree_regained_bytes",
    "settle_seconds",
)
# A cell of the table of features: which, with which suite's kernel, and what was seen.
_CELL = ("feature", "suite", "seen")
_MEBIBYTE = 1 << 20


class Recorder:
    """A pytest plugin that keeps each test's outcome and figures."""

    def __init__(self) -> None:
        self.selected = 0
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.figures: dict[str, dict[str, Any]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keep how many tests there are to run."""
        self.selected = len(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst phase of each test, and its properties."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
        if report.skipped and isinstance(report.longrepr, tuple):
            self.reasons[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")
        if report.when == "call" and report.user_properties:
            self.figures[report.nodeid] = dict(report.user_properties)


def main(arguments: list[str]) -> int:
    """Run pytest and write the results; the exit status is pytest's."""
    recorder = Recorder()
    started = time.time()
    status = int(pytest.main(arguments, plugins=[recorder]))
    document = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "minutes": round((time.time() - started) / 60, 1),
        "machine": f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}",
        "pytest_arguments": shlex.join(arguments),
        "pytest_status": status,
        "outcomes": {
            name: list(recorder.outcomes.values()).count(name) for name in ("passed", "failed", "skipped")
        },
        "not_run": recorder.selected - len(recorder.outcomes),
        "failed": sorted(name for name, outcome in recorder.outcomes.items() if outcome == "failed"),
        "skipped": dict(sorted(recorder.reasons.items())),
        "figures": recorder.figures,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "full.json").write_text(json.dumps(document, indent=2) + "\n")
    (FOLDER / "README.md").write_text(render(document))
    return status


def commit() -> str:
    """The commit under test, marked if the tree differs from it."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or "unknown"


def render(document: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    outcomes = document["outcomes"]
    lines = [
        "# Results of the last full test run",
        "",
        "Written by `scripts/test --full`, not by hand. The exact figures are in [full.json](full.json).",
        "",
        f"- commit `{document['commit']}`, {document['date']}, {document['minutes']} minutes",
        f"- {document['machine']}",
        f"- `pytest {document['pytest_arguments']}`",
        f"- {outcomes['passed']} passed, {outcomes['failed']} failed, {outcomes['skipped']} skipped",
        *([f"- **interrupted: {document['not_run']} tests were not run**"] if document["not_run"] else []),
        *[f"- failed: `{name}`" for name in document["failed"]],
        *[f"- skipped: `{name}`: {why}" for name, why in document["skipped"].items()],
        "",
        "## 600 MiB filled and freed in a guest of 1 GiB",
        "",
        "MiB held by the host. `auto` is MADV_REMOVE on shared memory; `dontneed` (MADV_DONTNEED) and `none` are the",
        "control runs: on shared memory they free nothing.",
        "",
        "| kernel | discard | floor | peak | at the end | returned | MemFree regained | settled after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        "| " + " | ".join(_cell(name, figures[name]) for name in _COLUMNS) + " |"
        for figures in document["figures"].values()
        if set(_COLUMNS) <= figures.keys()
    ]
    lines += ["", "## Features, by the kernel's suite", "", *_features(document)]
    others = {
        name: {key: value for key, value in figures.items() if key not in (*_COLUMNS, *_CELL)}
        for name, figures in document["figures"].items()
    }
    lines += ["", "## Other figures", "", "| test | figure | value |", "|---|---|---|"]
    lines += [
        f"| {name.rpartition('::')[2]} | {key} | {value} |"
        for name, figures in others.items()
        for key, value in figures.items()
    ]
    return "\n".join(lines) + "\n"


def _features(document: dict[str, Any]) -> list[str]:
    """Return the table of features: each cell is a guest test that ran, or says that it did not pass or was not run."""
    cells: dict[str, dict[str, str]] = {}
    for name, figures in document["figures"].items():
        if set(_CELL) <= figures.keys():
            seen = "**failed**" if name in document["failed"] else figures["seen"]
            cells.setdefault(figures["feature"], {})[figures["suite"]] = seen
    suites = sorted({suite for row in cells.values() for suite in row})
    lines = [f"| feature | {' | '.join(suites)} |", "|---" * (len(suites) + 1) + "|"]
    for feature, row in cells.items():
        lines.append(f"| {feature} | {' | '.join(row.get(suite, 'not run') for suite in suites)} |")
    return lines


def _cell(name: str, value: Any) -> str:  # noqa: ANN401  (a recorded figure)
    if name.endswith("_bytes"):
        return str(round(value / _MEBIBYTE))
    return f"{value:.1f} s" if name.endswith("_seconds") else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
