"""A process forked by the keeper: its start from the already imported state, and its end.

Used by guest.py for workers and by control_link.py for the control process. What such a process does first is
isolation.py's.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
from collections.abc import Callable

from hostdev.errors import EXIT_CHECK_FAILED
from hostdev.fds import Fd

log = logging.getLogger(__name__)

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Seconds that a child has to finish what it is at (a worker's slice takes some 10 ms) and to unmap after its channel was
# closed.
END_DEADLINE = 2.0


class Child:
    """One forked process. ``pidfd`` is readable once it has ended."""

    def __init__(self, name: str, start: Callable[[], int]) -> None:
        """name: for the log. start: what the process does; returns its exit status. Raises OSError."""
        self._name = name
        # True once it is buried and a touch of a mapping ended it that has no memory behind it.
        self.had_bus_error = False
        self.pid = _fork(name, start)
        try:
            self.pidfd = Fd(os.pidfd_open(self.pid))
        except OSError:
            # No descriptor is left for it: one that nobody watches must not be.
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise

    def kill(self) -> None:
        """Send SIGKILL."""
        with contextlib.suppress(ProcessLookupError):  # it has ended, and waits to be buried
            signal.pidfd_send_signal(self.pidfd.fileno(), signal.SIGKILL)

    def has_ended(self, seconds: float = 0.0) -> bool:
        """True once it has ended; waits for that."""
        poll = select.poll()
        poll.register(self.pidfd.fileno(), select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def is_stopped(self, *, stopped: bool) -> bool:
        """Say if it is stopped, by SIGSTOP or the like. stopped: if it was at the last look."""
        changes = os.WSTOPPED | os.WCONTINUED | os.WNOHANG
        with contextlib.suppress(ChildProcessError):  # it has ended
            while (change := os.waitid(os.P_PIDFD, self.pidfd.fileno(), changes)) is not None:
                stopped = change.si_code == os.CLD_STOPPED
        return stopped

    def bury(self, *, expected: bool = False) -> bool:
        """Reap a process that has ended. False, with a line in the log unless expected, if it did not end with 0."""
        with self.pidfd:
            status = os.waitpid(self.pid, 0)[1]
        self.had_bus_error = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGBUS
        if status and not expected:
            log.error("the %s ended with %s", self._name, _describe(status))
        return status == 0

    def reap(self) -> bool:
        """Wait for the end; kill a process that hangs. False, with a line in the log, if it did not end with 0."""
        if not self.has_ended(END_DEADLINE):
            log.error("the %s does not end: killing process %d", self._name, self.pid)
            self.kill()
        return self.bury()


def freeze() -> None:
    """Have the collector pass over all that there is, which is there to stay: what it looks at, it writes to.

    For every page that one process writes to, those that were forked have a copy.
    """
    gc.collect()
    gc.freeze()


def _fork(name: str, start: Callable[[], int]) -> int:
    """Fork, and freeze what the child has of us. Not before: what is frozen is never collected, fork after fork."""
    # A signal to all of the group is the keeper's: until the child has let go of its wakeup socket, it holds them back.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    status = EXIT_CHECK_FAILED
    try:
        gc.freeze()
        status = start()
    except BaseException:
        log.exception("the %s ends", name)
    finally:
        os._exit(status)


def _describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
