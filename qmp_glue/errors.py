"""The tree of qmp_glue's errors. Every message names the cause and the fix; ``exit_code`` is what a program returns.

    QmpGlueError                 2: usage or set-up
    +-- debian.DebianError       packages could not be had (its children stand in debian.py)
    +-- QemuNotFoundError        3: no QEMU that can front the device, and none could be fetched
    +-- MachineError             a machine that cannot be described to QEMU (a ValueError as well)
    +-- LockTimeoutError         another process held a lock file for too long
    +-- VmError                  a running QEMU
        +-- QemuExitedError      it ended by itself; carries the last lines it wrote
        +-- DeadlineError        it did not answer or change in time
        +-- CommandDeniedError   a command that is known to crash QEMU: it was not sent
        +-- CommandFailedError   QEMU answered with an error; carries its class
        +-- MonitorClosedError   the QMP connection is not open

Standard library only: debian.py, which imports it, runs before anything is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "CommandDeniedError",
    "CommandFailedError",
    "DeadlineError",
    "LockTimeoutError",
    "MachineError",
    "MonitorClosedError",
    "QemuExitedError",
    "QemuNotFoundError",
    "QmpGlueError",
    "VmError",
]


class QmpGlueError(Exception):
    """Something about QEMU, its machine or its packages failed."""

    exit_code = 2


class QemuNotFoundError(QmpGlueError):
    """This machine has no QEMU that can front the device, and none could be fetched."""

    exit_code = 3


class MachineError(QmpGlueError, ValueError):
    """A machine that cannot be described to QEMU."""


class LockTimeoutError(QmpGlueError):
    """Another process held a lock file for too long."""


class VmError(QmpGlueError):
    """A running QEMU did not do what was asked."""


class QemuExitedError(VmError):
    """QEMU ended by itself: ``status`` is its return code (negative: the signal), ``last_lines`` what it wrote last."""

    def __init__(self, status: int, last_lines: Sequence[str]) -> None:
        cause = f"signal {-status}" if status < 0 else f"status {status}"
        said = "\n  ".join(last_lines) or "(it wrote nothing)"
        super().__init__(f"QEMU ended with {cause}; put right what its last lines name:\n  {said}")
        self.status = status
        self.last_lines = tuple(last_lines)


class DeadlineError(VmError):
    """QEMU did not answer, or did not come to a state, in time."""


class CommandDeniedError(VmError):
    """A command that is known to crash QEMU with this device; it was not sent."""


class CommandFailedError(VmError):
    """QEMU answered a command with an error of class ``error_class``."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(
            f"QEMU refused {command}: {description}; check its arguments and the state of the machine"
        )
        self.command = command
        self.error_class = error_class
        self.description = description


class MonitorClosedError(VmError):
    """The QMP connection is not open."""
