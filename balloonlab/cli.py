"""The command balloonlab: everything that boots, drives and measures guests.

Exit status: 0 pass, 1 a check failed, 2 usage or set-up, 3 this machine can't run it, 130 and 143 ended by Ctrl-C and
SIGTERM. An expected error is one message that names the cause and the fix; anything else keeps its traceback.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from rich.console import Console

from balloonlab import check, demo, doctor
from balloonlab.errors import EXPECTED, exit_status
from balloonlab.options import Parser
from balloonlab.progress import Progress
from hostdev import __version__

PROGRAM = "balloonlab"
_SIGNALLED = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    options = _parser().parse_args(argv)
    progress = Progress(Console(soft_wrap=False))
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return int(options.run(options, progress))
    except EXPECTED as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)  # noqa: T201
        return exit_status(error)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted, everything that was started has ended", file=sys.stderr)  # noqa: T201
        return _SIGNALLED + signal.SIGINT
    except (_TerminatedError, asyncio.CancelledError):
        print(f"{PROGRAM}: terminated, everything that was started has ended", file=sys.stderr)  # noqa: T201
        return _SIGNALLED + signal.SIGTERM


class _TerminatedError(BaseException):
    """SIGTERM arrived outside of asyncio: unwind like KeyboardInterrupt."""


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _TerminatedError


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="Boot guests, drive them, and measure what they cost the host.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    demo.add_parser(commands)
    doctor.add_parsers(commands)
    check.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
