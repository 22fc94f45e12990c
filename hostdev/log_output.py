"""Writes the log to standard error, and waits for nobody: who does not read it is not to stop a VM.

QEMU waits for the device under its big lock; a pipe to a reader that hangs, once it is full, would have the device wait in
turn. What is not taken at once is left out and counted. O_NONBLOCK belongs to an open file description, which others use as
well: so a pipe or a terminal is opened a second time, and a socket told at each write. Used by launch.py; the forked processes
have it from there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat

STDERR = 2
# Bytes that a pipe takes whole or not at all (pipe(7), PIPE_BUF).
PIECE = 4096


class Output(logging.Handler):
    """A handler that writes lines to a descriptor, or leaves them out."""

    def __init__(self, number: int = STDERR) -> None:
        """number: stays what it is for others, and waits for nobody from now on in this process and its children."""
        super().__init__()
        self._number = number
        self._socket: socket.socket | None = None
        self._lost = 0
        with contextlib.suppress(
            OSError
        ):  # closed; or a terminal that is another user's: then it waits, as ever
            self._open_again(os.fstat(number).st_mode)

    def _open_again(self, mode: int) -> None:
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=self._number)
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            again = os.open(f"/proc/self/fd/{self._number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            os.dup2(again, self._number)
            os.close(again)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, and before it how many were left out."""
        text = self.format(record)
        if self._lost:
            text = f"{self._lost} lines of the log are missing here: nobody read them\n{text}"
        if self._write(text.encode(errors="backslashreplace") + b"\n"):
            self._lost = 0
        else:
            self._lost += 1

    def _write(self, data: bytes) -> bool:
        """Write as much as is taken at once. False if that is nothing; the end of something long may be missing."""
        for at in range(0, len(data), PIECE):
            try:
                self._write_piece(data[at : at + PIECE])
            except BlockingIOError:
                return at > 0
            except OSError:
                return True  # a pipe that nobody reads any more, a full disk: there is nobody to tell
        return True

    def _write_piece(self, data: bytes) -> None:
        if self._socket is None:
            os.write(self._number, data)
        else:
            self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Leave the descriptor open: it was given to us."""
        if self._socket is not None:
            self._socket.detach()
            self._socket = None
        super().close()
