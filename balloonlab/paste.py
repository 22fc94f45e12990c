"""The commands balloonlab qemu-args and libvirt-xml: what people paste into their own tools.

Nothing is started or looked for. The words are qmp_glue.paste's; this file prints them.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from balloonlab.errors import UsageError
from balloonlab.options import Commands
from balloonlab.progress import Progress
from balloonlab.setup import DEFAULT_MEMORY
from balloonlab.sizes import parse_size
from hostdev.errors import EXIT_PASS
from qmp_glue.device_words import DRIVERS
from qmp_glue.paste import MACHINES, libvirt_domain, libvirt_fragments, qemu_arguments

# The README's: whoever pastes from both has one path.
DEFAULT_SOCKET = Path("/tmp/balloon.sock")
NO_MEMORY = "none"


def add_parsers(commands: Commands) -> None:
    """Declare the commands."""
    parser = commands.add_parser("qemu-args", help="print the arguments that give your own QEMU the device")
    _add_socket_option(parser)
    parser.add_argument(
        "--memory",
        default=DEFAULT_MEMORY,
        metavar="SIZE",
        help=f"guest memory (default: %(default)s); {NO_MEMORY}: the device only, where memory is shared already",
    )
    parser.add_argument(
        "--machine", choices=tuple(MACHINES), default="q35", help="machine type (default: %(default)s)"
    )
    parser.add_argument(
        "--transport",
        choices=tuple(DRIVERS),
        help="how the guest sees the device (default: the machine's own)",
    )
    parser.add_argument(
        "--json", action="store_true", help="a JSON array of words instead of a line for a shell"
    )
    parser.set_defaults(run=run_qemu_args)
    parser = commands.add_parser("libvirt-xml", help="print the XML that gives a libvirt domain the device")
    _add_socket_option(parser)
    parser.add_argument(
        "--domain", action="store_true", help="a whole minimal domain, and not only what to add"
    )
    parser.add_argument("--memory", metavar="SIZE", help=f"of that domain (default: {DEFAULT_MEMORY})")
    parser.set_defaults(run=run_libvirt_xml)


def _add_socket_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket-path",
        type=Path,
        default=DEFAULT_SOCKET,
        metavar="PATH",
        help="where the device listens (default: %(default)s)",
    )


def run_qemu_args(options: argparse.Namespace, _progress: Progress) -> int:
    """Print the words, on one line."""
    words = qemu_arguments(
        options.socket_path.absolute(),
        memory_bytes=None if options.memory == NO_MEMORY else parse_size(options.memory),
        machine=options.machine,
        transport=options.transport,
    )
    print(json.dumps(words) if options.json else shlex.join(words))  # noqa: T201
    return EXIT_PASS


def run_libvirt_xml(options: argparse.Namespace, _progress: Progress) -> int:
    """Print the XML."""
    if options.memory is not None and not options.domain:
        raise UsageError("--memory goes with --domain: a domain of your own has its memory already")
    path = options.socket_path.absolute()
    text = (
        libvirt_domain(path, parse_size(options.memory or DEFAULT_MEMORY))
        if options.domain
        else libvirt_fragments(path)
    )
    print(text)  # noqa: T201
    return EXIT_PASS
