"""The tree of errors: who is at fault, and what is done about it.

    BalloonError
    ├── SetupError             the person who started us: one line, exit status 2
    ├── UnsupportedHostError   this machine: one line, exit status 3
    ├── PeerError              the front end
    │   ├── StreamError        the byte stream cannot be trusted any more: close the connection
    │   └── RequestError       one request cannot be granted: answer non-zero if asked, keep the old state
    ├── GuestError             the guest's driver
    │   ├── ChainError         one descriptor chain is malformed: count it, return it with length 0
    │   └── RingError          a ring is broken: stop this ring, serve the others
    ├── RecordError            what a predecessor wrote down: it cannot be read, an upgrade is refused
    ├── UpgradeError           the version to come, or the one that goes: the old one serves on
    ├── HostError              the host refused to take memory back: count it, inert after repeated refusals
    └── CommandError           a client of the control socket: answered with its class and text, nothing has changed

A class is the whole policy: whoever catches one of these needs no further look at it to know what to do.
Everything else that is raised is our own fault and makes the device inert (worker.py).
"""

from __future__ import annotations

EXIT_PASS = 0
EXIT_CHECK_FAILED = 1
EXIT_USAGE = 2
EXIT_UNSUPPORTED = 3


class BalloonError(Exception):
    """The root: never raised itself."""

    exit_status = EXIT_CHECK_FAILED


class SetupError(BalloonError):
    """An option, a path or an inherited descriptor cannot be used as given."""

    exit_status = EXIT_USAGE


class UnsupportedHostError(BalloonError):
    """This machine cannot run the device safely."""

    exit_status = EXIT_UNSUPPORTED


class PeerError(BalloonError):
    """The front end broke the vhost-user protocol."""


class StreamError(PeerError):
    """The byte stream is out of step (version, reserved flags, size): only closing helps."""


class RequestError(PeerError):
    """A whole, well-framed request that cannot be granted."""


class GuestError(BalloonError):
    """The guest's driver broke the virtio rules."""


class ChainError(GuestError):
    """A malformed descriptor chain. Its head is known, so that the chain can be returned.

    kind is a short, fixed word for counting: nothing that the guest chose is in it.
    """

    def __init__(self, head: int, kind: str, detail: str) -> None:
        super().__init__(f"chain {head}: {detail}")
        self.head = head
        self.kind = kind


class RingError(GuestError):
    """A ring whose indices or heads cannot be followed any further."""


class RecordError(BalloonError):
    """The record of a guest is damaged, or of a version that this one cannot read."""


class UpgradeError(BalloonError):
    """Another version of the keeper does not, or cannot, take over."""


class HostError(BalloonError):
    """madvise or fallocate failed on the guest's memory."""


class CommandError(BalloonError):
    """A command of the control socket that cannot be carried out. error_class: as QMP has it."""

    def __init__(self, text: str, error_class: str = "GenericError") -> None:
        super().__init__(text)
        self.error_class = error_class
