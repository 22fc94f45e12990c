"""Signals as numbers that come out of a socket, so that select() wakes up for them: the keeper's own, or its parent's.

A keeper that took over from another is a child of the first, whose process id is the known one. That parent passes on
what people tell it (waiting_parent.py), down a line that goes from keeper to keeper with what is still in it. What reaches
such a keeper itself, as Ctrl-C and systemd's stop reach all of a group, it has been told already. Used by keeper.py.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Iterable
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

TERMINATING = (signal.SIGTERM, signal.SIGINT)
# What people say to a device.
TOLD = (*TERMINATING, signal.SIGHUP)
# What the kernel says about our own children, and about ourselves.
_OWN = (signal.SIGCHLD, signal.SIGCONT)


class Signals:
    """Where the numbers come from, while in context."""

    def __init__(self, line: socket.socket | None = None) -> None:
        """line: down which a parent passes on what it is told."""
        self._line = line
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._handle(_OWN)
        if self._line is None:
            self._handle(TOLD)
        else:
            self._ignore(TOLD)
        self._wakeup = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TOLD)
        return self

    def _handle(self, numbers: Iterable[signal.Signals]) -> None:
        for number in numbers:
            self._previous.setdefault(number, signal.signal(number, lambda *_: None))

    def _ignore(self, numbers: Iterable[signal.Signals]) -> None:
        for number in numbers:
            self._previous.setdefault(number, signal.signal(number, signal.SIG_IGN))

    @property
    def is_told(self) -> bool:
        """True while a parent passes on what it is told."""
        return self._line is not None

    @property
    def line(self) -> socket.socket:
        """Where a successor will find what people say."""
        return self._ours if self._line is None else self._line

    @property
    def sources(self) -> list[socket.socket]:
        """The sockets to watch."""
        return [self._ours] if self._line is None else [self._ours, self._line]

    def take(self, source: socket.socket) -> set[int]:
        """Take the numbers that one of them has. A line that has ended is one no more: to be watched no longer."""
        numbers = source.recv(4096, socket.MSG_DONTWAIT)
        if not numbers and source is self._line:
            self._line = None
            self._handle(TOLD)
            log.warning("the process that passed signals on has gone: this one takes them itself")
        return set(numbers)

    def pass_on(self) -> None:
        """From now on only pass on what we are told, down the line that a successor has."""
        for number in _OWN:
            signal.signal(number, signal.SIG_DFL)
        self._ours.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Held back again: what is left to do, such as removing the socket, is not to be cut short.
        signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        for each in (self._ours, self._theirs, self._line):
            if each is not None:
                each.close()
