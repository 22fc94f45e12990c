"""Runs the tests with guests beside those without: guests wait more than they work, and together they take half the time.

What is said of the guests comes at the end, in one piece. Used by scripts/test.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import FrameType

PYTEST = (sys.executable, "-m", "pytest")
_SIGNALLED = 128


def main(aside: Sequence[str], ahead: Sequence[str]) -> int:
    """Run both commands; the output of the first follows that of the second. Returns a status that is 0 if both are.

    Each is in a process group of its own, so that Ctrl-C is told to them once, from here: pytest cleans up after the first.
    """
    told: list[int] = []
    untold: list[subprocess.Popen[bytes]] = []

    def tell(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        _interrupt(untold)

    previous = [signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)]
    with tempfile.TemporaryFile() as log:
        first = subprocess.Popen(
            aside, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0
        )
        untold.append(first)
        second = subprocess.Popen(ahead, stdin=subprocess.DEVNULL, process_group=0)
        untold.append(second)
        if told:  # before there was anybody to tell
            _interrupt(untold)
        second.wait()
        first.wait()
        log.seek(0)
        sys.stdout.flush()
        shutil.copyfileobj(log, sys.stdout.buffer)
        sys.stdout.flush()
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), previous, strict=True):
        signal.signal(number, handler)
    return _SIGNALLED + told[0] if told else second.returncode or first.returncode


def _interrupt(untold: list[subprocess.Popen[bytes]]) -> None:
    """Tell each that was not told; another signal may come in the middle of this."""
    with contextlib.suppress(IndexError):
        while True:
            untold.pop().send_signal(signal.SIGINT)


if __name__ == "__main__":
    print("tests with guests run beside those without, and are told of at the end", flush=True)
    sys.exit(main((*PYTEST, "-m", "not full and guest"), (*PYTEST, "-m", "not full and not guest")))
