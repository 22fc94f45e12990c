"""The table of kernels: one that cannot be measured is named, and keeps nobody from the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from balloonlab.measure.report import NAME
from balloonlab.results import write_json
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_USAGE
from tests import kernels, measured


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kernels, "FOLDER", tmp_path / "results")
    return tmp_path / "results"


def measuring(statuses: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have kernels end with these statuses, and with a report where it is 0 or 1. Returns what is measured, as it is."""
    done: list[str] = []

    def measure(kernel: str, _scenario: Path, _repeat: int, folder: Path) -> int:
        done.append(kernel)
        folder.mkdir()
        if statuses[kernel] <= EXIT_CHECK_FAILED:
            write_json(measured.report([measured.run()], kernel=f"Linux of {kernel}"), folder / NAME)
        return statuses[kernel]

    monkeypatch.setattr(kernels, "measure", measure)
    return done


def test_a_kernel_that_cannot_be_measured_is_named_and_the_others_are_measured(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = {"bookworm": 0, "forky": EXIT_USAGE, "bookworm/amd64": EXIT_CHECK_FAILED}
    done = measuring(statuses, monkeypatch)
    assert kernels.main(list(statuses)) == EXIT_USAGE
    assert done == list(statuses)
    lines = (results / "kernels.md").read_text().splitlines()
    assert "| | bookworm | bookworm/amd64 |" in lines
    assert "| Linux | Linux of bookworm | Linux of bookworm/amd64 |" in lines
    assert "- **forky was not measured**: status 2" in lines
    document = json.loads((results / "kernels.json").read_text())
    assert (list(document["kernels"]), document["not_measured"]) == (
        ["bookworm", "bookworm/amd64"],
        {"forky": 2},
    )


def test_where_nothing_was_measured_the_results_stay(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring({"forky": EXIT_USAGE}, monkeypatch)
    assert kernels.main(["forky"]) == EXIT_USAGE
    assert not results.exists()


def test_all_measured(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring({"forky": 0}, monkeypatch)
    assert kernels.main(["forky"]) == 0
    assert "not measured" not in (results / "kernels.md").read_text()
