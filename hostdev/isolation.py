"""The first act of a process that the keeper has forked: to have nothing of the keeper's that is not meant for it.

A fork hands over every descriptor, close-on-exec or not, and the keeper's signal handlers. Used by worker.py and
control.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path


def isolate(*kept: socket.socket) -> None:
    """Close every descriptor but those kept and the standard three, and take signals back from the keeper.

    SIGINT is ignored: Ctrl-C reaches the whole process group, and the keeper is who decides what it means.
    """
    numbers = {sock.fileno() for sock in kept}
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if number > 2 and number not in numbers:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                os.close(number)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
