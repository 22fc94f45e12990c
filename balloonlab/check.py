"""The command balloonlab check: a look at somebody's QEMU command line before the device is put beside it.

It starts nothing. The rules are qmp_glue.inspect's; this file prints what they find.
"""

from __future__ import annotations

import argparse

from balloonlab.errors import UsageError
from balloonlab.options import Commands
from balloonlab.progress import Progress
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS
from qmp_glue.inspect import inspect_arguments


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "check", help="look at a QEMU command line for what would make giving memory back unsafe or useless"
    )
    parser.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="-- QEMU ARGUMENT...", help="the command line"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Print the findings. Returns 1 if one of them is an error."""
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        raise UsageError("check needs a command line: balloonlab check -- qemu-system-x86_64 -m 1G ...")
    findings = inspect_arguments(argv)
    for finding in findings:
        progress.say(f"{finding.severity}: {finding.message} [{finding.rule}]")
    if any(finding.severity == "error" for finding in findings):
        return EXIT_CHECK_FAILED
    progress.say("nothing in it stands in the way of giving memory back")
    return EXIT_PASS
