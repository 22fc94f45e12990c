"""Ctrl-C and its like, in every phase: what was started has ended, what was measured is kept, nothing else is left.

The program is watched from outside, as a person sees it: its exit status, its one line, the system's processes, its
folders.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from balloonlab.measure.report import read_report
from balloonlab.process import cpu_seconds
from qmp_glue.debian import cache_root
from tests.guest.processes import DEADLINE_SECONDS, Process, Program, end, family, started, wait_until

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

DEMO = [sys.executable, "-m", "balloonlab.cli", "demo", "--memory", "256M", "--fill", "64M"]
MEASURE = [sys.executable, "-m", "balloonlab.cli", "measure"]
REPORTS = {"result.json", "junit.xml", "results.tap", "summary.md", "timeline.png", "report.html"}
INTERRUPTED = "balloonlab: interrupted, everything that was started has ended"
TERMINATED = "balloonlab: terminated, everything that was started has ended"
ESCAPE = "\x1b"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
# What a run that did not come to its end leaves behind.
KEPT = {"console.log", "device.log", "qemu.log", "timeline.csv", "meta.json"}
WHOLE = KEPT | {"result.json"}
PHASES = ["boot", "floor", "fill", "free", "return"]
PHASE_LINE = re.compile(rf"({'|'.join(PHASES)}) +\d+\.\d s  \S")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# The program itself, the device's keeper and worker, QEMU.
ALL_PROCESSES = 4
# A boot takes 3 s of CPU time and more: with 1 s it has begun and is not over.
BOOTING_CPU_SECONDS = 1.0
# Cleaning up takes 0.1 s at least: several more come meanwhile.
IMPATIENT_SECONDS = 0.01


class Run:
    """One program with its folders."""

    def __init__(self, program: Program, folder: Path, temporary: Path) -> None:
        self.program = program
        self.folder = folder
        self._temporary = temporary
        self._before = hidden_in_cache()
        self.processes: list[Process] = []

    def qemu(self) -> Process | None:
        found = [process for process in family(self.program.pid) if "-object" in process.argv]
        return found[0] if found else None

    def nothing_runs(self) -> None:
        wait_until(
            lambda: not any(process.alive for process in self.processes),
            f"the end of {[process.argv for process in self.processes if process.alive]}",
        )

    def nothing_else_is_left(self) -> None:
        assert list(self._temporary.iterdir()) == []
        # Somebody else may be filling the same cache: what is theirs goes away by itself.
        wait_until(lambda: not hidden_in_cache() - self._before, "no scratch folder in the cache")


def hidden_in_cache() -> set[Path]:
    """Scratch folders and half-written files: all have names that begin with a dot."""
    found: set[Path] = set()
    for folder in (cache_root(), *cache_root().iterdir()):
        with contextlib.suppress(NotADirectoryError, FileNotFoundError):  # a file, or gone meanwhile
            found |= {path for path in folder.iterdir() if path.name.startswith(".")}
    return found


@contextlib.contextmanager
def demo(tmp_path: Path, *options: str) -> Iterator[Run]:
    with running(tmp_path, [*DEMO, *options]) as run:
        yield run


@contextlib.contextmanager
def running(tmp_path: Path, argv: list[str]) -> Iterator[Run]:
    folder, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    with started([*argv, "--out", str(folder)], tmp_path, env={"TMPDIR": str(temporary)}) as program:
        run = Run(program, folder, temporary)
        try:
            yield run
        finally:
            # What a defect left running has no parent any more.
            end(run.processes)


def parts_are_whole(folder: Path, *, phase: str) -> None:
    """Timeline and meta data parse; the timeline has every phase that was over."""
    with (folder / "timeline.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(int(row["footprint_bytes"]) > 0 for row in rows)
    # The free takes no longer than a sample does, and so may the phase that was interrupted.
    assert set(PHASES[: PHASES.index(phase)]) - {"free"} <= {row["phase"] for row in rows} <= set(PHASES)
    meta = json.loads((folder / "meta.json").read_bytes())
    assert "memory-backend=mem" in " ".join(meta["qemu"]["argv"])
    assert meta["device"]["argv"]


def said_briefly(program: Program, text: str) -> None:
    assert program.errors() == f"{text}\n"
    output = program.output()
    assert ESCAPE not in output
    assert all(PHASE_LINE.match(line) for line in output.splitlines()[1:]), output


def in_phase(run: Run, phase: str) -> bool:
    """True once the phase goes on; boot prints nothing before its end, but costs CPU time."""
    if phase == "boot":
        qemu = run.qemu()
        return qemu is not None and cpu_seconds(qemu.pid) > BOOTING_CPU_SECONDS
    before = {"floor": "boot ", "fill": "floor ", "return": "free "}[phase]
    return f"\n{before}" in run.program.output()


def reach(run: Run, condition: Callable[[], object]) -> None:
    """Wait for a moment of the run, and remember its processes: later nobody knows whose children they were."""

    def reached() -> bool:
        run.processes = family(run.program.pid)
        return bool(condition()) and len(run.processes) >= ALL_PROCESSES

    wait_until(lambda: reached() or run.program.popen.poll() is not None, "a moment of the run")
    assert run.program.popen.poll() is None, run.program.errors()


@pytest.mark.parametrize(
    ("phase", "number", "status"),
    [
        ("boot", signal.SIGINT, 130),
        ("floor", signal.SIGTERM, 143),
        ("fill", signal.SIGINT, 130),
        ("return", signal.SIGINT, 130),
    ],
)
def test_a_signal_ends_everything_and_keeps_what_was_measured(
    phase: str, number: signal.Signals, status: int, tmp_path: Path
) -> None:
    with demo(tmp_path) as run:
        reach(run, lambda: in_phase(run, phase))
        if number == signal.SIGINT:
            run.program.interrupt()
        else:
            run.program.send(number)
        assert run.program.wait() == status
        run.nothing_runs()
        said_briefly(run.program, INTERRUPTED if number == signal.SIGINT else TERMINATED)
    assert {path.name for path in run.folder.iterdir()} == KEPT
    parts_are_whole(run.folder, phase=phase)
    run.nothing_else_is_left()


def test_ctrl_c_in_a_control_run_keeps_the_run_before(tmp_path: Path) -> None:
    """--discard none settles soonest, as nothing comes back; its control is begun like any other."""
    with demo(tmp_path, "--discard", "none", "--control") as run:
        run.program.wait_for("control: ")
        reach(run, lambda: list(run.folder.glob("control-*/console.log")))
        run.program.interrupt()
        assert run.program.wait() == 130
        run.nothing_runs()
        output = run.program.output().splitlines()
        assert [line.split()[0] for line in output] == [
            "QEMU", "boot", "floor", "fill", "free", "return", "control:",
        ]  # fmt: skip
        assert ESCAPE not in run.program.output()
        assert run.program.errors().count("\n") == 1
    (inner,) = run.folder.glob("control-*")
    assert {path.name for path in run.folder.iterdir()} == WHOLE | {inner.name}
    assert {path.name for path in inner.iterdir()} == KEPT
    parts_are_whole(run.folder, phase="return")
    assert json.loads((run.folder / "result.json").read_bytes())["passed"] is True
    run.nothing_else_is_left()


def test_a_second_ctrl_c_during_the_clean_up_changes_nothing(tmp_path: Path) -> None:
    """Here the first one comes while QEMU starts, the others whenever they come."""
    with demo(tmp_path) as run:
        reach(run, run.qemu)
        run.program.interrupt()
        while run.program.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                run.program.interrupt()
            time.sleep(IMPATIENT_SECONDS)
        assert run.program.wait() == 130
        run.nothing_runs()
        said_briefly(run.program, INTERRUPTED)
    kept = {path.name for path in run.folder.iterdir()}
    assert {"timeline.csv", "meta.json"} <= kept <= KEPT
    run.nothing_else_is_left()


def test_a_killed_lab_leaves_no_guest_behind(tmp_path: Path) -> None:
    """It can do nothing about it any more: the kernel ends QEMU, and QEMU's end the device."""
    with demo(tmp_path) as run:
        reach(run, lambda: in_phase(run, "boot"))
        run.program.send(signal.SIGKILL)
        assert run.program.wait() == 128 + signal.SIGKILL
        run.nothing_runs()
    assert not [path for path in run.folder.rglob("*") if path.is_socket()]
    run.nothing_else_is_left()


