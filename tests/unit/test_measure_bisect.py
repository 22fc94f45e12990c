"""git bisect run over a recorded series: balloonlab compare finds the commit that stopped giving memory back.

The repository is real, and so are git and the command; only the reports were not measured but made. Each commit's number
says which report is its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from balloonlab.measure.report import Report
from tests.recorded_series import FIGURES, KEPT, MIB, leave, made_report, made_run

ROOT = Path(__file__).parents[2]
COMMITS = 12
# The sixth is the first that git tries: its guest does not come up. The seventh has a run that did not, and one that did.
UNBOOTABLE, FLAKY, CULPRIT = 6, 7, 9
DEADLINE_SECONDS = 100


def report_of(number: int) -> Report:
    hung = made_run(1, {}, ending="hung")
    if number == UNBOOTABLE:
        return made_report(hung)
    # Runs are never quite the same.
    run = {**(KEPT if number >= CULPRIT else FIGURES), "floor_bytes": (160 + number / 16) * MIB}
    return made_report(hung, made_run(2, run)) if number == FLAKY else made_report(made_run(1, run))


class Repository:
    """A repository of COMMITS commits beside the series of their reports."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.series, self.log = folder / "repository", folder / "series", folder / "log"
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "GIT_CONFIG_NOSYSTEM": "1",
            **{f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        }
        self.folder.mkdir()
        self.git("init", "-q")
        for number in range(1, COMMITS + 1):
            (self.folder / "number").write_text(f"{number}\n")
            self.git("add", "number")
            self.git("commit", "-q", "-m", f"commit {number}")
            leave(report_of(number), self.series / str(number))

    def git(self, *words: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["git", *words],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_SECONDS,
        )
        assert done.returncode == 0 or words[0] == "bisect", done.stderr
        return done

    def bisect(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the bisection between the first commit and the last one; its log has each status."""
        script = self.folder.parent / "judge"
        command = f'{sys.executable} -m balloonlab.cli compare {self.series}/1 "{self.series}/$number"'
        script.write_text(
            f"#!/bin/sh\nnumber=$(cat number)\n{command} --exit-style bisect {' '.join(options)}\n"
            f'status=$?\necho "$number $status" >>{self.log}\nexit $status\n'
        )
        script.chmod(0o755)
        self.git("bisect", "start", "HEAD", f"HEAD~{COMMITS - 1}")
        return self.git("bisect", "run", str(script))

    def statuses(self) -> dict[int, int]:
        pairs = [line.split() for line in self.log.read_text().splitlines()]
        return {int(number): int(status) for number, status in pairs}


@pytest.fixture
def repository(tmp_path: Path, unmet: Callable[[str], None]) -> Repository:
    if shutil.which("git") is None:
        unmet("git")
    return Repository(tmp_path)


def test_the_commit_that_stopped_giving_memory_back_is_found(repository: Repository) -> None:
    done = repository.bisect()
    assert done.returncode == 0, done.stderr
    assert f"commit {CULPRIT}\n" in repository.git("show", "-s", "--format=%s", "refs/bisect/bad").stdout
    assert "is the first bad commit" in done.stdout
    statuses = repository.statuses()
    assert statuses[UNBOOTABLE] == 125
    assert statuses == {
        number: 125 if number == UNBOOTABLE else int(number >= CULPRIT) for number in statuses
    }


def test_a_wrong_command_line_stops_at_the_first_commit(repository: Repository) -> None:
    """Otherwise git would take each status of 2 as a bad commit, and name an innocent one."""
    done = repository.bisect("--figure", "residul")
    assert done.returncode != 0
    assert "is the first bad commit" not in done.stdout
    assert repository.statuses() == {UNBOOTABLE: 255}
