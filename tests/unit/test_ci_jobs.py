"""The ready jobs of docs/ci/ without running them: linters and published schemas have nothing to say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.ci_jobs import CI, GITHUB, GITLAB, ROOT, SHELL, Step, github_steps, gitlab_step, load

# Programs that pip installs are beside the interpreter.
TOOLS = Path(sys.executable).parent
STEPS = [*github_steps("machine"), *github_steps("measure"), gitlab_step()]


def output_of(command: Sequence[str | Path]) -> str:
    environment = os.environ | {"PATH": f"{TOOLS}:{os.environ['PATH']}"}
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    return f"{ran.stdout}{ran.stderr}" if ran.returncode else ""


def test_actionlint_is_clean(tmp_path: Path) -> None:
    """It has shellcheck read the steps; and it does find what is wrong.

    Skipped without it also where CI=true: it is in no package index but as forks of people unknown.
    """
    if (actionlint := shutil.which("actionlint")) is None:
        pytest.skip("not run: actionlint is not on PATH; github.com/rhysd/actionlint has it")
    assert output_of([actionlint, GITHUB]) == ""
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(GITHUB.read_text().replace("needs: machine", "needs: nobody"))
    assert 'job "nobody" which does not exist' in output_of([actionlint, wrong])


@pytest.mark.parametrize(("file", "schema"), [(GITHUB, "github-workflows"), (GITLAB, "gitlab-ci")])
def test_published_schemas_take_them(tmp_path: Path, file: Path, schema: str) -> None:
    command: list[str | Path] = [TOOLS / "check-jsonschema", "--builtin-schema", f"vendor.{schema}"]
    assert output_of([*command, file]) == ""
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(file.read_text().replace("image: debian:trixie", "image: [1]"))
    assert output_of([*command, wrong]) != ""


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_shellcheck_has_read_each_step(tmp_path: Path, step: Step) -> None:
    script = tmp_path / "script"
    script.write_text(step.script)
    assert output_of([TOOLS / "shellcheck", f"--shell={step.shell[0]}", script]) == ""


def test_shellcheck_has_read_the_script() -> None:
    assert os.access(SHELL, os.X_OK)
    assert output_of([TOOLS / "shellcheck", SHELL]) == ""


def test_what_they_name_is_there() -> None:
    """All three measure the same scenario, and this repository has it."""
    workflow, job = load(GITHUB), load(GITLAB)["guest memory"]
    assert workflow["env"]["SCENARIO"] == job["variables"]["SCENARIO"]
    assert (ROOT / workflow["env"]["SCENARIO"]).is_file()
    assert f"scenario=${{1:-{workflow['env']['SCENARIO']}}}" in SHELL.read_text()


def test_all_of_them_are_described() -> None:
    described = (CI / "README.md").read_text()
    assert [path.name for path in CI.iterdir() if f"]({path.name})" not in described] == ["README.md"]
