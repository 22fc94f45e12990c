"""The ready jobs of docs/ci/ as the services run them: their shell as it stands, in order, in one environment.

pip, the new virtual environment, QEMU and the guest are real; tests/ci_jobs.py says what is not. What is no shell is played:
the restored cache is this machine's, the restored baseline the result of the run before. What a comparison makes of a job
is tests/unit/test_ci_jobs_decide.py's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from balloonlab.measure.figures import find_figure
from balloonlab.measure.report import NAME, Report, Run, read_report
from hostdev.errors import EXIT_USAGE
from qmp_glue.debian import cache_root
from tests.ci_jobs import (
    GITHUB,
    GITLAB,
    HOST_SHELL,
    ROOT,
    SHELL,
    Place,
    Step,
    empty_place,
    github_steps,
    gitlab_step,
    load,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

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


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A machine whose repository has the scenario, and a cache that was restored."""
    machine = empty_place(tmp_path)
    (machine.workspace / "short.toml").write_text(SCENARIO)
    machine.cache.mkdir(parents=True)
    (machine.cache / "vhost-user-balloon").symlink_to(cache_root())
    return machine


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
    """Give every figure in bytes so many more: a later run is then surely no worse.

    Two runs of one guest differ by more than one run each can tell, and this is no test of compare.
    """
    report = read_report(baseline)
    text = msgspec.json.encode(
        msgspec.structs.replace(report, runs=[_shifted(run, more) for run in report.runs])
    )
    (baseline / NAME).write_bytes(text)
    return text


def assert_compared(said: str) -> None:
    assert "Nothing to compare with yet." not in said
    assert "It cannot be compared" not in said
    assert "It got worse" not in said


def _shifted(run: Run, more: int) -> Run:
    figures = {
        name: value + more if value is not None and find_figure(name).unit == "bytes" else value
        for name, value in run.figures.items()
    }
    return msgspec.structs.replace(run, figures=figures)


@pytest.mark.full
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
            "ACCEPT": "false",
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
    assert_compared(place.must([compare]))


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
    assert_compared(place.must([gitlab_step()]))
    assert (workspace / "baseline" / NAME).read_bytes() == baseline


def test_the_plain_script(place: Place) -> None:
    workspace = place.workspace
    step = Step("measure.sh", f"exec {SHELL} short.toml --memory 192M", HOST_SHELL)
    refused = place.run(step)
    assert "set it to what pip installs" in refused.stdout
    assert refused.returncode == EXIT_USAGE
    ran = place.run(step, BALLOON_SOURCE=str(ROOT), REPEAT="1", KEEP="yes")
    assert ran.returncode == 0, ran.stdout
    assert "Nothing to compare with yet." in ran.stdout
    assert assert_measured(workspace / "measured").scenario.guest.memory == 192 << 20
    assert (workspace / "baseline" / NAME).read_bytes() == (workspace / "measured" / NAME).read_bytes()
    assert not place.record.exists()
