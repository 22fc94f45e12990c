"""The ready jobs of docs/ci/ as the services run them: their shell as it stands, in order, in one environment.

pip, the new virtual environment, QEMU and the guest are real. What only a container's root can do is written down instead
of done: apt-get, useradd, chown and chmod; setpriv, which changes to a user that is not there, runs what it is given.
What is no shell is played: the restored cache is this machine's, the restored baseline the result of the run before.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from balloonlab.measure.figures import find_figure
from balloonlab.measure.report import NAME, Report, Run, read_report
from hostdev.errors import EXIT_CHECK_FAILED
from qmp_glue.debian import cache_root
from tests.ci_jobs import GITHUB, GITLAB, HOST_SHELL, ROOT, SHELL, Step, github_steps, gitlab_step, load

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

STEP_SECONDS = 300.0
GIB = 1 << 30

# A guest that does as little as there is to measure: a job is tried, not a guest.
SCENARIO = """
name = "short"

[guest]
memory = "256M"

[[phase]]
do = "run"
command = "true"

[budget]
boot = "120s"
"""

RECORDED = ("apt-get", "useradd", "chown", "chmod")
RECORD = '#!/bin/sh\necho "${0##*/} $*" >> "$RECORD"\n'
# setpriv's own options end with the first word that has no dash.
PASS_ON = '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n'


@dataclass(frozen=True)
class Place:
    """A machine of a service: its workspace, and what was done there as root."""

    workspace: Path
    environment: dict[str, str]
    record: Path

    def run(self, step: Step, **more: str) -> subprocess.CompletedProcess[str]:
        script = self.record.with_name("script")
        script.write_text(step.script)
        return subprocess.run(
            [*step.shell, script],
            cwd=self.workspace,
            env=self.environment | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=STEP_SECONDS,
            check=False,
        )

    def must(self, steps: Iterable[Step]) -> str:
        """Run steps until one fails, which none may. Returns what they printed."""
        said = ""
        for step in steps:
            ran = self.run(step)
            assert ran.returncode == 0, f"{step.name}: {ran.stdout}"
            said += ran.stdout
        return said

    def recorded(self) -> list[str]:
        return self.record.read_text().splitlines()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty machine with a checked out repository, which has the scenario, and a cache that was restored."""
    programs, workspace, home = (tmp_path / name for name in ("programs", "workspace", "home"))
    for folder in (programs, workspace, home / ".cache"):
        folder.mkdir(parents=True)
    for name in (*RECORDED, "setpriv"):
        program = programs / name
        program.write_text(PASS_ON if name == "setpriv" else RECORD)
        program.chmod(0o755)
    (workspace / "short.toml").write_text(SCENARIO)
    (home / ".cache/vhost-user-balloon").symlink_to(cache_root())
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "LANG"))}
    environment = kept | {
        "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "CI": "true",
        "RECORD": str(tmp_path / "record"),
    }
    return Place(workspace, environment, tmp_path / "record")


def ours(variables: Mapping[str, str]) -> dict[str, str]:
    """What a person sets, as a person would: the source, the scenario and how often; the rest is as it stands."""
    assert {"BALLOON_SOURCE", "SCENARIO", "REPEAT"} <= set(variables)
    return {**variables, "BALLOON_SOURCE": str(ROOT), "SCENARIO": "short.toml", "REPEAT": "1"}


def assert_measured(folder: Path) -> Report:
    """The result, and what the services read."""
    report = read_report(folder)
    assert report.passed
    assert [run.ending for run in report.runs] == ["measured"]
    assert {case.tag for case in ElementTree.parse(folder / "junit.xml").iter()} > {"testsuite", "testcase"}
    return report


def rewrite(baseline: Path, more: int) -> bytes:
    """Give every figure in bytes so many more: a later run is then surely no worse, or with fewer surely worse.

    Two runs of one guest differ by more than one run each can tell, and this is no test of compare.
    """
    report = read_report(baseline)
    text = msgspec.json.encode(
        msgspec.structs.replace(report, runs=[_shifted(run, more) for run in report.runs])
    )
    (baseline / NAME).write_bytes(text)
    return text


