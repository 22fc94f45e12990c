"""A short run of the fuzzer on each target, two at a time, seeded; longer ones in the full tier. Nothing may be found."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import campaign, targets
from tests.fuzz.campaign import Job

SECONDS = 20
FULL_SECONDS = 120
MIN_EDGES = 100
PAIRS = [targets.NAMES[place : place + 2] for place in range(0, len(targets.NAMES), 2)]


@pytest.fixture(autouse=True)
def atheris(unmet: Callable[[str], None]) -> None:
    if importlib.util.find_spec("atheris") is None:
        unmet("atheris is not installed: pip install 'atheris>=3,<4'")


def fuzz(names: tuple[str, ...], seconds: int, folder: Path) -> None:
    outcomes = list(campaign.fuzz([Job(name, seconds, folder / name, seed=1) for name in names]))
    assert [each.target for each in outcomes if each.executions == 0] == []
    # Without the device instrumented there would be none but of the input's own branches.
    assert [each.target for each in outcomes if each.edges < MIN_EDGES] == []
    wrong = [f"{each.target}: {each.findings}\n{each.text}" for each in outcomes if not each.is_well]
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_fuzz(names: tuple[str, ...], tmp_path: Path) -> None:
    fuzz(names, SECONDS, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(FULL_SECONDS + campaign.MORE_SECONDS + 60)
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_fuzz_longer(names: tuple[str, ...], tmp_path: Path) -> None:
    fuzz(names, FULL_SECONDS, tmp_path)
