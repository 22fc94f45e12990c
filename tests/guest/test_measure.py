"""balloonlab measure on real guests: its figures, judged by readers of their own, and what it makes of guests that go wrong."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import pytest

from balloonlab.cli import main
from balloonlab.decode import read_trace
from balloonlab.measure.report import Ending, Report, Run, read_report
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS, EXIT_USAGE
from hostdev.wire.balloon import Role
from hostdev.wire.trace import Kind

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

MIB = 1 << 20


@dataclass(frozen=True)
class Measured:
    """What the command left: its exit status, its report and where that is."""

    status: int
    report: Report
    folder: Path

    @property
    def run(self) -> Run:
        return self.report.runs[0]


def measure(tmp_path: Path, scenario: str, *options: str) -> Measured:
    """Measure a scenario as a person would, by the command line."""
    file, folder = tmp_path / "scenario.toml", tmp_path / "out"
    file.write_text(scenario)
    status = main(["measure", str(file), "--out", str(folder), *options])
    return Measured(status, read_report(folder), folder)


# --- a guest that is well ---

WELL = """
[guest]
memory = "384M"
page_reporting_order = 9
files = { "/root/said" = "said" }

[[phase]]
do = "idle"
name = "floor"

[[phase]]
do = "fill"
size = "160M"

[[phase]]
do = "free"
name = "return"

[[phase]]
do = "run"
command = "cat /root/said; exit 4"
status = 4

[budget]
residual = "200M"
returned = { least = "128M" }
"return.peak" = "350M"
"""


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("well")
    (folder / "said").write_text("so it is\n")
    return measure(folder, WELL, "--budget", "t90=60s")


def samples(measured: Measured) -> list[dict[str, str]]:
    with (measured.folder / measured.run.folder / "timeline.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_guest_that_is_well_passes(well: Measured) -> None:
    assert well.status == EXIT_PASS
    assert well.report.passed
    assert well.run.ending == "measured"
    assert [check.outcome for check in well.report.arms[0].checks] == ["pass"] * 4
    assert well.run.findings == []
    assert [phase.name for phase in well.run.phases] == ["boot", "floor", "fill", "return", "run"]


def test_figures_of_the_footprint_are_those_of_its_samples(well: Measured) -> None:
    figures, rows = well.run.figures, samples(well)
    held = [int(row["footprint_bytes"]) for row in rows]
    assert figures["peak_bytes"] == max(held)
    assert figures["residual_bytes"] == held[-1]
    by_phase = {
        name: [int(row["footprint_bytes"]) for row in rows if row["phase"] == name]
        for name in ("floor", "return")
    }
    assert figures["floor_bytes"] == figures["floor.end_bytes"] == by_phase["floor"][-1]
    assert figures["return.peak_bytes"] == max(by_phase["return"])
    assert figures["returned_bytes"] == pytest.approx(by_phase["return"][0] - by_phase["return"][-1], abs=MIB)
    assert 128 * MIB < (figures["returned_bytes"] or 0) < 192 * MIB


def test_figures_of_reports_are_those_of_the_trace(well: Measured) -> None:
    records = list(read_trace(well.folder / well.run.folder / "device.trace"))
    assert well.run.figures["released_bytes"] == sum(
        record.value.length for record in records if record.kind is Kind.RELEASE
    )
    reports = sum(record.kind is Kind.CHAIN and record.value.role == Role.REPORTING for record in records)
    assert well.run.figures["reports"] == reports > 0
    assert well.run.release_latency is not None
    assert sum(well.run.release_latency.counts) == reports
    assert 0 <= (well.run.figures["refault_bytes"] or 0) <= (well.run.figures["released_bytes"] or 0)


def test_times_are_in_order(well: Measured) -> None:
    figures = well.run.figures
    half, nine_tenths = figures["t50_seconds"], figures["t90_seconds"]
    assert half is not None
    assert nine_tenths is not None
    assert 0 < half <= nine_tenths < well.run.phases[3].seconds
    assert well.run.phases[3].settled
    assert [phase.begin for phase in well.run.phases] == sorted(phase.begin for phase in well.run.phases)


def test_a_command_has_its_file_its_status_and_its_output(well: Measured) -> None:
    assert well.run.figures["command_status"] == 4
    assert (well.folder / well.run.folder / "run-run.log").read_text() == "so it is\n"


def test_a_measurement_is_no_worse_than_itself(well: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(well.folder), str(well.folder)]) == EXIT_PASS
    assert "no worse" in capsys.readouterr().out


# --- guests that are not ---


@dataclass(frozen=True)
class Case:
    """A guest that goes wrong. why: what is said of it. console: what its console must show."""

    ending: Ending
    scenario: str
    why: str
    console: str = ""


CASES = {
    "panic": Case(
        "panicked",
        '[guest]\nmemory = "256M"\n[[phase]]\ndo = "run"\ncommand = "echo c > /proc/sysrq-trigger"\n',
        "sysrq triggered crash",
        "Kernel panic - not syncing: sysrq triggered crash",
    ),
    "hang-at-boot": Case(
        "hung",
        '[guest]\nmemory = "256M"\ncommand_line = "rdinit=/usr/bin/sh"\n[[phase]]\ndo = "boot"\ndeadline = "12s"\n',
        "did not answer within 12",
        "BusyBox",
    ),
    "out-of-memory": Case(
        "out-of-memory",
        '[guest]\nmemory = "256M"\n[[phase]]\ndo = "fill"\nkind = "tmpfs"\nsize = "250M"\n',
        "cannot be filled",
        "Out of memory: Killed process",
    ),
    "command": Case(
        "command-failed",
        '[guest]\nmemory = "256M"\n[[phase]]\ndo = "run"\ncommand = "echo it is missing >&2; exit 3"\n',
        "ended with status 3, 0 is right: it is missing",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_guest_that_goes_wrong_has_its_ending_and_its_console(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    measured = measure(tmp_path, case.scenario)
    assert measured.status == EXIT_CHECK_FAILED
    assert measured.run.ending == case.ending
    assert case.why in measured.run.why
    assert case.console in (measured.folder / measured.run.folder / "console.log").read_text()
    assert not measured.report.passed


def test_a_guest_without_the_driver_is_measured_and_breaks_its_budget(tmp_path: Path) -> None:
    scenario = """
