"""Two commands beside each other: outputs in order, statuses, and one Ctrl-C for both."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CALL = "import sys; from tests.both import main; sys.exit(main([sys.executable, '-c', {!r}], [sys.executable, '-c', {!r}]))"
WAITS = """
import pathlib, signal, sys, time
def end(*_): print(sys.argv, "cleans up", flush=True); sys.exit(2)
signal.signal(signal.SIGINT, end)
pathlib.Path({!r}).touch()
time.sleep(60)
"""

# The signal comes when so many of the two are there, and nobody has been told of the last of them yet.
EARLY = """
import os, signal, subprocess
class Popen(subprocess.Popen):
    made = 0
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        Popen.made += 1
        if Popen.made == {}:
            os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen = Popen
"""


def start(aside: str, ahead: str, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + CALL.format(aside, ahead)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("first", "second", "status"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (5, 2, 2)])
def test_one_that_fails_is_enough(first: int, second: int, status: int) -> None:
    with start(f"print('aside'); exit({first})", f"print('ahead'); exit({second})") as both:
        said, _none = both.communicate(timeout=60)
    assert (both.returncode, said.split()) == (status, ["ahead", "aside"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_told_to_both_once(number: signal.Signals, tmp_path: Path) -> None:
    ready = tmp_path / "aside", tmp_path / "ahead"
    with start(*(WAITS.format(str(path)) for path in ready)) as both:
        end = time.monotonic() + 60
        while not all(path.exists() for path in ready):
            assert time.monotonic() < end
            time.sleep(0.01)
        both.send_signal(number)
        said, _none = both.communicate(timeout=60)
    assert (both.returncode, said.count("cleans up")) == (128 + number, 2)


@pytest.mark.parametrize("number", [1, 2])
def test_a_signal_that_comes_while_they_are_started_ends_both(number: int) -> None:
    with start("import time; time.sleep(300)", "import time; time.sleep(300)", EARLY.format(number)) as both:
        both.communicate(timeout=60)
    assert both.returncode == 128 + signal.SIGTERM
