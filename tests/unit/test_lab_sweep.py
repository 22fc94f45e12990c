"""balloonlab simulate --sweep: grids as typed, the levers, and the table with its files."""

from __future__ import annotations

import csv
from pathlib import Path

import msgspec
import pytest

from balloonlab import cli, sweep
from balloonlab.errors import UsageError
from balloonlab.fleet_results import FleetResult

SMALL = ["--guests=3", "--memory=128M", "--workload=churn", "--duration=40s", "--out=here"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> int:
    try:
        return cli.main(["simulate", *SMALL, "--sweep", *words])
    except SystemExit as end:
        return int(str(end.code))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected at least one argument"),
        (["ordre=0,9"], "--sweep ordre=0,9: write NAME=VALUE,VALUE with a name of order, delay, capacity"),
        (["order"], "--sweep order: write NAME=VALUE,VALUE"),
        (["order=0,,9"], "--sweep order=0,,9: a value is missing or there twice"),
        (["order=9,9"], "--sweep order=9,9: a value is missing or there twice"),
        (["order="], "--sweep order=: a value is missing"),
        (["order=0", "order=9"], "--sweep has order twice: give all of its values at once"),
        (["order=nine"], "--sweep order=nine: give whole numbers"),
        (["order=0,11"], "order 11 cannot be reported: give 0 to 10"),
        (["delay=2s,fast"], "'fast' is no duration: write it like 100ms, 2s or 10min"),
        (["delay=0s"], "a delay of 0.0 s cannot be kept"),
        (["capacity=-1"], "--sweep capacity=-1: give whole numbers"),
        (["capacity=0"], "capacity 0 and share 16 must be 1 or more"),
        (["variant=v17,v18"], "--sweep variant=v18: give merged or v17"),
        (["variant=v17", "budget=4"], "the v17 patch has no budget"),
        (["order=0,9", "--model=blocks"], "--model blocks cannot tell --order 0"),
        ([f"capacity={','.join(map(str, range(1, 202)))}"], "--sweep has 201 combinations: give 200 at most"),
    ],
)
def test_a_grid_with_a_typo_is_one_line_and_status_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    output, error = capsys.readouterr()
    assert said in error
    assert error.count("\n") == 1
    assert not output
    assert not list(tmp_path.iterdir())


def test_the_last_name_varies_fastest() -> None:
    cells = sweep.parse_grid(["order=0,9", "delay=2s,100ms"])
    assert [tuple(value for _name, value in cell) for cell in cells] == [
        ("0", "2s"),
        ("0", "100ms"),
        ("9", "2s"),
        ("9", "100ms"),
    ]
    with pytest.raises(UsageError):
        sweep.parse_grid(["=1"])


def test_levers() -> None:
    footprints = {(0, 1.0, 32): 50.0, (9, 1.0, 32): 80.0, (0, 2.0, 32): 52.0, (9, 2.0, 32): 84.0}
    order, delay, capacity = sweep.leverage(footprints, 100.0)
    assert order == pytest.approx(0.31)
    assert delay == pytest.approx(0.03)
    assert capacity == 0.0


def test_the_papers_lever_is_the_order() -> None:
    order, delay, capacity = sweep.leverage(sweep.PAPER, sweep.PAPER_WITHOUT)
    assert order > 5 * delay > 5 * capacity > 0
    assert all(0.5 < footprint / sweep.PAPER_WITHOUT < 1 for footprint in sweep.PAPER.values())


def test_a_table_and_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the model too: less is held with a lower order, and the delay hardly matters."""
    assert run("order=0,9", "delay=100ms,2s", "capacity=4") == 0
    output = capsys.readouterr().out
    assert "0 devices" in output
    assert output.count("\nmerged ") == 4
    assert "in the HyperAlloc paper" in output
    folder = tmp_path / "here"
    assert {path.name for path in folder.iterdir()} == {"meta.json", "sweep.json", "sweep.csv"}
    results = msgspec.json.decode((folder / "sweep.json").read_bytes(), type=list[FleetResult])
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [row["reporting"] for row in rows] == ["False", "True", "True", "True", "True"]
    assert [int(row["reports"]) for row in rows] == [result.reports for result in results]
    without, *held = [result.footprint_gib_minutes for result in results]
    assert max(held[:2]) < min(held[2:]) <= max(held[2:]) < without


def test_grids_without_a_lever_say_what_they_can(capsys: pytest.CaptureFixture[str]) -> None:
    """Variants share their other parameters; and 128 MiB never have 512 free blocks of 2 MiB."""
    assert run("variant=merged,v17", "capacity=512") == 0
    output = capsys.readouterr().out
    assert "moves the footprint" not in output
    assert "where nothing was reported" in output


def test_devices_where_a_limit_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("order=7", "--resident-limit=1G") == 0
    assert "3 devices" in capsys.readouterr().out
    results = msgspec.json.decode((tmp_path / "here" / "sweep.json").read_bytes(), type=list[FleetResult])
    assert [result.devices.count for result in results] == [3, 3]
    assert results[1].devices.cpu_seconds > 0
    assert all(result.passed for result in results)
