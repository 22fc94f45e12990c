"""`python -m guest_images build --suite S`: makes a guest and prints the paths to give to QEMU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from guest_images.build import build_guest, build_own_guest
from guest_images.errors import GuestError
from guest_images.initramfs import kernel_command_line
from qmp_glue.debian import SUITES
from qmp_glue.errors import QmpGlueError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, or the error's exit code (2 set-up, 3 this machine cannot)."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.kernel is None) != (arguments.modules is None):
        parser.error("--kernel and --modules go together: a guest loads the modules of its own kernel")
    try:
        if arguments.kernel is not None:
            image = build_own_guest(arguments.kernel, arguments.modules, progress=_tell)
        else:
            image = build_guest(arguments.suite, progress=_tell)
    except (GuestError, QmpGlueError) as error:
        _tell(f"error: {error}")
        return error.exit_code
    rows = {"version": image.kernel_version, "kernel": image.kernel, "initrd": image.initrd}
    rows |= {"pvh": "yes" if image.pvh else "no", "append": kernel_command_line()}
    sys.stdout.writelines(f"{name}: {value}\n" for name, value in rows.items())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m guest_images", description="Make guests to boot under QEMU."
    )
    build = parser.add_subparsers(required=True).add_parser("build", help="make one guest, print its paths")
    build.add_argument(
        "--suite", choices=sorted(SUITES), default="trixie", help="Debian suite of kernel and user space"
    )
    build.add_argument(
        "--kernel", type=Path, help="your own kernel instead: bzImage or vmlinux (needs --modules)"
    )
    build.add_argument("--modules", type=Path, help="its modules directory, lib/modules/VERSION")
    return parser


def _tell(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201 - the command line's own voice


if __name__ == "__main__":
    sys.exit(main())
