"""What becomes of the ready jobs of docs/ci/ by what a comparison says, and of a workspace that a build was in before.

No guest: a stand-in measures by copying a result that was made before. The comparison is real, and so is the shell; what
else the services do is tests/guest/test_ci_jobs_run.py's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from balloonlab.measure.report import NAME, Report
from balloonlab.measure.scenario_file import STANDARD
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS, EXIT_UNSUPPORTED, EXIT_USAGE
from tests.ci_jobs import (
    GITHUB,
    HOST_SHELL,
    ROOT,
    SHELL,
    Place,
    Step,
    empty_place,
    github_steps,
    gitlab_step,
    load,
    write_program,
)
from tests.recorded_series import FIGURES, KEPT, leave, made_report, made_run

# As measure does, it refuses a folder that has something in it, and leaves a result also where a budget is broken.
LAB = f"""#!/bin/sh
case $1 in
measure)
    while [ "$1" != --out ]; do shift; done
    mkdir "$2" && cp "$RESULT" "$2/{NAME}" || exit {EXIT_USAGE}
    exit "${{MEASURED:-0}}" ;;
compare) exec {sys.executable} -m balloonlab.cli "$@" ;;
esac
"""
SIX = range(1, 7)
GOOD = made_report(*(made_run(number, FIGURES) for number in SIX))
WORSE = made_report(*(made_run(number, KEPT) for number in SIX))
OTHER = msgspec.structs.replace(
    WORSE, scenario=msgspec.structs.replace(STANDARD, guest=msgspec.structs.replace(STANDARD.guest, cpus=2))
)


@dataclass(frozen=True)
class Job:
    """A whole job but its installation. run: with further variables; the status and what it said."""

    place: Place
    run: Callable[[dict[str, str]], subprocess.CompletedProcess[str]]

    def measures(
        self, report: Report, *, branch: bool = False, accepted: bool = False, measured: int = EXIT_PASS
    ) -> subprocess.CompletedProcess[str]:
        """branch: the one that others are compared with. measured: how measure ends."""
        result = self.place.record.with_name("result")
        result.write_bytes(msgspec.json.encode(report))
        return self.run(
            {
                "RESULT": str(result),
                "MEASURED": str(measured),
                "BRANCH": "yes" if branch else "no",
                "ACCEPTED": "yes" if accepted else "no",
            }
        )

    @property
    def baseline(self) -> Path:
        return self.place.workspace / "baseline"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A machine on which nothing is installed, for it is there."""
    machine = empty_place(tmp_path)
    machine.environment["PYTHONPATH"] = str(ROOT)
    write_program(tmp_path / "programs/python3", "#!/bin/sh\n")
    return machine


def have_lab(folder: Path) -> None:
    folder.mkdir(parents=True)
    write_program(folder / "balloonlab", LAB)
    write_program(folder / "pip", "#!/bin/sh\n")


def github(place: Place) -> Job:
    """Its last steps run on the default branch only, by a condition that is not shell."""
    temp = place.record.with_name("temp")
    have_lab(temp / "balloon/bin")
    place.environment.update(
        {"RUNNER_TEMP": str(temp), "AS_LAB": "", "SCENARIO": "short.toml", "REPEAT": "6"}
    )
    steps = {step.name.split()[0]: step for step in github_steps("measure")}

    def run(more: dict[str, str]) -> subprocess.CompletedProcess[str]:
        accept = {"ACCEPT": "true" if "yes" in (more["BRANCH"], more["ACCEPTED"]) else "false"}
        wanted = ["Measure", "Compare", *(["Keep"] if more["BRANCH"] == "yes" else [])]
        subprocess.run(["rm", "-rf", "measured"], cwd=place.workspace, check=True)  # a new container
        said = ""
        for name in wanted:
            ran = place.run(steps[name], **more, **accept)
            said += ran.stdout
            if ran.returncode:
                break
        return subprocess.CompletedProcess(wanted, ran.returncode, said)

    return Job(place, run)


def gitlab(place: Place) -> Job:
    have_lab(place.workspace / ".venv-balloon/bin")
    place.environment.update(
        {
            "AS_LAB": "",
            "BALLOON_SOURCE": "none",
            "SCENARIO": "short.toml",
            "REPEAT": "6",
            "CI_PROJECT_DIR": str(place.workspace),
            "CI_DEFAULT_BRANCH": "main",
        }
    )

    def run(more: dict[str, str]) -> subprocess.CompletedProcess[str]:
        subprocess.run(
            ["rm", "-rf", "measured"], cwd=place.workspace, check=True
        )  # as the runner's git clean
        branch = {"CI_COMMIT_BRANCH": "main"} if more["BRANCH"] == "yes" else {}
        labels = "fast,guest-memory-accepted,kernel" if more["ACCEPTED"] == "yes" else "fast,kernel"
        return place.run(gitlab_step(), **more, **branch, CI_MERGE_REQUEST_LABELS=labels)

    return Job(place, run)


def plain(place: Place) -> Job:
    have_lab(place.workspace / ".venv-balloon/bin")
    place.environment["BALLOON_SOURCE"] = "none"
    step = Step("measure.sh", f"exec {SHELL} short.toml", HOST_SHELL)
    return Job(place, lambda more: place.run(step, **more, KEEP=more["BRANCH"], ACCEPT=more["ACCEPTED"]))


@pytest.fixture(params=[github, gitlab, plain], ids=lambda service: service.__name__)
def job(request: pytest.FixtureRequest, place: Place) -> Job:
    made: Job = request.param(place)
    return made


