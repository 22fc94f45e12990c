"""The command balloonlab vhost-user-json: how management software finds the device.

QEMU's docs/interop/vhost-user.json: a file for each back end, in one of three directories, names its type and its
program. Printed, or installed for this user or into a directory; a file that is not ours is never touched.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

from balloonlab.errors import UsageError
from balloonlab.options import Commands
from balloonlab.progress import Progress
from hostdev.cli import CAPABILITIES
from hostdev.errors import EXIT_PASS
from hostdev.launch import PROGRAM

# "the basename ... should start with a double-digit prefix"; others may put theirs before or after it.
FILE_NAME = "50-vhost-user-balloon.json"
# By this, and its type, a file is known to be ours.
DESCRIPTION = "vhost-user-balloon, a virtio-balloon outside the VMM"
USER = "user"


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "vhost-user-json", help="print or install the file by which QEMU's tools find the device"
    )
    parser.add_argument(
        "--install",
        metavar=f"{USER}|DIR",
        help=f"write it there as {FILE_NAME}; {USER} is $XDG_CONFIG_HOME/qemu/vhost-user",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Print the document, or install it and say where."""
    text = document(find_program())
    if options.install is None:
        print(text, end="")  # noqa: T201
        return EXIT_PASS
    path = _directory(options.install) / FILE_NAME
    progress.say(f"{path} {'is written' if install(path, text) else 'is there and the same'}")
    return EXIT_PASS


def document(program: Path) -> str:
    """Return the JSON (VhostUserBackend)."""
    fields = {"description": DESCRIPTION, "type": CAPABILITIES["type"], "binary": str(program), "tags": []}
    return json.dumps(fields, indent=2) + "\n"


def find_program() -> Path:
    """Return where the device's program is: beside this Python, or on the PATH. Raises UsageError."""
    beside = Path(sysconfig.get_path("scripts")) / PROGRAM
    named = str(beside) if os.access(beside, os.X_OK) else shutil.which(PROGRAM)
    if named is None:
        raise UsageError(f"there is no program {beside}, and none on the PATH: install this package with pip")
    return Path(named).absolute()


def _directory(where: str) -> Path:
    """Return the directory; only the user's own is made. Raises UsageError."""
    if where != USER:
        directory = Path(where).absolute()
        if not directory.is_dir():
            raise UsageError(f"--install {where} is no directory: make it first, or say {USER}")
        return directory
    named = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    directory = (named if named.is_absolute() else Path.home() / ".config") / "qemu" / "vhost-user"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{directory} cannot be made ({error.strerror}): name another directory") from error
    return directory


def install(path: Path, text: str) -> bool:
    """Write the file whole or not at all; return False where it is there already. Raises UsageError."""
    if _is_ours(path) and path.read_text() == text:
        return False
    try:
        _write(path, text)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): name another directory") from error
    return True


def _write(path: Path, text: str) -> None:
    """Where there was none, a link says so if somebody made one meanwhile; readers pass over names with a dot."""
    descriptor, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        if _is_ours(path):
            os.replace(name, path)  # noqa: PTH105
        else:
            os.link(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Return whether the file is one of this command's; False where there is none. Raises UsageError for another's."""
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        return False
    except (ValueError, OSError):
        fields = None
    if not isinstance(fields, dict) or fields.get("description") != DESCRIPTION:
        raise UsageError(
            f"{path} is not this command's, so it is left alone: remove it, or name another directory"
        )
    return True
