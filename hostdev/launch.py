"""Options of vhost-user-balloon, the checks that fail early, and the start of the keeper.

QEMU's back end program conventions first (--socket-path, --fd; no daemonizing; SIGTERM ends it), our own options after.
Each bad start is one line that names the cause and the fix. Used by cli.py only.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from hostdev import __version__, sandbox
from hostdev.child import freeze
from hostdev.control_socket import ControlSocket
from hostdev.discard import AUTO, REQUESTS
from hostdev.errors import BalloonError, CommandError, SetupError, UnsupportedHostError
from hostdev.fds import occupy_standard
from hostdev.handover import TAKE_OVER
from hostdev.host_limits import protect
from hostdev.keeper import TERM_SECONDS, Keeper
from hostdev.listening import inherited, is_listening
from hostdev.log_output import Output
from hostdev.options import Options
from hostdev.place import INHERITED, Place, name_of
from hostdev.signals import TOLD
from hostdev.takeover import Predecessor
from hostdev.trace import begin_trace
from hostdev.wire.balloon import DEFAULT_FEATURES, Feature

PROGRAM = "vhost-user-balloon"

LOG_LEVELS = {
    "off": logging.CRITICAL + 1,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}

EXAMPLES = f"""\
example, in two terminals:
  {PROGRAM} --socket-path=/tmp/balloon.sock
  qemu-system-x86_64 -m 1G -M q35,memory-backend=mem \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=balloon,path=/tmp/balloon.sock \\
    -device vhost-user-test-device-pci,chardev=balloon,virtio-id=5,num_vqs=5,config_size=16,vq_size=128 ...
