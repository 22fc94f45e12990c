"""The command balloonlab check: a look at somebody's QEMU before the device is put beside it.

At its command line, or over QMP at one that runs. It starts and changes nothing. The rules are qmp_glue.inspect's; this file prints what they find.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from balloonlab import signals
from balloonlab.errors import UsageError
from balloonlab.options import Commands
from balloonlab.progress import Progress
from hostdev.errors import EXIT_CHECK_FAILED, EXIT_PASS
from qmp_glue.inspect import Finding, inspect_arguments, inspect_running
from qmp_glue.monitor import open_monitor


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "check", help="look at a QEMU for what would make giving memory back unsafe or useless"
    )
    parser.add_argument(
        "--qmp", type=Path, metavar="PATH", help="look at the QEMU that serves QMP there instead"
    )
    parser.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="-- QEMU ARGUMENT...", help="the command line"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Print the findings. Returns 1 if one of them is an error."""
    findings = _findings(options)
    for finding in findings:
        progress.say(f"{finding.severity}: {finding.message} [{finding.rule}]")
    if any(finding.severity == "error" for finding in findings):
        return EXIT_CHECK_FAILED
    progress.say("nothing in it stands in the way of giving memory back")
    return EXIT_PASS


def _findings(options: argparse.Namespace) -> list[Finding]:
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if bool(argv) == (options.qmp is not None):
        raise UsageError(
            "check needs a command line or --qmp PATH: balloonlab check -- qemu-system-x86_64 -m 1G ..."
        )
    return inspect_arguments(argv) if argv else signals.run(_running(options.qmp))


async def _running(path: Path) -> list[Finding]:
    async with open_monitor(path) as qemu:
        return await inspect_running(qemu)