def test_without_a_baseline_a_run_passes_and_only_the_branch_s_is_kept(job: Job) -> None:
    assert job.measures(GOOD).returncode == EXIT_PASS
    assert not job.baseline.exists()
    ran = job.measures(GOOD, branch=True)
    assert (ran.returncode, "Nothing to compare with yet." in ran.stdout) == (EXIT_PASS, True)
    assert (job.baseline / NAME).read_bytes() == msgspec.json.encode(GOOD)


def test_what_got_worse_fails_a_change_until_it_is_accepted_or_merged(job: Job) -> None:
    """Then the next change is compared with what was merged, and passes."""
    leave(GOOD, job.baseline)
    ran = job.measures(WORSE)
    assert ran.returncode == EXIT_CHECK_FAILED
    assert "NEW is WORSE than OLD" in ran.stdout
    ran = job.measures(WORSE, accepted=True)
    assert (ran.returncode, "It got worse, which is accepted here." in ran.stdout) == (EXIT_PASS, True)
    assert (job.baseline / NAME).read_bytes() == msgspec.json.encode(GOOD)
    ran = job.measures(WORSE, branch=True)
    assert (ran.returncode, "It got worse, which is accepted here." in ran.stdout) == (EXIT_PASS, True)
    assert (job.baseline / NAME).read_bytes() == msgspec.json.encode(WORSE)
    assert job.measures(WORSE).returncode == EXIT_PASS


def test_another_scenario_locks_nobody_out(job: Job) -> None:
    leave(GOOD, job.baseline)
    for branch in (False, True):
        ran = job.measures(OTHER, branch=branch)
        assert (ran.returncode, "It cannot be compared" in ran.stdout) == (EXIT_PASS, True), ran.stdout
        assert "did not measure the same" in ran.stdout
    assert (job.baseline / NAME).read_bytes() == msgspec.json.encode(OTHER)
    assert "It cannot be compared" not in job.measures(OTHER).stdout


def test_a_baseline_that_cannot_be_read_locks_nobody_out(job: Job) -> None:
    job.baseline.mkdir()
    (job.baseline / NAME).write_text("{")
    assert job.measures(GOOD, branch=True).returncode == EXIT_PASS
    assert (job.baseline / NAME).read_bytes() == msgspec.json.encode(GOOD)


@pytest.mark.parametrize("status", [EXIT_CHECK_FAILED, EXIT_USAGE, EXIT_UNSUPPORTED])
def test_a_broken_budget_is_accepted_nowhere(job: Job, status: int) -> None:
    leave(GOOD, job.baseline)
    ran = job.measures(WORSE, branch=True, accepted=True, measured=status)
    assert ran.returncode == status
    assert (job.baseline / NAME).read_bytes() == msgspec.json.encode(GOOD)


def test_github_accepts_by_the_branch_and_by_a_label() -> None:
    """What its tests here play: the condition is GitHub's own language."""
    (step,) = (one for one in load(GITHUB)["jobs"]["measure"]["steps"] if "Compare" in one.get("name", ""))
    assert "github.ref_name == github.event.repository.default_branch ||" in step["env"]["ACCEPT"]
    assert "labels.*.name, 'guest-memory-accepted')" in step["env"]["ACCEPT"]


# The plain script alone: its workspace is the one of the build before


@pytest.mark.parametrize("out", [None, "a b/", "run"])
def test_the_build_before_is_moved_aside_and_no_older_one_kept(place: Place, out: str | None) -> None:
    job = plain(place)
    name = out or "measured"
    if out is not None:
        place.environment["OUT"] = out
    for report in (OTHER, WORSE, GOOD):
        assert job.measures(report).returncode == EXIT_PASS
    folder = place.workspace / name.rstrip("/")
    assert (folder / NAME).read_bytes() == msgspec.json.encode(GOOD)
    before = folder.with_name(f"{folder.name}.before")
    assert [path.name for path in before.iterdir()] == [NAME]
    assert (before / NAME).read_bytes() == msgspec.json.encode(WORSE)


@pytest.mark.parametrize("program", ["python3", "pip"])
def test_an_installation_that_fails_is_no_broken_budget(place: Place, program: str) -> None:
    job = plain(place)
    there = {"python3": place.record.with_name("programs"), "pip": place.workspace / ".venv-balloon/bin"}
    write_program(there[program] / program, "#!/bin/sh\nexit 1\n")
    assert job.measures(GOOD).returncode == EXIT_USAGE
    assert not (place.workspace / "measured").exists()


BACKEND = """
import zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    about = "vhost_user_balloon-1.0.dist-info/"
    with zipfile.ZipFile(f"{directory}/vhost_user_balloon-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write("stand_in.py")
        wheel.writestr(about + "METADATA", "Metadata-Version: 2.1\\nName: vhost-user-balloon\\nVersion: 1.0\\n")
        wheel.writestr(about + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(about + "entry_points.txt", "[console_scripts]\\nballoonlab = stand_in:main\\n")
        wheel.writestr(about + "RECORD", "")
    return "vhost_user_balloon-1.0-py3-none-any.whl"
"""


@pytest.mark.full
def test_the_script_installs_what_the_source_has_now(tmp_path: Path) -> None:
    """A commit that leaves the version number as it was, for which pip alone installs nothing."""
    place = empty_place(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (source / "backend.py").write_text(BACKEND)
    git = ["git", "-C", str(source), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    step = Step("measure.sh", f"exec {SHELL} short.toml", HOST_SHELL)
    place.environment["BALLOON_SOURCE"] = f"git+file://{source}"
    for commit in ("first", "second"):
        (source / "stand_in.py").write_text(f"def main():\n    print('this is the {commit}')\n")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "--message", commit], check=True)
        ran = place.run(step)
        assert ran.returncode == EXIT_PASS, ran.stdout
        assert f"this is the {commit}" in ran.stdout
