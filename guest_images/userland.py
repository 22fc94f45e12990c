"""The user space of a guest: Debian's static busybox, and a Python cut down to what the agent imports.

The interpreter comes from the Debian release that the kernel's suite belongs to. Which modules it needs is not guessed:
it imports the agent here, through its own loader, reports what it loaded and compiles that to byte code for itself.
Libraries are the DT_NEEDED closure of what is copied. `guest_images.initramfs` uses it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from guest_images.cpio import Entry, file, symlink
from guest_images.elf import runtime_files
from guest_images.errors import ImageError
from guest_images.tree import LOADER, Tree, package_tree
from qmp_glue.debian import SUITES

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = ("busybox-static", "python3-minimal", "libpython3-stdlib")
# Of their dependencies a guest takes these; the rest serves installation and modules that the agent does not import.
KEPT = re.compile(r"busybox-static|libc6|zlib1g|libexpat1|(lib)?python3\.\d+-(minimal|stdlib)")
BUSYBOX = "usr/bin/busybox"
AGENT = Path(__file__).with_name("agent.py")
AGENT_PATH = "usr/lib/agent.pyc"
# Compiling some fifty modules takes less than a second here.
DEADLINE_S = 60.0
# Loaded only once something goes wrong or text has another encoding, so not seen while the agent is imported.
ALWAYS = ("encodings.ascii", "encodings.latin_1", "encodings.utf_8", "traceback")

# What the guest's own Python runs. Arguments: the agent's source, a directory for byte code, more modules to take.
COMPILE = """
import sys
agent, output, *more = sys.argv[1:]
sys.modules["_hashlib"] = None  # OpenSSL, 5 MB for what hashlib has without it
exec(compile(open(agent).read(), agent, "exec"), {"__name__": "agent"})
for name in more:
    __import__(name)
files = {agent, *(getattr(module, "__file__", None) for module in list(sys.modules.values()))} - {None}
import json, py_compile
compiled = {}
for number, source in enumerate(sorted(files)):
    compiled[source] = source
    if source.endswith(".py"):
        compiled[source] = f"{output}/{number}"
        py_compile.compile(source, compiled[source], source.removeprefix(sys.base_prefix.removesuffix("/usr")), True,
                           invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
print(json.dumps(compiled))
"""


def userland_tree(suite: str, *, progress: Callable[[str], None] = lambda _line: None) -> Tree:
    """Return the unpacked packages of a guest's user space; of a backports suite, those of its release.

    Raises DebianError.
    """
    return package_tree(
        SUITES[suite][0], NAMES, keep=lambda name: bool(KEPT.fullmatch(name)), progress=progress
    )


def userland(tree: Tree) -> list[Entry]:
    """Return the user space as archive members below usr/; the agent is at AGENT_PATH. Raises ImageError."""
    with tempfile.TemporaryDirectory(prefix="vhost-user-balloon-") as scratch:
        python = _python(tree)
        members = {
            _inside(tree, source): data.read_bytes() for source, data in _modules(tree, python, scratch)
        }
    extensions = [path for path in members if path.endswith(".so")]
    for path in runtime_files(tree.root, [python, BUSYBOX, *extensions]):
        members[path] = (tree.root / path).read_bytes()
    entries = [file(path, data, executable=_executable(path)) for path, data in sorted(members.items())]
    # PT_INTERP of every amd64 program (System V psABI) names the loader below /lib64.
    loader = symlink(f"usr/lib64/{Path(LOADER).name}", f"/{LOADER}")
    links = [loader, symlink("usr/bin/python3", python.rpartition("/")[2]), *_applets(tree)]
    return entries + links


def _python(tree: Tree) -> str:
    found = [
        path for path in (tree.root / "usr/bin").glob("python3.*") if re.fullmatch(r"python3\.\d+", path.name)
    ]
    if len(found) != 1:
        raise ImageError(
            f"{len(found)} Python interpreters below {tree.root}, expected one: remove it and try again"
        )
    return f"usr/bin/{found[0].name}"


def _modules(tree: Tree, python: str, scratch: str) -> list[tuple[str, Path]]:
    """Let the guest's Python compile what it loads for the agent; return (source, file to copy)."""
    command = [*tree.command(python), "-S", "-s", "-c", COMPILE, str(AGENT), scratch, *ALWAYS]
    environment = {"PYTHONHOME": str(tree.root / "usr"), "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.defpath}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=DEADLINE_S)
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ImageError(
            f"the guest's Python cannot import the agent ({reason}): see KEPT in {__file__}"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImageError(
            f"the guest's Python does not run here ({error}): images are built on x86-64 only"
        ) from error
    return [(source, Path(data)) for source, data in json.loads(done.stdout).items()]


def _inside(tree: Tree, source: str) -> str:
    """Return where a module lies in the guest: byte code stands in for its source."""
    if source == str(AGENT):
        return AGENT_PATH
    path = str(Path(source).relative_to(tree.root))
    return f"{path}c" if path.endswith(".py") else path


def _executable(path: str) -> bool:
    return path.startswith("usr/bin/") or "/ld-linux" in path


def _applets(tree: Tree) -> list[Entry]:
    """Return a link for each of busybox's programs; it is static and says itself which it has."""
    try:
        done = subprocess.run(
            [str(tree.root / BUSYBOX), "--list"],
            capture_output=True,
            check=True,
            text=True,
            timeout=DEADLINE_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ImageError(f"busybox does not run here ({error}): images are built on x86-64 only") from error
    names = sorted(set(done.stdout.split()) - {"busybox"})
    return [symlink(f"usr/bin/{name}", "busybox") for name in names]
