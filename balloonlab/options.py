"""Options that several commands share, declared once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from balloonlab.setup import DEFAULT_MEMORY, DEFAULT_SUITE, GuestOptions
from balloonlab.sizes import parse_size
from qmp_glue.debian import SUITES


class Parser(argparse.ArgumentParser):
    """An error is one line: the cause, and where to look."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: ANN401  (argparse has overloads)
        """Refuse what is not known where it was given: a command's own parser leaves that to the one above it."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


# What add_subparsers() returns has no public name.
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # noqa: SLF001


def add_guest_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the guest to boot."""
    group = parser.add_argument_group("guest")
    group.add_argument(
        "--suite",
        choices=tuple(SUITES),
        default=DEFAULT_SUITE,
        help="Debian suite of the kernel (default: %(default)s)",
    )
    group.add_argument(
        "--kernel", type=Path, metavar="FILE", help="a kernel of your own instead, with --modules"
    )
    group.add_argument("--modules", type=Path, metavar="DIR", help="its lib/modules/VERSION folder")
    group.add_argument(
        "--memory", default=DEFAULT_MEMORY, metavar="SIZE", help="guest memory (default: %(default)s)"
    )
    group.add_argument("--cpus", type=int, default=1, metavar="N", help="virtual CPUs (default: %(default)s)")
    group.add_argument(
        "--accelerator",
        choices=("auto", "kvm", "tcg"),
        default="auto",
        help="default: kvm where it works, else tcg",
    )
    group.add_argument(
        "--append",
        default="",
        metavar="WORDS",
        help="more words for the kernel's command line, e.g. init_on_free=1",
    )


def guest_options(options: argparse.Namespace) -> GuestOptions:
    """Return what the options say. Raises UsageError."""
    return GuestOptions(
        suite=options.suite,
        kernel=options.kernel,
        modules=options.modules,
        memory_bytes=parse_size(options.memory),
        cpus=options.cpus,
        accelerator=options.accelerator,
        append=tuple(options.append.split()),
    )


def add_fill_options(parser: argparse.ArgumentParser) -> None:
    """Declare what is filled and freed in the guest, and where the run's files go."""
    parser.add_argument(
        "--fill", default="600M", metavar="SIZE", help="memory to fill and free (default: %(default)s)"
    )
    parser.add_argument(
        "--kind",
        choices=("anonymous", "tmpfs"),
        default="anonymous",
        help="what is filled (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder (default: runs/TIME, and runs/latest)"
    )
