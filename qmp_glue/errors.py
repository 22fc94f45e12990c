"""The tree of qmp_glue's errors. Every message names the cause and the fix; ``exit_code`` is what a program returns.

    QmpGlueError                 2: usage or set-up
    +-- DebianError              packages could not be had
    |   +-- AptMissingError      3: no apt or dpkg here
    |   +-- MirrorMissingError   3: apt's configuration names no Debian mirror
    |   +-- KeyringMissingError  3: nothing to verify with
    |   +-- ResolutionError      the suite has no such packages
    |   +-- DownloadError        the mirror is out of reach, or has not what was asked for
    |   |   +-- SignatureError   what came is not Debian's
    |   +-- UnpackError          a package or its destination is not as it must be
    +-- CacheError               the cache directory cannot be made or written to
    +-- QemuNotFoundError        3: no QEMU that can front the device, and none could be fetched
    +-- MachineError             a machine that cannot be described to QEMU (a ValueError as well)
    +-- LockTimeoutError         another process held a lock file for too long
    +-- BackendError             the device's socket: nobody listens there, or does not answer
    +-- VmError                  a running QEMU
        +-- QemuExitedError      it ended by itself; carries the last lines it wrote
        +-- DeadlineError        it did not answer or change in time
        +-- CommandDeniedError   a command that is known to crash QEMU: it was not sent
        +-- CommandFailedError   QEMU answered with an error; carries its class
        +-- MonitorClosedError   the QMP connection is not open
        +-- AttachError          a device cannot be added to or taken from this machine
        |   +-- RefusedError     1: what the inspection found forbids it; carries the findings
        +-- QtestError           a qtest command was refused, or its connection is not open
        +-- VirtioError          a virtio device on the machine's bus is missing or does not do its part

Standard library only: debian.py, which imports it, runs before anything is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmp_glue.inspect import Finding

__all__ = [
    "AptMissingError",
    "AttachError",
    "BackendError",
    "CacheError",
    "CommandDeniedError",
    "CommandFailedError",
    "DeadlineError",
    "DebianError",
    "DownloadError",
    "KeyringMissingError",
    "LockTimeoutError",
    "MachineError",
    "MirrorMissingError",
    "MonitorClosedError",
    "QemuExitedError",
    "QemuNotFoundError",
    "QmpGlueError",
    "QtestError",
    "RefusedError",
    "ResolutionError",
    "SignatureError",
    "UnpackError",
    "VirtioError",
    "VmError",
]


class QmpGlueError(Exception):
    """Something about QEMU, its machine or its packages failed."""

    exit_code = 2


class DebianError(QmpGlueError):
    """Packages could not be had. The message names the cause and the fix."""


class AptMissingError(DebianError):
    """A program of Debian's package tools is not on this machine."""

    exit_code = 3


class MirrorMissingError(DebianError):
    """This machine's apt configuration names no Debian mirror."""

    exit_code = 3


class KeyringMissingError(DebianError):
    """Debian's archive keyring is not on this machine, so nothing could be verified."""

    exit_code = 3


class ResolutionError(DebianError):
    """apt cannot install these names from this suite."""


class DownloadError(DebianError):
    """The mirror could not be reached, or does not have what was asked for."""


class SignatureError(DownloadError):
    """What came is not signed by Debian, or its hash does not match what was signed."""


class UnpackError(DebianError):
    """A package could not be unpacked, or its destination is already there."""


class CacheError(QmpGlueError):
    """The cache directory cannot be made or written to."""


class QemuNotFoundError(QmpGlueError):
    """This machine has no QEMU that can front the device, and none could be fetched."""

    exit_code = 3


class MachineError(QmpGlueError, ValueError):
    """A machine that cannot be described to QEMU."""


class LockTimeoutError(QmpGlueError):
    """Another process held a lock file for too long."""


class BackendError(QmpGlueError):
    """The device's socket: nobody listens there, or who does gives no answer."""


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


class AttachError(VmError):
    """A device cannot be added to this machine, or taken from it. Nothing was changed, unless the message says so."""


class RefusedError(AttachError):
    """What the inspection found forbids adding the device: ``findings`` says what. Nothing was changed."""

    exit_code = 1

    def __init__(self, findings: Sequence[Finding]) -> None:
        lines = "".join(f"\n  {finding.severity}: {finding.message} [{finding.rule}]" for finding in findings)
        super().__init__(f"the machine is as it was, the device was not added:{lines}")
        self.findings = tuple(findings)


class QtestError(VmError):
    """QEMU refused a qtest command, or the connection is not open."""


class VirtioError(VmError):
    """A virtio device is not where it is looked for, or does not do its part of the protocol."""
