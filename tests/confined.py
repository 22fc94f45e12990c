"""Runs an act in a process of its own, with a sandbox or without, and says which error it gets. Not a test.

An act is a generator: what comes before its yield is done free, what comes after it confined. Those of somebody who has taken
a process over are confined_acts.py's.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from hostdev.driver import DEADLINE

Act = Callable[[Path], Iterator[None]]


def outcome(act: Act, folder: Path, confine: Callable[[], object] = lambda: None) -> str:
    """Return the name of the error that an act gets, empty if it succeeds."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = _try(act, folder, confine)
        os.write(writer, struct.pack("i", code))
        os._exit(0)
    os.close(writer)
    try:
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        if not poll.poll(DEADLINE * 1000):
            os.kill(pid, signal.SIGKILL)
        said = os.read(reader, 4)
    finally:
        os.close(reader)
        _, status = os.waitpid(pid, 0)
    assert status == 0, f"the act ended with {status}"
    # Nothing was said: another program is in its place.
    code = struct.unpack("i", said)[0] if said else 0
    return errno.errorcode[code] if code else ""


def _try(act: Act, folder: Path, confine: Callable[[], object]) -> int:
    try:
        steps = act(folder)
        next(steps)
        confine()
        next(steps, None)
    except OSError as error:
        return error.errno or errno.EIO
    except BaseException:  # noqa: BLE001  (it must not become a second pytest)
        sys.excepthook(*sys.exc_info())
        os._exit(3)
    return 0
