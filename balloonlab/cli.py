"""The command balloonlab: everything that boots, drives and measures guests.

Exit status: 0 pass, 1 a check failed, 2 usage or set-up, 3 this machine can't run it, 130 and 143 ended by Ctrl-C and
SIGTERM; --exit-style bisect has others (measure/exit_style.py). An expected error is one message that names the cause
and the fix; anything else keeps its traceback.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from balloonlab import signals
from hostdev import __version__

if TYPE_CHECKING:
    from balloonlab.options import Parser

PROGRAM = "balloonlab"
_SIGNALLED = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    try:
        with signals.first_only(signals.unwind):
            return _run(argv)
    except signals.SignalledError as error:
        what = "interrupted" if error.number == signal.SIGINT else "terminated"
        print(f"{PROGRAM}: {what}, everything that was started has ended", file=sys.stderr)  # noqa: T201
        return _SIGNALLED + error.number


# Everything else is imported once the signals are in order: it costs a third of a second, in which Ctrl-C may come too.


def _run(argv: Sequence[str] | None) -> int:
    from rich.console import Console  # noqa: PLC0415

    from balloonlab.errors import EXPECTED  # noqa: PLC0415
    from balloonlab.measure.exit_style import Aborting, asked_for, exit_status  # noqa: PLC0415
    from balloonlab.progress import Progress  # noqa: PLC0415

    style = asked_for(sys.argv[1:] if argv is None else argv)
    with Aborting(style):
        options = _parser().parse_args(argv)
        try:
            return int(options.run(options, Progress(Console(soft_wrap=False))))
        except EXPECTED as error:
            print(f"{PROGRAM}: {error}", file=sys.stderr)  # noqa: T201
            return exit_status(style, error)


def _parser() -> Parser:
    from balloonlab import (  # noqa: PLC0415
        attach,
        check,
        ctl,
        decode,
        demo,
        doctor,
        fidelity,
        paste,
        simulate,
        vhost_user_json,
    )
    from balloonlab.measure import command as measure  # noqa: PLC0415
    from balloonlab.measure import compare  # noqa: PLC0415
    from balloonlab.options import Parser  # noqa: PLC0415

    parser = Parser(prog=PROGRAM, description="Boot guests, drive them, and measure what they cost the host.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    demo.add_parser(commands)
    measure.add_parser(commands)
    doctor.add_parsers(commands)
    check.add_parser(commands)
    attach.add_parsers(commands)
    ctl.add_parser(commands)
    paste.add_parsers(commands)
    vhost_user_json.add_parser(commands)
    decode.add_parser(commands)
    simulate.add_parser(commands)
    fidelity.add_parser(commands)
    compare.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
