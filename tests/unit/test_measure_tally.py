"""Figures of a run, each from values that are all different, so that none stands in for another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from balloonlab import process
from balloonlab.measure.figures import FIGURES
from balloonlab.measure.meter import Meter
from balloonlab.measure.phases import Phases
from balloonlab.measure.ranges import Places
from balloonlab.measure.report import PhaseResult
from balloonlab.measure.tally import Ends, ends, of_ends, of_meter, of_phases, vmstat
from balloonlab.rig import Rig, Setup
from balloonlab.timeline import Sample
from guest_images.build import GuestImage
from guest_images.errors import AgentRefusedError
from qmp_glue.find import Qemu

MIB = 1 << 20
IMAGE = GuestImage("own", "6.99", Path("/vmlinux"), Path("/initrd"), pvh=True)
LAST = Sample(30.0, "return", 150 * MIB, 400 * MIB)

# --- what host and guest say at the end ---

QEMU, KEEPER, WORKER = 100, 200, 201
# proc(5): fields 3 to 17 of stat, after a name that may have anything in it.
PROC = {
    f"/proc/{QEMU}/stat": f"{QEMU} (qemu) S) S 1 1 1 0 -1 0 3000 9 40 9 250 150 7 7 20",
    f"/proc/{QEMU}/status": "VmRSS:\t 9 kB\nRssAnon:\t  2048 kB\nRssFile:\t 7 kB\n",
    f"/proc/{KEEPER}/stat": f"{KEEPER} (device) S 1 1 1 0 -1 0 9 9 9 9 10 20 30 40 20",
    f"/proc/{WORKER}/stat": f"{WORKER} (device) S 1 1 1 0 -1 0 9 9 9 9 100 200 7 7 20",
    f"/proc/{KEEPER}/task/{KEEPER}/children": f"{WORKER} ",
    f"/proc/{KEEPER}/smaps_rollup": "Rss: 9 kB\nPss:  300 kB\nPss_Anon: 7 kB\n",
    f"/proc/{WORKER}/smaps_rollup": "Rss: 9 kB\nPss:  500 kB\n",
}
VMSTAT = "nr_free_pages 7\npgfault 81234\npgmajfault 56\npgfaultx 9\n"


class Guest:
    """An agent that reads one file."""

    def __init__(self, text: str | None) -> None:
        self.text = text

    async def read(self, path: str) -> str:
        assert path == "/proc/vmstat"
        if self.text is None:
            raise AgentRefusedError("no such file")
        return self.text


class Pid:
    """A process that is only its number."""

    pid = QEMU


def asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str | None,
    balloon: Any = "vhost-user",  # noqa: ANN401
) -> Ends:
    monkeypatch.setattr(process, "_read", lambda path: PROC[path])
    monkeypatch.setattr(process, "_TICKS", 100)
    rig = Rig(Setup(Qemu(("qemu",)), IMAGE, 512 * MIB, balloon=balloon), tmp_path)
    monkeypatch.setattr(rig, "vm", Pid(), raising=False)
    monkeypatch.setattr(rig, "agent", Guest(text), raising=False)
    monkeypatch.setattr(type(rig.device), "pid", KEEPER)
    return asyncio.run(ends(rig, LAST))


def test_ends_are_what_proc_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(tmp_path, monkeypatch, VMSTAT) == Ends(
        last=LAST,
        qemu_cpu_seconds=4.0,
        qemu_anonymous_bytes=2 * MIB,
        host_faults=3040,
        guest_faults=81234,
        guest_major_faults=56,
        device_cpu_seconds=4.0,
        device_proportional_bytes=800 * 1024,
    )


def test_without_our_device_it_costs_nothing_that_could_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(tmp_path, monkeypatch, VMSTAT, "none")
    assert (found.device_cpu_seconds, found.device_proportional_bytes) == (None, None)


@pytest.mark.parametrize(
    "text", [None, "", "pgfault -1\npgmajfault x\n", "pgfault " + "9" * 5000, "pgfault 5 pgmajfault 6"]
)
def test_a_guest_without_its_counters_has_no_faults_that_are_known(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(tmp_path, monkeypatch, text)
    assert (found.guest_faults, found.guest_major_faults) == (None, None)
    figures = of_ends(found, 512 * MIB)
    assert (figures["guest_faults"], figures["guest_major_faults"]) == (None, None)


def test_vmstat() -> None:
    assert vmstat(VMSTAT)["pgfault"] == 81234


def test_figures_of_the_ends() -> None:
    found = Ends(LAST, 4.5, 2 * MIB, 3000, 81234, 56, 0.25, 3 * MIB)
    assert of_ends(found, 512 * MIB) == {
        "residual_bytes": 150 * MIB,
        "guest_held_bytes": 112 * MIB,
        "excess_bytes": 38 * MIB,
        "qemu_cpu_seconds": 4.5,
        "qemu_anonymous_bytes": 2 * MIB,
        "host_faults": 3000,
        "guest_faults": 81234,
        "guest_major_faults": 56,
        "device_cpu_seconds": 0.25,
        "device_proportional_bytes": 3 * MIB,
    }


# --- phases ---


def phase(name: str, do: str, begin: float, seconds: float, end_mib: int) -> PhaseResult:
    return PhaseResult(
        name=name, do=do, begin=begin, seconds=seconds, footprint_gib_minutes=begin + 0.5,
        peak_bytes=end_mib * MIB + 1, end_bytes=end_mib * MIB,
    )  # fmt: skip


# Held before the free: 300 MiB, and 290 at the first sample after it. Half of what came back is back at 220, all but a tenth at 156.
SAMPLES = [
    Sample(second, "", held * MIB)
    for second, held in ((4.0, 100), (9.0, 90), (14.9, 310), (20.0, 300), (21.1, 290), (22.0, 221), (23.0, 220),
                         (24.0, 157), (25.0, 156), (26.0, 140), (30.0, 140))
]  # fmt: skip
DONE = [
    phase("boot", "boot", 0.0, 4.0, 100),
    phase("floor", "idle", 4.0, 5.0, 90),
    phase("later", "idle", 9.0, 1.0, 95),
    phase("fill", "fill", 10.0, 10.0, 300),
    phase("return", "free", 20.0, 10.0, 140),
]


def phases(tmp_path: Path, done: list[PhaseResult], freed: float | None) -> Phases:
    made = Phases(cast("Any", None), cast("Any", None), tmp_path)
    made.done, made.freed = done, freed
    made.boot_seconds, made.command_seconds, made.command_status = 3.9, 1.25, 7
    return made


def test_figures_of_the_phases(tmp_path: Path) -> None:
    figures = of_phases(phases(tmp_path, DONE, 21.0), SAMPLES)
    of_run = {name: value for name, value in figures.items() if "." not in name}
    assert of_run == {
        "boot_seconds": 3.9,
        "boot_resident_bytes": 100 * MIB,
        "floor_bytes": 90 * MIB,
        "peak_bytes": 310 * MIB,
        "footprint_gib_minutes": 0.5 + 4.5 + 9.5 + 10.5 + 20.5,
        "command_seconds": 1.25,
        "command_status": 7,
        "returned_bytes": 160 * MIB,
        "t50_seconds": 2.0,
        "t90_seconds": 4.0,
    }
    for one in DONE:
        assert figures[f"{one.name}.seconds"] == one.seconds
        assert figures[f"{one.name}.footprint_gib_minutes"] == one.footprint_gib_minutes
        assert figures[f"{one.name}.peak_bytes"] == one.peak_bytes
        assert figures[f"{one.name}.end_bytes"] == one.end_bytes


def test_what_was_not_come_to_is_not_known(tmp_path: Path) -> None:
    figures = of_phases(phases(tmp_path, [], None), [])
    names = (
        "boot_resident_bytes",
        "floor_bytes",
        "peak_bytes",
        "returned_bytes",
        "t50_seconds",
        "t90_seconds",
    )
    assert [figures[name] for name in names] == [None] * len(names)
    assert figures["footprint_gib_minutes"] == 0


# --- the trace ---


@pytest.fixture
def meter(tmp_path: Path) -> Meter:
    made = Meter(tmp_path / "trace", [], Places([]))
    made.latencies.seconds = [number / 100 for number in range(1, 201)]
    made.latencies.released_bytes = 9 * MIB
    made.refaults.bytes = 3 * MIB
    return made


COUNTED = [
    Sample(1.0, "", 1, 2, 3, 4 * MIB, 50),
    Sample(2.0, "", 1, 2, 3, 11 * MIB, 210),
    Sample(2.1, "", 1),
]


def test_figures_of_a_trace(meter: Meter) -> None:
    assert of_meter(meter, COUNTED, frees=True) == {
        "reports": 200,
        "released_bytes": 9 * MIB,
        "refault_bytes": 3 * MIB,
        "release_p50_seconds": 1.0,
        "release_p99_seconds": 1.98,
        "release_most_seconds": 2.0,
    }


def test_a_method_that_frees_nothing_has_no_refaults(meter: Meter) -> None:
    assert of_meter(meter, COUNTED, frees=False)["refault_bytes"] is None


def test_of_a_trace_that_is_not_whole_the_devices_own_counters_are_taken(meter: Meter) -> None:
    meter.fault = "the trace is full"
    figures = of_meter(meter, COUNTED, frees=True)
    assert {name for name, value in figures.items() if value is not None} == {"reports", "released_bytes"}
    assert (figures["reports"], figures["released_bytes"]) == (210, 11 * MIB)
    assert of_meter(meter, [], frees=True)["reports"] is None


def test_every_figure_of_a_run_is_taken_by_somebody(tmp_path: Path, meter: Meter) -> None:
    found = Ends(LAST, 4.5, 2 * MIB, 3000, 81234, 56, 0.25, 3 * MIB)
    taken = (
        of_ends(found, 512 * MIB)
        | of_meter(meter, COUNTED, frees=True)
        | of_phases(phases(tmp_path, DONE, 21.0), SAMPLES)
    )
    assert {name for name in taken if "." not in name} == {figure.name for figure in FIGURES}