"""


class _Parser(argparse.ArgumentParser):
    """An error is one line: the cause, and where to look."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def run(arguments: Sequence[str]) -> int:
    """Parse, check, serve. Returns the exit status."""
    occupy_standard()
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=LOG_LEVELS[options.log_level],
        format=f"{PROGRAM}[%(process)d]: %(levelname)s: %(message)s",
        handlers=[Output()],
    )
    try:
        return _serve(options)
    except BalloonError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)  # noqa: T201  (one line, whatever the log level)
        return error.exit_status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="A virtio-balloon device outside the VMM: gives a guest's free memory back to the host.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--socket-path",
        metavar="PATH",
        action="append",
        help="listen on this unix socket, made with mode 0600; given again: for one more guest",
    )
    where.add_argument(
        "--fd",
        "--socket-fd",
        type=int,
        metavar="FDNUM",
        help="use this inherited socket, connected or listening",
    )
    parser.add_argument(
        "--print-capabilities", action="store_true", help="print what this back end can do, as JSON"
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="end when a front end has gone and none is left, instead of serving the next",
    )
    parser.add_argument(
        "--on-term",
        choices=("wait", "now"),
        default="wait",
        help="on SIGTERM with a front end connected: wait for it to go, which its VM needs (the default), or end now",
    )
    parser.add_argument(
        "--term-timeout",
        type=seconds,
        default=TERM_SECONDS,
        metavar="SECONDS",
        help=f"how long to wait then, default: {TERM_SECONDS:g}",
    )
    parser.add_argument(
        "--discard",
        choices=REQUESTS,
        default=AUTO,
        help="how memory is given back; auto (the default) takes what really frees the guest's backing",
    )
    parser.add_argument(
        "--hugetlb-release",
        action="store_true",
        help="give back whole huge pages as well: if another process takes one, QEMU dies at the guest's next touch",
    )
    parser.add_argument(
        "--features",
        default="",
        metavar="+NAME,-NAME",
        help="offer or withhold virtio features, e.g. --features=-page_poison",
    )
    parser.add_argument(
        "--metrics-file", type=Path, metavar="PATH", help="keep counters there in Prometheus' text format"
    )
    parser.add_argument(
        "--control",
        metavar="PATH",
        help="speak QMP on this unix socket, in a folder of your own (made if need be)",
    )
    parser.add_argument(
        "--trace", type=Path, metavar="PATH", help='write what happens there; "balloonlab decode" prints it'
    )
    parser.add_argument(
        "--sandbox",
        choices=sandbox.REQUESTS,
        default=sandbox.AUTO,
        help="auto (the default): each process gives up what it does not need; none: for a debugger inside",
    )
    parser.add_argument("--log-level", choices=tuple(LOG_LEVELS), default="info", help="default: info")
    parser.add_argument(TAKE_OVER, type=int, metavar="FDNUM", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    return parser


def _serve(options: argparse.Namespace) -> int:
    _check_host()
    # Held back until the keeper has its handlers: a signal in between would end it and leave the socket behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)
    _check_metrics_file(options.metrics_file)
    if options.trace is not None and options.take_over is None:
        begin_trace(options.trace)
    features = parse_features(options.features)
    device = Options(
        discard=options.discard,
        hugetlb_release=options.hugetlb_release,
        features=features,
        metrics_file=options.metrics_file,
        trace_file=options.trace,
        sandbox=options.sandbox,
    )
    protect()
    sandbox.begin(options.sandbox, takes_over=options.take_over is not None)
    freeze()
    settings = _Settings(
        _for_guest(device, options),
        options.once,
        options.term_timeout if options.on_term == "wait" else 0,
        options.sandbox,
    )
    with contextlib.ExitStack() as sockets:
        if options.take_over is not None:
            return _take_over(settings, options, sockets)
        keeper = settings.keeper(_control(options.control, sockets))
        if options.fd is None:
            _listen(keeper, options.socket_path, sockets)
            return keeper.run()
        given = sockets.enter_context(inherited(options.fd))
        if is_listening(given):
            keeper.add(Place(INHERITED, given))
            return keeper.run()
        return keeper.run(given)


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the command line says about the keeper."""

    for_guest: Callable[[str], Options]
    once: bool
    term_seconds: float
    sandbox: str

    def keeper(self, control: ControlSocket | None) -> Keeper:
        return Keeper(
            self.for_guest,
            once=self.once,
            control=control,
            term_seconds=self.term_seconds,
            confined=self.sandbox,
        )


def _take_over(settings: _Settings, options: argparse.Namespace, sockets: contextlib.ExitStack) -> int:
    """Take over from the keeper that started us. Its sockets are ours to remove once they are ours."""
    with Predecessor(options.take_over) as predecessor:
        predecessor.agree()
        left = predecessor.receive()
        control = None
        if options.control is not None:
            control = ControlSocket.adopted(
                options.control, left.control, left.control_identity, folder_made=left.control_folder
            )
        keeper = settings.keeper(control)
        predecessor.relieve(keeper.adopt(left))
    if control is not None:
        sockets.enter_context(control)
    for place in left.places:
        sockets.callback(place.close)
    return keeper.run()


def _control(path: str | None, sockets: contextlib.ExitStack) -> ControlSocket | None:
    if path is None:
        return None
    control = ControlSocket(path)
    control.open()
    return sockets.enter_context(control)


def _listen(keeper: Keeper, paths: Sequence[str], sockets: contextlib.ExitStack) -> None:
    for path in paths:
        place = Place.at(path)
        sockets.callback(place.close)
        try:
            keeper.add(place)
        except CommandError as error:
            raise SetupError(f"--socket-path {path}: {error}") from error


def _for_guest(device: Options, options: argparse.Namespace) -> Callable[[str], Options]:
    """Return what a guest's options are: files of its own, and a label, for each but the first on the command line."""
    first = INHERITED if options.fd is not None else name_of(options.socket_path[0])

    def of(name: str) -> Options:
        if name == first:
            return device
        metrics_file, trace_file = (_own(path, name) for path in (device.metrics_file, device.trace_file))
        return replace(device, guest=name, metrics_file=metrics_file, trace_file=trace_file)

    return of


def _own(path: Path | None, name: str) -> Path | None:
    """Return a guest's own file beside one that was named."""
    return None if path is None else path.with_stem(f"{path.stem}.{name}")


def seconds(text: str) -> float:
    """Read a finite number, 0 and up; named as argparse's error has it. Raises ValueError."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def _check_host() -> None:
    """Refuse a host whose memory order virtqueue.py does not rely on, and a Python that writes behind our back."""
    # It keeps a file of its own open, whose number a forked process closes and gives to another: the guest's RAM, maybe.
    if getattr(sys, "is_stack_trampoline_active", lambda: False)():
        raise SetupError("Python writes maps for perf (PYTHONPERFSUPPORT, -X perf): start the device without")
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        raise UnsupportedHostError(
            f"this is {platform.machine()} on {sys.platform}: the device needs the store order of x86-64 and Linux"
        )


def _check_metrics_file(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise SetupError(f"--metrics-file {path}: it must be a file in a folder that can be written to")


def parse_features(text: str) -> Feature:
    """Apply "+name,-name" to the default features. Raises SetupError for a name that is none."""
    features = DEFAULT_FEATURES
    for word in filter(None, text.split(",")):
        sign, name = word[0], word[1:].upper().replace("-", "_")
        if sign not in "+-" or name not in Feature.__members__:
            known = ", ".join(feature.lower() for feature in Feature.__members__)
            raise SetupError(f"--features {word!r}: write +name or -name, comma-separated, of {known}")
        features = features | Feature[name] if sign == "+" else features & ~Feature[name]
    return features
