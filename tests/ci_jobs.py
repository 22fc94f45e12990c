"""The ready jobs of docs/ci/ taken apart: their shell, in order, as the services run it. Not a test; used by two."""

from __future__ import annotations

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
