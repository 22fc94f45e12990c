"""The keeper's side of one worker: its process, the channel to it, and whether it is alive.

A worker is a direct child, forked from the keeper's already imported state with what its predecessor left. Nothing here
waits. What a worker does is worker.py's, what is said to it wire/channel.py's; guest.py decides when there is another.
"""

from __future__ import annotations

import contextlib
import functools
import select
import socket
import time
from collections.abc import Sequence

from hostdev import fds, worker
from hostdev.child import Child
from hostdev.estate import Estate
from hostdev.options import Options, Start
from hostdev.wire.channel import ANSWER, FRAME, MAX_DATAGRAM, Answer, Frame


class WorkerLink:
    """One worker, from its fork to its burial.

    channel: to watch for answers. pidfd: readable once it has ended. control: the control process's end of a pair to it.
    """

    def __init__(self, options: Options, estate: Estate, start: Start, *, controlled: bool) -> None:
        """Fork it. controlled: make a pair between it and the control process as well. Raises OSError."""
        self.channel, theirs = _pair()
        self.control: fds.Fd | None = None
        workers: socket.socket | None = None
        try:
            if controlled:
                controls, workers = _pair()
                self.control = fds.Fd(controls.detach())
            process = functools.partial(worker.start, theirs, options, workers, estate, start)
            self._child = Child("worker", process)
        except OSError:
            self._close()
            raise
        finally:
            theirs.close()
            if workers is not None:
                workers.close()
        self.pid = self._child.pid
        self.pidfd = self._child.pidfd
        self._is_stopped = False
        self._stopped_since: float | None = None

    def has_ended(self, seconds: float) -> bool:
        """True once it has ended; waits for that."""
        return self._child.has_ended(seconds)

    def has_said(self, seconds: float) -> bool:
        """True once there is something to take; waits for that."""
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def give(self, frame: Frame, descriptors: Sequence[fds.Fd] = ()) -> None:
        """Send it a frame. What it does not take its successor will: its end is seen, or that it does not answer."""
        with contextlib.suppress(OSError):  # it has died, or the host has no room for descriptors under way
            fds.send(self.channel, FRAME.encode(frame), descriptors)

    def take(self) -> Answer:
        """Take what it says.

        Raises BlockingIOError if there is nothing, EOFError if there will be nothing any more, LayoutError for nonsense.
        """
        try:
            data = fds.receive(self.channel, MAX_DATAGRAM).data
        except ConnectionResetError:
            # Said once, and first: it died with a frame unread. What it had said before is still there.
            data = fds.receive(self.channel, MAX_DATAGRAM).data
        if not data:
            raise EOFError
        return ANSWER.decode(data)

    def note_stop(self) -> None:
        """Some child has stopped, gone on or ended: see if it is this one."""
        self._is_stopped = self._child.is_stopped(stopped=self._is_stopped)
        if not self._is_stopped:
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = time.monotonic()

    @property
    def stopped_since(self) -> float | None:
        """The moment, by the monotonic clock, from which on it has been stopped; None while it is not."""
        return self._stopped_since

    def forgive(self) -> None:
        """The keeper was stopped as well, maybe: a stop counts from now."""
        if self._stopped_since is not None:
            self._stopped_since = time.monotonic()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._child.kill()

    def release(self) -> None:
        """Close the channel: a worker ends then."""
        self.channel.close()

    def bury(self, *, expected: bool = False) -> bool:
        """Reap it once it has ended, and close everything. False, with a line in the log, if it did not end well."""
        self._close()
        return self._child.bury(expected=expected)

    @property
    def had_bus_error(self) -> bool:
        """True once it is buried and a touch of guest memory that is not there any more ended it."""
        return self._child.had_bus_error

    def _close(self) -> None:
        self.channel.close()
        if self.control is not None:
            self.control.close()
            self.control = None


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
