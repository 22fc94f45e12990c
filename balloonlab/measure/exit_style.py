"""Exit statuses for people and pipelines, and those that `git bisect run` wants. Used by command.py, compare.py, cli.py.

default: 0 pass, 1 a check failed, 2 usage or set-up, 3 this machine can't, as everywhere in balloonlab.

bisect: git-bisect(1) takes 0 as good, 1 to 127 as bad, of which 125 says that this commit cannot be judged and is to be
skipped, and 128 and more as a reason to stop. Whoever looks for the commit that stopped giving memory back is misled most
by a "bad" that has nothing to do with it. So:

- 125: nothing was measured for a reason that is this commit's own: its image cannot be booted, the guest panicked or hung
  before its user space answered, QEMU or device did not start.
- 1: the guest came up, and something was not as it should be: a budget, a check, a command, no driver, a panic or a hang
  under the load. From there on the good commit did what this one does not. What is not meant is left out by a scenario
  without that phase, or by the script, which sees ending and findings in result.json.
- 0: the guest came up and everything held. Of several runs those that never came up are left out, if one did.
- 255: it would be the same for each commit: a wrong option, a file that is not there, no QEMU, no network, a defect of ours.
  A kernel that was not built is for the script to find: make ... || exit 125.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeAlias

from balloonlab import errors
from balloonlab.errors import DeviceError, GuestEndedError, GuestSetupError
from guest_images.errors import GuestError
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS
from qmp_glue.errors import BackendError, VmError

if TYPE_CHECKING:
    from balloonlab.measure.report import Report, Run

Style: TypeAlias = Literal["default", "bisect"]
STYLES: tuple[Style, ...] = ("default", "bisect")

# git-bisect(1): "the special exit code 125", and any "above 127" stops; 255 is what its examples' exit(-1) gives.
SKIP = 125
ABORT = 255
_OPTION = "--exit-style"
# Raised for what one commit is or does; every other expected error would come again with the next commit.
_OF_THE_COMMIT = (GuestError, GuestSetupError, GuestEndedError, DeviceError, VmError, BackendError)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Declare --exit-style; its value is a Style."""
    parser.add_argument(
        _OPTION,
        choices=STYLES,
        default="default",
        help="bisect: for git bisect run: 0 good, 1 bad, 125 cannot be judged, 255 stop (default: %(default)s)",
    )


def asked_for(words: Sequence[str]) -> Style:
    """Return the style that a command line asks for, also where it cannot be parsed: that is an exit status as well."""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        # argparse takes an option by its beginning too.
        if name != "--" and name.startswith("--") and _OPTION.startswith(name):
            return "bisect" if (value if equals else after) == "bisect" else "default"
    return "default"


def exit_status(style: Style, outcome: Report | BaseException) -> int:
    """Return the exit status for a report, or for one of errors.EXPECTED that left none."""
    if isinstance(outcome, BaseException):
        return _of_error(style, outcome)
    if style == "default":
        return EXIT_PASS if outcome.passed else EXIT_CHECK_FAILED
    came_up = [run for run in outcome.runs if booted(run)]
    if not came_up:
        return SKIP
    arms = {run.arm for run in came_up}
    judged = [check for arm in outcome.arms if arm.arm in arms for check in arm.checks]
    passed = all(run.passed for run in came_up) and all(check.outcome != "fail" for check in judged)
    return EXIT_PASS if passed else EXIT_CHECK_FAILED


def booted(run: Run) -> bool:
    """Return whether a run's guest came up, so that there is something to judge."""
    return run.figures.get("boot_seconds") is not None or any(phase.do != "boot" for phase in run.phases)


def _of_error(style: Style, error: BaseException) -> int:
    if style == "default":
        return errors.exit_status(error)
    return SKIP if isinstance(error, _OF_THE_COMMIT) else ABORT


class Aborting:
    """A context in which, in bisect style, a usage error of argparse and a defect end with 255: git takes 1 and 2 as bad."""

    def __init__(self, style: Style) -> None:
        self._style = style

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._style == "default":
            return
        if isinstance(error, SystemExit) and error.code not in (None, EXIT_PASS):
            raise SystemExit(ABORT) from None
        if isinstance(error, Exception):
            traceback.print_exception(error, file=sys.stderr)
            raise SystemExit(ABORT) from None