def _shifted(run: Run, more: int) -> Run:
    figures = {
        name: value + more if value is not None and find_figure(name).unit == "bytes" else value
        for name, value in run.figures.items()
    }
    return msgspec.structs.replace(run, figures=figures)


def test_github(place: Place) -> None:
    workspace = place.workspace
    workflow = load(GITHUB)
    temp, summary, output = (place.record.with_name(name) for name in ("temp", "summary", "output"))
    temp.mkdir()
    place.environment.update(
        {
            **ours(workflow["env"]),
            **workflow["jobs"]["measure"]["env"],
            "GITHUB_ACTIONS": "true",
            "GITHUB_WORKSPACE": str(workspace),
            "GITHUB_STEP_SUMMARY": str(summary),
            "GITHUB_OUTPUT": str(output),
            "RUNNER_TEMP": str(temp),
        }
    )
    place.must(github_steps("machine"))
    assert output.read_text() in ("options=--init\n", "options=--init --device /dev/kvm\n")
    steps = github_steps("measure")
    assert "Nothing to compare with yet." in place.must(steps)
    assert place.recorded()[0] == "apt-get update"
    assert (
        f"useradd --non-unique --uid {workspace.stat().st_uid} --user-group --create-home lab"
        in place.recorded()
    )
    assert_measured(workspace / "measured")
    assert "boot_seconds" in summary.read_text()
    assert (workspace / "baseline/result.json").read_bytes() == (
        workspace / "measured/result.json"
    ).read_bytes()
    (compare,) = (step for step in steps if step.name.startswith("Compare"))
    rewrite(workspace / "baseline", GIB)
    assert "NEW is no worse than OLD." in place.must([compare])
    rewrite(workspace / "baseline", -2 * GIB)
    assert place.run(compare).returncode == EXIT_CHECK_FAILED


@pytest.mark.full
def test_gitlab(place: Place) -> None:
    """On the default branch, then for a merge request, for which GitLab sets no CI_COMMIT_BRANCH: that only compares."""
    workspace = place.workspace
    variables = ours(load(GITLAB)["guest memory"]["variables"])
    assert variables["XDG_CACHE_HOME"] == "$CI_PROJECT_DIR/.cache"
    cache = workspace / ".cache"
    cache.mkdir()
    (cache / "vhost-user-balloon").symlink_to(cache_root())
    place.environment.update(
        {
            **variables,
            "XDG_CACHE_HOME": str(cache),
            "GITLAB_CI": "true",
            "CI_PROJECT_DIR": str(workspace),
            "CI_DEFAULT_BRANCH": "main",
        }
    )
    first = place.run(gitlab_step(), CI_COMMIT_BRANCH="main")
    assert first.returncode == 0, first.stdout
    assert "Nothing to compare with yet." in first.stdout
    assert place.recorded()[0] == "apt-get update"
    assert f"chown -R lab:lab {workspace}" in place.recorded()
    assert_measured(workspace / "measured")
    assert (workspace / "baseline" / NAME).read_bytes() == (workspace / "measured" / NAME).read_bytes()
    shutil.rmtree(workspace / "measured")
    baseline = rewrite(workspace / "baseline", GIB)
    assert "NEW is no worse than OLD." in place.must([gitlab_step()])
    assert (workspace / "baseline" / NAME).read_bytes() == baseline


@pytest.mark.full
def test_the_plain_script(place: Place) -> None:
    """Twice, as a server does that keeps its workspace: a result that is worse than the baseline does not become it."""
    workspace = place.workspace
    step = Step("measure.sh", f"exec {SHELL} short.toml --memory 192M", HOST_SHELL)
    assert "set it to what pip installs" in place.run(step).stdout
    more = {"BALLOON_SOURCE": str(ROOT), "REPEAT": "1", "KEEP": "yes"}
    first = place.run(step, **more)
    assert first.returncode == 0, first.stdout
    assert assert_measured(workspace / "measured").scenario.guest.memory == 192 << 20
    baseline = rewrite(workspace / "baseline", -GIB)
    second = place.run(step, OUT="again", BASELINE="baseline", **more)
    assert second.returncode == EXIT_CHECK_FAILED, second.stdout
    assert "NEW is WORSE than OLD" in second.stdout
    assert (workspace / "baseline" / NAME).read_bytes() == baseline
    assert not place.record.exists()
