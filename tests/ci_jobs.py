"""The ready jobs of docs/ci/ taken apart: their shell, in order, and the machine that it is run on. Used by three tests.

What only a container's root can do is written down instead of done: apt-get, useradd, chown and chmod; setpriv, which
changes to a user that is not there, runs what it is given.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
CI = ROOT / "docs/ci"
GITHUB, GITLAB, SHELL = CI / "github-actions.yml", CI / "gitlab-ci.yml", CI / "measure.sh"

# What a service starts a step's script with where the job names no shell: GitHub outside of a container and in one that
# has no bash on its list; GitLab where the image has bash, as Debian's has.
HOST_SHELL = ("bash", "-e")
CONTAINER_SHELL = ("sh", "-e")
GITLAB_SHELL = ("bash", "-eo", "pipefail")

STEP_SECONDS = 300.0
RECORDED = ("apt-get", "useradd", "chown", "chmod")
RECORD = '#!/bin/sh\necho "${0##*/} $*" >> "$RECORD"\n'
# setpriv's own options end with the first word that has no dash.
PASS_ON = '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n'


@dataclass(frozen=True)
class Step:
    """One script. shell: what it is given to, as a file."""

    name: str
    script: str
    shell: tuple[str, ...]


def load(path: Path) -> Any:  # noqa: ANN401
    """Read YAML 1.2, in which ``on`` is a word."""
    return YAML(typ="safe", pure=True).load(path.read_text())


def github_steps(job: str) -> list[Step]:
    """Return the run steps of one job."""
    described = load(GITHUB)["jobs"][job]
    shell = CONTAINER_SHELL if "container" in described else HOST_SHELL
    return [Step(step["name"], step["run"], shell) for step in described["steps"] if "run" in step]


def gitlab_step() -> Step:
    """Return the job's script: before_script and script are one, a line of the list after the other."""
    job = load(GITLAB)["guest memory"]
    return Step("script", "\n".join([*job["before_script"], *job["script"]]), GITLAB_SHELL)


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

    @property
    def cache(self) -> Path:
        return Path(self.environment["HOME"]) / ".cache"

    def recorded(self) -> list[str]:
        return self.record.read_text().splitlines()


def empty_place(folder: Path) -> Place:
    """Make a machine with an empty workspace, in an empty folder."""
    programs, workspace, home = (folder / name for name in ("programs", "workspace", "home"))
    for one in (programs, workspace, home):
        one.mkdir()
    for name in (*RECORDED, "setpriv"):
        write_program(programs / name, PASS_ON if name == "setpriv" else RECORD)
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "LANG"))}
    environment = kept | {
        "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "CI": "true",
        "RECORD": str(folder / "record"),
    }
    return Place(workspace, environment, folder / "record")


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