[guest]
memory = "256M"
command_line = "module_blacklist=virtio_balloon"
[[phase]]
do = "fill"
size = "64M"
[[phase]]
do = "free"
[budget]
residual = "64M"
"""
    measured = measure(tmp_path, scenario)
    residual = measured.run.figures["residual_bytes"]
    assert measured.status == EXIT_CHECK_FAILED
    assert measured.run.ending == "no-driver"
    assert residual is not None
    (budget,) = measured.report.arms[0].checks
    assert budget.outcome == "fail"
    assert "the budget is at most 64 MiB" in budget.message
    assert "over" in budget.message
    assert measured.run.figures["t90_seconds"] is None


@pytest.mark.full
def test_a_guest_that_hangs_later_is_given_up(tmp_path: Path) -> None:
    scenario = (
        '[guest]\nmemory = "256M"\n[[phase]]\ndo = "run"\ncommand = "kill -STOP $(pidof python3); sleep 1"\n'
    )
    measured = measure(tmp_path, scenario)
    assert measured.status == EXIT_CHECK_FAILED
    assert measured.run.ending == "hung"
    assert "has answered nothing for 45 s" in measured.run.why
    assert measured.run.figures["boot_seconds"] is not None


def test_a_knob_that_the_kernel_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(
        '[guest]\nkernel = "bookworm"\nmemory = "256M"\npage_reporting_delay_ms = 500\n[[phase]]\ndo = "idle"\n'
    )
    assert main(["measure", str(file), "--out", str(tmp_path / "out")]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "has no page_reporting_delay_ms" in said
    assert "leave guest.page_reporting_delay_ms out" in said
