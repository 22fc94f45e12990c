"""Runs the fuzzer's processes, some at a time, and tells what came of each. Used by the command and by the tests.

A target's folder holds corpus/, which goes on growing from run to run, found/ with the inputs of findings, and fuzz.log. What
the repository keeps is read and never written to here.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostdev.fds import Fd

HERE = Path(__file__).parent
# Bytes of an input, and how slowly libFuzzer comes to inputs of that size. The lists of acts end after some hundred bytes; what
# has to be long, a list of frame numbers or a JSON value of 64 KiB, is made by repeating a part. With libFuzzer's own 100
# inputs of a minute have ten bytes; with 10 they reach a third more features in the same time.
MAX_INPUT = 1024
LENGTH_CONTROL = 10
# Seconds that one input may take: a thousand times what it does.
INPUT_SECONDS = 25
# MiB of the fuzzer's process. An input that takes more is a finding: what the device takes is bounded.
MEMORY_MIB = 2048
# Seconds beyond its time in which a process must have ended: it imports and instruments, and reads its corpus.
MORE_SECONDS = 120

_STATUS = re.compile(r"#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)/(\d+)([KMb])")
_EXECUTIONS = re.compile(r"stat::number_of_executed_units: (\d+)")
_UNITS = {"b": 1, "K": 1 << 10, "M": 1 << 20}


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be fuzzed, for how many seconds, and where. seed: of libFuzzer's choices."""

    target: str
    seconds: int
    folder: Path
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it. edges, features: as libFuzzer counts them. findings: files with the inputs. text: what it said of them."""

    target: str
    seconds: float
    executions: int
    edges: int
    features: int
    corpus_files: int
    corpus_bytes: int
    findings: tuple[Path, ...]
    text: str
    status: int

    @property
    def is_well(self) -> bool:
        """True if it ran to its end and found nothing."""
        return self.status == 0 and not self.findings and self.executions > 0


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    pidfd: Fd
    begun: float
    before: frozenset[Path]


def corpus(target: str) -> Path:
    """Return the folder of the repository with a target's inputs."""
    return HERE / "corpus" / target


def found(target: str) -> Path:
    """Return the folder of the repository with the inputs of a target's former findings."""
    return HERE / "found" / target


def seeds(target: str) -> Path:
    """Return the folder of the repository with inputs that find the faults of test_faults.py, by their names."""
    return HERE / "seeds" / target


def inputs(target: str) -> list[Path]:
    """Return the files with all inputs of a target that the repository keeps."""
    return [file for folder in _kept(target) for file in files(folder)]


def _kept(target: str) -> tuple[Path, ...]:
    return corpus(target), found(target), seeds(target)


def files(folder: Path) -> list[Path]:
    """Return the files of a folder, none if it is not there."""
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []


def fuzz(jobs: Iterable[Job], *, at_once: int = 2) -> Iterator[Outcome]:
    """Fuzz, and yield what came of each when it has ended. Whatever happens, no process is left."""
    waiting, running = list(jobs), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_start(waiting.pop(0)))
            for one in _ended(running):
                running.remove(one)
                yield _outcome(one)
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()
            one.pidfd.close()


def _start(job: Job) -> _Running:
    for name in ("corpus", "found"):
        (job.folder / name).mkdir(parents=True, exist_ok=True)
    before = frozenset(files(job.folder / "found"))
    _forget_peak()
    with (job.folder / "fuzz.log").open("wb") as log:
        process = subprocess.Popen(
            _command(job), cwd=HERE.parent.parent, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    return _Running(job, process, Fd(os.pidfd_open(process.pid)), time.monotonic(), before)


def _forget_peak() -> None:
    """Take this process's peak of memory back to what it has now.

    libFuzzer goes by getrusage(), and by that a new process begins with the peak of the memory that it leaves in exec(2), which
    is that of this one (setmax_mm_hiwater_rss() in fs/exec.c, Linux 6.12). Tests that map guests' memory reach gigabytes.
    """
    Path("/proc/self/clear_refs").write_text("5")


def _command(job: Job) -> Sequence[str]:
    folders = [job.folder / "corpus", *_kept(job.target)]
    return [
        sys.executable,
        "-m",
        "tests.fuzz.engine",
        job.target,
        *(str(folder) for folder in folders if folder.is_dir()),
        f"-max_total_time={job.seconds}",
        f"-seed={job.seed}",
        f"-max_len={MAX_INPUT}",
        f"-len_control={LENGTH_CONTROL}",
        f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-artifact_prefix={job.folder / 'found'}/",
        "-print_final_stats=1",
    ]


def _ended(running: Sequence[_Running]) -> list[_Running]:
    """Wait for some to end, or to have had all of their time: those are killed."""
    poll = select.poll()
    for one in running:
        poll.register(one.pidfd.fileno(), select.POLLIN)
    deadline = min(one.begun + one.job.seconds + MORE_SECONDS for one in running)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        for one in running:
            if one.begun + one.job.seconds + MORE_SECONDS <= time.monotonic():
                one.process.kill()
                one.process.wait()
    return [one for one in running if one.process.poll() is not None]


def _outcome(one: _Running) -> Outcome:
    one.pidfd.close()
    folder = one.job.folder
    text = (folder / "fuzz.log").read_text(errors="replace")
    executions, edges, features, count, size = _figures(text)
    return Outcome(
        one.job.target,
        time.monotonic() - one.begun,
        executions,
        edges,
        features,
        count,
        size,
        tuple(file for file in files(folder / "found") if file not in one.before),
        _interesting(text),
        one.process.returncode,
    )


def _figures(text: str) -> tuple[int, int, int, int, int]:
    """Return executions, edges, features, files and bytes of the corpus, as far as they were said."""
    said = list(_STATUS.finditer(text))
    if not said:
        return 0, 0, 0, 0, 0
    executions, edges, features, inputs_held, size, unit = said[-1].groups()
    total = _EXECUTIONS.search(text)
    count = int(total[1]) if total else int(executions)
    return count, int(edges), int(features), int(inputs_held), int(size) * _UNITS[unit]


def _interesting(text: str) -> str:
    """Return what was said of a finding, or of whatever ended it: the last lines, without what is said all the time."""
    lines = [line for line in text.splitlines() if not line.startswith(("#", "INFO:", "stat::"))]
    return "\n".join(lines[-40:])
