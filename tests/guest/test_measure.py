"""balloonlab measure on real guests: its figures, judged by readers of their own, and what it makes of guests that go wrong."""

from __future__ import annotations

import contextlib
import csv
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from balloonlab.cli import main
from balloonlab.decode import read_trace
from balloonlab.measure import command, verify, verify_dump, verify_holes, verify_pages
from balloonlab.measure.guest_setup import prepare
from balloonlab.measure.report import Ending, Report, Run, read_report
from balloonlab.measure.scenario import DeviceSpec, GuestSpec
from balloonlab.rig import Setup
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS, EXIT_USAGE
from hostdev.wire.balloon import Role
from hostdev.wire.trace import Kind
from tests.guest.processes import Process, family
from tests.seeded import one_page_too_many

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

# It reports what drains from its per-CPU lists some MiB at a time, and has settled 35 s after the free, or later.

WELL = """
[guest]
memory = "384M"
page_reporting_order = 9
files = { "/root/said" = "said" }

[[phase]]
do = "idle"
name = "floor"
deadline = "150s"

[[phase]]
do = "fill"
size = "160M"

[[phase]]
do = "free"
name = "return"
deadline = "150s"

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
    before = rows[[row["phase"] for row in rows].index("return") - 1]
    assert figures["returned_bytes"] == int(before["footprint_bytes"]) - by_phase["return"][-1]
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


# --- arms beside each other, and the proof ---

CHURNED = """
[guest]
memory = "256M"

[[phase]]
do = "churn"
size = "96M"
rounds = 2

[[phase]]
do = "run"
command = "sleep 8"
"""
PROOFS = [verify_holes.NAME, verify_pages.NAME, verify.CONTENTS, verify_dump.NAME]


@dataclass(frozen=True)
class Use:
    """What a process had used when it was last looked at."""

    cpu_seconds: float
    faults: int
    anonymous_bytes: int


class Watch:
    """Looks into /proc at what this program has started, until it is closed. uses: of each process, last."""

    def __init__(self) -> None:
        self.uses: dict[Process, Use] = {}
        self.argv: dict[Process, str] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.1):
            for process in family(os.getpid())[1:]:
                with contextlib.suppress(OSError, IndexError):
                    self.uses[process] = used_by(process.pid)
                    self.argv[process] = " ".join(process.argv) or self.argv.get(process, "")

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def of(self, *words: str) -> list[Use]:
        """The processes whose command lines have these words."""
        return [self.uses[one] for one, argv in self.argv.items() if all(word in argv for word in words)]


def used_by(pid: int) -> Use:
    """Read proc(5): stat's fields 10 and 12, 14 and 15; status' RssAnon."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2]
    ticks = int(stat[11]) + int(stat[12])
    return Use(ticks / os.sysconf("SC_CLK_TCK"), int(stat[7]) + int(stat[9]), int(status.split()[0]) * 1024)


@dataclass(frozen=True)
class Arms:
    """Two arms and a proof, as they were measured and as they were seen from outside."""

    measured: Measured
    seen: Watch
    said: str

    def run(self, folder: str) -> Run:
        (found,) = [run for run in self.measured.report.runs if run.folder == folder]
        return found


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Arms:
    folder = tmp_path_factory.mktemp("arms")
    options = ["--arm", "ours", "--arm", "off", "--repeat", "1", "--jobs", "2", "--verify"]
    with contextlib.closing(Watch()) as seen:
        measured = measure(folder, CHURNED, *options)
    return Arms(measured, seen, (measured.folder / "summary.md").read_text())


def test_our_arm_gives_back_what_the_other_keeps(arms: Arms) -> None:
    assert arms.measured.status == EXIT_PASS, arms.said
    ours, off = arms.run("ours-1").figures, arms.run("off-1").figures
    assert (ours["peak_bytes"] or 0) - (ours["residual_bytes"] or 0) > 48 * MIB
    assert (off["peak_bytes"] or 0) - (off["residual_bytes"] or 0) < 8 * MIB
    assert (ours["released_bytes"] or 0) > 48 * MIB
    assert "released_bytes" not in off
    assert off["device_cpu_seconds"] is None


