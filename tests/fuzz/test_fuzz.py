"""A short run of the fuzzer on all targets, two at a time, seeded; a longer one in the full tier. Nothing may be found."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import campaign, targets
from tests.fuzz.campaign import Job

SECONDS = 20
FULL_SECONDS = 120
MIN_EDGES = 100
AT_ONCE = 2
# So many follow each other in each of the places.
TURNS = math.ceil(len(targets.NAMES) / AT_ONCE)


@pytest.fixture(autouse=True)
def atheris(unmet: Callable[[str], None]) -> None:
    if importlib.util.find_spec("atheris") is None:
        unmet("atheris is not installed: pip install 'atheris>=3,<4'")


def fuzz(seconds: int, folder: Path) -> None:
    jobs = [Job(name, seconds, folder / name, seed=1) for name in targets.NAMES]
    outcomes = list(campaign.fuzz(jobs, at_once=AT_ONCE))
    assert {each.target for each in outcomes} == {*targets.NAMES}
    assert [each.target for each in outcomes if each.executions == 0] == []
    # Without the device instrumented there would be none but of the input's own branches.
    assert [each.target for each in outcomes if each.edges < MIN_EDGES] == []
    wrong = [f"{each.target}: {each.findings}\n{each.text}" for each in outcomes if not each.is_well]
    assert wrong == [], "\n".join(wrong)


@pytest.mark.timeout(TURNS * (SECONDS + campaign.MORE_SECONDS))
def test_fuzz(tmp_path: Path) -> None:
    fuzz(SECONDS, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(TURNS * (FULL_SECONDS + campaign.MORE_SECONDS))
def test_fuzz_longer(tmp_path: Path) -> None:
    fuzz(FULL_SECONDS, tmp_path)


# Far above what a fuzzer's process holds, some 150 MiB.
LIMIT_MIB, ONCE_HELD_MIB = 600, 1200
ONCE_LARGE = f"""
import mmap, sys
from pathlib import Path
from tests.fuzz import campaign
mmap.mmap(-1, {ONCE_HELD_MIB} << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
campaign.MEMORY_MIB = {LIMIT_MIB}
(outcome,) = campaign.fuzz([campaign.Job("pfns", 3, Path(sys.argv[1]), seed=1)])
assert outcome.is_well, outcome
"""


@pytest.mark.timeout(3 + campaign.MORE_SECONDS)
def test_what_the_caller_once_held_is_no_finding(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ONCE_LARGE, tmp_path], check=True)
