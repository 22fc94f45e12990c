"""The first act of a process that the keeper has forked: to have nothing of the keeper's that is not meant for it.

A fork hands over every descriptor, close-on-exec or not, and the keeper's signal handlers. Used by worker.py and
control.py.
"""

from __future__ import annotations

import os
import signal
import socket

from hostdev.fds import Fd

# The keeper handles all of these. Some reach a whole process group (Ctrl-C, a terminal that is closed, systemd's stop), and
# what they mean is for the keeper to decide.
_RESET = (signal.SIGCHLD, signal.SIGCONT)
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)


def isolate(*kept: socket.socket | Fd) -> None:
    """Close every descriptor but those kept and the standard three, and take signals back from the keeper."""
    last = 2
    for number in sorted(each.fileno() for each in kept):
        os.closerange(last + 1, number)
        last = number
    os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))
    signal.set_wakeup_fd(-1)
    for number in _RESET:
        signal.signal(number, signal.SIG_DFL)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
