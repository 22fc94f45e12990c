"""A process forked by the keeper: its start from the already imported state, and its end within a deadline.

Used by guest.py for workers and by control_link.py for the control process. What such a process does first is
isolation.py's.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
from collections.abc import Callable

from hostdev.errors import EXIT_CHECK_FAILED
from hostdev.fds import Fd

log = logging.getLogger(__name__)

# Seconds that a child has to finish what it is at (a worker's slice takes some 10 ms) and to unmap after its channel was
# closed.
END_DEADLINE = 2.0


class Child:
    """One forked process. It ends when its channel is closed, which is for the owner to do; reap() waits for that."""

    def __init__(self, name: str, start: Callable[[], int]) -> None:
        """name: for the log. start: what the process does; returns its exit status."""
        self._name = name
        self.pid = _fork(name, start)
        self._pidfd = Fd(os.pidfd_open(self.pid))

    def kill(self) -> None:
        """Send SIGKILL."""
        signal.pidfd_send_signal(self._pidfd.fileno(), signal.SIGKILL)

    def reap(self) -> bool:
        """Wait for the end; kill a process that hangs. False, with a line in the log, if it did not end with 0."""
        with self._pidfd:
            poll = select.poll()
            poll.register(self._pidfd.fileno(), select.POLLIN)
            if not poll.poll(END_DEADLINE * 1000):
                log.error("the %s does not end: killing process %d", self._name, self.pid)
                self.kill()
            status = os.waitpid(self.pid, 0)[1]
        if status:
            log.error("the %s ended with %s", self._name, _describe(status))
        return status == 0


def _fork(name: str, start: Callable[[], int]) -> int:
    """Fork with everything frozen first: the child's collector copies no page of ours."""
    gc.freeze()
    pid = os.fork()
    if pid:
        return pid
    status = EXIT_CHECK_FAILED
    try:
        status = start()
    except BaseException:
        log.exception("the %s ends", name)
    finally:
        os._exit(status)


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