def test_figures_of_processes_are_those_that_proc_had(arms: Arms) -> None:
    """Of which the last look from outside came within a moment of the end."""
    for folder in ("ours-1", "off-1"):
        figures = arms.run(folder).figures
        (qemu,) = arms.seen.of("memory-backend-memfd", f"/{folder}/")
        assert figures["qemu_cpu_seconds"] == pytest.approx(qemu.cpu_seconds, abs=1.5)
        assert figures["qemu_anonymous_bytes"] == pytest.approx(qemu.anonymous_bytes, rel=0.1)
        assert figures["host_faults"] == pytest.approx(qemu.faults, rel=0.1)
    device = arms.seen.of("hostdev.cli", "/ours-1/")
    assert device
    seconds = arms.run("ours-1").figures["device_cpu_seconds"]
    assert seconds == pytest.approx(sum(use.cpu_seconds for use in device), abs=0.3)
    assert not arms.seen.of("hostdev.cli", "/off-1/")


def test_the_proof_holds_and_its_run_is_no_part_of_the_figures(arms: Arms) -> None:
    report, proof = arms.measured.report, arms.run("ours-verify")
    assert [run.folder for run in report.runs] == ["ours-1", "ours-verify", "off-1"]
    assert (proof.counted, proof.ending) == (False, "measured")
    residual = report.arms[0].figures["residual_bytes"]
    assert (residual.runs, residual.median) == (1, arms.run("ours-1").figures["residual_bytes"])
    checks = [check for check in proof.checks if check.name in PROOFS]
    assert [check.name for check in checks] == PROOFS
    *three, dump = checks
    assert [check.outcome for check in three] == ["pass"] * 3, checks
    # The canary, and what was freed twice.
    assert " in 3 fills compared byte by byte" in three[2].message
    # Which takes as much of this machine's disk or memory as the guest has.
    assert dump.outcome == "pass" or dump.message.startswith("a dump needs "), dump
    assert ("not proved" in arms.said) == (dump.outcome != "pass")


FAULTY = (
    """
[guest]
memory = "512M"
"""
    + 4
    * """
[[phase]]
do = "churn"
size = "160M"
rounds = 1
[[phase]]
do = "run"
command = "sleep 3"
"""
)


@pytest.mark.full
def test_a_device_with_a_fault_is_caught_by_the_proof_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it gives back too much is of the memory that the proof holds: the run that counts has none."""

    def faulty(guest: GuestSpec, device: DeviceSpec, *, progress: Callable[[str], None]) -> Setup:
        return replace(prepare(guest, device, progress=progress), program=one_page_too_many.PROGRAM)

    monkeypatch.setattr(command, "prepare", faulty)
    measured = measure(tmp_path, FAULTY, "--verify")
    counted, proof = measured.report.runs
    assert counted.passed
    assert one_page_too_many.SAID in (measured.folder / proof.folder / "device.log").read_text()
    failed = {check.name for check in proof.checks if check.outcome == "fail"}
    assert failed >= {verify_pages.NAME, verify.CONTENTS}, proof.checks
    assert measured.status == EXIT_CHECK_FAILED
    assert "not as it was written" in (measured.folder / "junit.xml").read_text()


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
        '[guest]\nmemory = "256M"\ncommand_line = "rdinit=/usr/bin/sh"\n[[phase]]\ndo = "boot"\ndeadline = "6s"\n',
        "did not answer within 6",  # how far it has come by then is this machine's affair
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
    """The guest is the one that is well, all but the driver, and so are the budgets that it keeps."""
    (tmp_path / "said").write_text("so it is\n")
    without = WELL.replace("[guest]", '[guest]\ncommand_line = "module_blacklist=virtio_balloon"')
    measured = measure(tmp_path, without)
    assert measured.status == EXIT_CHECK_FAILED
    assert measured.run.ending == "no-driver"
    assert measured.run.figures["t90_seconds"] is None
    broken = {
        check.name: check.message for check in measured.report.arms[0].checks if check.outcome == "fail"
    }
    assert set(broken) == {"budget residual_bytes", "budget returned_bytes"}
    assert "the budget is at most 200 MiB: " in broken["budget residual_bytes"]
    assert broken["budget residual_bytes"].endswith(" over")
    assert "the budget is at least 128 MiB: " in broken["budget returned_bytes"]
    assert broken["budget returned_bytes"].endswith(" under")


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
