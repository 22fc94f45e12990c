"""balloonlab simulate: what a person types, what is read off a fleet's samples, and fleets that are only counted."""

from __future__ import annotations

import csv
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from balloonlab import cli, signals
from balloonlab.durations import parse_duration
from balloonlab.errors import UsageError
from balloonlab.fleet import FleetPlan, FleetRun, moments, run_fleet
from balloonlab.fleet_results import FleetResult, result_of
from balloonlab.fleet_timeline import COLUMNS, FallWatch, Spread, gib_minutes, quantile
from guest_images.buddy import Zone
from guest_images.page_reporting import Parameters

MIB = 1 << 20
GIB = 1 << 30
PLAN = FleetPlan(4, 128 * MIB, "staggered", Parameters(order=7), duration=60.0)


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """After a signal main() leaves the handlers ignored."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in signals.ENDING}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(*words: str) -> int:
    try:
        return cli.main(["simulate", *words])
    except SystemExit as end:
        return int(str(end.code))


def live(plan: FleetPlan) -> FleetRun:
    return run_fleet(plan, lambda _sample: None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workload", "churm"], "invalid choice: 'churm' (choose from "),
        (["--memory", "100"], "a guest of 100 bytes cannot be modelled: give a multiple of 4 MiB, 32 MiB"),
        (["--memory", "lots"], "'lots' is no size: write it like 600M or 1.5G"),
        (["--memory", "-1G"], "expected one argument"),
        (["--guests", "0"], "--guests 0: give 1 to "),
        (["--guests", "many"], "invalid int value: 'many'"),
        (["--duration", "ten"], "'ten' is no duration: write it like 100ms, 2s or 10min"),
        (["--duration", "0s"], "--duration 0s: give more than nothing"),
        (["--sample", "0"], "--sample 0: give more, for "),
        (["--sample", "1ms"], "--sample 1ms: give more, for "),
        (["--delay", "0s"], "a delay of 0.0 s cannot be kept: give more than 0"),
        (["--order", "11"], "order 11 cannot be reported: give 0 to 10"),
        (["--model", "blocks", "--order", "0"], "--model blocks cannot tell --order 0: give 9 or 10, or "),
        (["--capacity", "0"], "capacity 0 and share 16 must be 1 or more"),
        (["--budget", "half"], "--budget half: give a number, or none"),
        (["--budget", "0"], "capacity 32 and share 0 must be 1 or more"),
        (["--variant", "v17", "--budget", "16"], "the v17 patch has no budget"),
        (["--variant", "v18"], "invalid choice: 'v18'"),
        (["--seed=-1"], "--seed -1: give 0 or more"),
        (["--resident-limit", "some"], "'some' is no size"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    output, error = capsys.readouterr()
    assert said in error
    assert error.count("\n") == 1
    assert not output
    assert not list(tmp_path.iterdir())


def test_a_run_folder_without_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--guests=3",
        "--memory=128M",
        "--order=7",
        "--duration=130s",
        "--resident-limit=0",
        "--out=here",
    ]
    assert run(*words) == 0
    output = capsys.readouterr().out
    assert "0 devices" in output
    assert "Counted only, no page was written." in output
    folder = tmp_path / "here"
    names = {"meta.json", "result.json", "timeline.csv", "timeline.png"}
    assert {path.name for path in folder.iterdir()} == names
    result = msgspec.json.decode((folder / "result.json").read_bytes(), type=FleetResult)
    rows = list(csv.DictReader((folder / "timeline.csv").read_text().splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 131
    assert int(rows[-1]["reported_bytes"]) == result.reported_bytes > 0
    assert max(int(row["footprint_bytes"]) for row in rows) == result.peak_bytes
    assert all(row["resident_bytes"] == "" for row in rows)
    assert result.footprint_gib_minutes > result.used_gib_minutes > 0
    assert result.settle.falls == 3
    assert result.devices.cpu_seconds == 0.0
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    assert run("--out", "mine") == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_seed_repeats_and_another_does_not() -> None:
    plan = replace(PLAN, workload="churn")
    first, again, other = live(plan), live(plan), live(replace(plan, seed=2))
    assert (first.digest, first.reports, first.samples) == (again.digest, again.reports, again.samples)
    assert first.digest != other.digest
    assert first.reports > 0


def test_guests_that_report_nothing_keep_what_they_touched() -> None:
    reporting, silent = live(PLAN), live(replace(PLAN, reporting=False))
    assert silent.reports == 0
    held = [sample.footprint_bytes for sample in silent.samples]
    assert held == sorted(held)
    assert result_of(silent).footprint_gib_minutes > 1.1 * result_of(reporting).footprint_gib_minutes


def test_samples_end_with_the_run() -> None:
    assert list(moments(replace(PLAN, duration=2.5))) == [0.0, 1.0, 2.0, 2.5]
    assert list(moments(replace(PLAN, duration=2.0, sample_seconds=0.5)))[-1] == 2.0


@pytest.mark.parametrize(
    ("text", "seconds"), [("10min", 600), ("2s", 2), ("100ms", 0.1), ("1.5 h", 5400), ("7", 7)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "2 weeks", "1e3", "nan"])
def test_no_durations(text: str) -> None:
    with pytest.raises(UsageError, match="is no duration"):
        parse_duration(text)


def test_quantiles_and_areas() -> None:
    assert Spread.of([5, 1, 4, 2, 3]) == Spread(1, 2, 3, 4, 5)
    assert Spread.of([7]) == Spread(7, 7, 7, 7, 7)
    assert quantile([], 0.5) == 0.0
    assert gib_minutes([(0, GIB), (60, GIB), (120, 3 * GIB)]) == pytest.approx(3.0)
    assert gib_minutes([(0, GIB)]) == 0.0


def test_a_fall_is_timed_from_the_last_sample_before_it() -> None:
    watch = FallWatch(160)
    for seconds, used, held in [
        (0, 100, 100),
        (1, 20, 100),
        (2, 20, 60),
        (3, 20, 28),
        (4, 20, 20),
        (9, 20, 20),
    ]:
        watch.sample(seconds, used, held)
    assert watch.settle_seconds == []
    watch.end()
    assert watch.settle_seconds == [3]
    watch.end()
    assert watch.settle_seconds == [3]


def test_a_fall_ends_where_use_changes_again() -> None:
    watch = FallWatch(160)
    for seconds, used, held in [(0, 100, 100), (1, 20, 50), (2, 90, 90), (3, 90, 90), (4, 5, 90), (5, 5, 5)]:
        watch.sample(seconds, used, held)
    watch.end()
    assert watch.settle_seconds == [1, 2]


def test_a_host_that_gets_nothing_back_has_no_fall() -> None:
    watch = FallWatch(160)
    for seconds, used, held in [(0, 100, 100), (1, 20, 100), (2, 20, 95)]:
        watch.sample(seconds, used, held)
    watch.end()
    assert watch.settle_seconds == []


def test_ctrl_c_in_the_middle_of_a_pass_is_ctrl_c_and_no_lost_page(monkeypatch: pytest.MonkeyPatch) -> None:
    isolate, calls = Zone.isolate, []

    def interrupted(zone: Zone, pfn: int) -> bool:
        calls.append(pfn)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return isolate(zone, pfn)

    monkeypatch.setattr(Zone, "isolate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        live(PLAN)