def test_a_measurement_that_is_terminated_has_its_reports(tmp_path: Path) -> None:
    """Of the run that was over; the other one has what every run leaves."""
    file = tmp_path / "short.toml"
    file.write_text('[guest]\nmemory = "256M"\n[[phase]]\ndo = "run"\ncommand = "true"\n')
    with running(tmp_path, [*MEASURE, str(file), "--repeat", "2", "--jobs", "1"]) as run:
        run.program.wait_for("ours-2 (2 of 2)")
        reach(run, run.qemu)
        run.program.send(signal.SIGTERM)
        assert run.program.wait() == 128 + signal.SIGTERM
        run.nothing_runs()
        assert run.program.errors() == f"{TERMINATED}\n"
    assert {path.name for path in run.folder.iterdir()} == REPORTS | {"ours-1", "ours-2"}
    assert (run.folder / "ours-2" / "timeline.csv").exists()
    report = read_report(run.folder)
    assert [one.folder for one in report.runs] == ["ours-1"]
    assert report.runs[0].passed
    assert not report.passed
    assert "1 of 2 runs not made" in (run.folder / "junit.xml").read_text()
    run.nothing_else_is_left()


class Terminal:
    """A terminal of 100 by 30 with a program on it: what it shows, and what is typed."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (30, 100))
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        fcntl.fcntl(self._master, fcntl.F_SETFL, os.O_NONBLOCK)
        # setsid(1): Ctrl-C reaches only whose controlling terminal this is.
        self.popen = subprocess.Popen(
            ["setsid", "--ctty", *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "xterm-256color"} | env,
        )
        self._shown = b""

    def shown(self) -> str:
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._master, 65536):
                self._shown += chunk
        return self._shown.decode(errors="replace")

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def wait(self) -> int:
        """Wait for the end; a program that shows something is read meanwhile, or it would wait for us."""
        wait_until(lambda: self.shown() and self.popen.poll() is not None, "the program's end")
        return self.popen.returncode

    def after(self) -> object:
        return termios.tcgetattr(self._slave)

    def close(self) -> None:
        if self.popen.poll() is None:
            end(family(self.popen.pid))
        self.popen.wait(DEADLINE_SECONDS)
        os.close(self._slave)
        os.close(self._master)


def test_a_terminal_shows_a_moving_chart_and_is_left_clean(tmp_path: Path) -> None:
    """With a real Ctrl-C: the terminal sends the signal, to the foreground group."""
    (tmp_path / "temporary").mkdir()
    terminal = Terminal([*DEMO, "--out", str(tmp_path / "run")], {"TMPDIR": str(tmp_path / "temporary")})
    with contextlib.closing(terminal):
        wait_until(
            lambda: "floor  " in terminal.shown() or terminal.popen.poll() is not None,
            "the chart of the floor",
        )
        processes = family(terminal.popen.pid)
        terminal.type(b"\x03")
        assert terminal.wait() == 130, terminal.shown()
        wait_until(lambda: not any(process.alive for process in processes), "the end of all processes")
        shown = terminal.shown()
        assert re.search(r"boot  \d+\.\d s   held by the host \d+ MiB   free in the guest ", shown)
        assert re.search("[▁▂▃▄▅▆▇█]{5}", shown)
        assert shown.count(HIDE_CURSOR) == 1
        assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)
        assert "Traceback" not in shown
        assert CONTROL.sub("", shown).splitlines()[-1] == INTERRUPTED
        assert terminal.after() == terminal.before
    parts_are_whole(tmp_path / "run", phase="floor")
    assert list((tmp_path / "temporary").iterdir()) == []
