"""Errors of the lab's own, and the exit status of everybody's.

LabError
├── UsageError         an option or a path cannot be used as given (2)
├── DeviceError        the device did not start or ended early (2)
├── GuestSetupError    the guest came up but cannot do what the experiment needs (2)
├── GuestHungError     the guest does not answer, not at all or not any more (2)
└── GuestEndedError    the guest panicked or powered off before its time (2)
"""

from __future__ import annotations

from guest_images.errors import GuestError
from hostdev.errors import EXIT_USAGE, BalloonError
from qmp_glue.errors import QmpGlueError


class LabError(Exception):
    """The root: never raised itself."""

    exit_code = EXIT_USAGE


class UsageError(LabError):
    """An option or a path cannot be used as given."""


class DeviceError(LabError):
    """The device did not start or ended early."""


class GuestSetupError(LabError):
    """The guest came up but cannot do what the experiment needs."""


class GuestHungError(LabError):
    """The guest does not answer, not at all or not any more; QEMU and the device live."""


class GuestEndedError(LabError):
    """The guest panicked or powered off before its time, and QEMU ended in order."""


# What a command turns into one line and an exit status; anything else is a defect and keeps its traceback.
EXPECTED = (LabError, GuestError, QmpGlueError, BalloonError)


def exit_status(error: BaseException) -> int:
    """Return the exit status of one of EXPECTED."""
    if isinstance(error, BalloonError):
        return error.exit_status
    return int(getattr(error, "exit_code", EXIT_USAGE))
