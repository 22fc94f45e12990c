"""Run folders: where a run's files go, and what was true of the machine while it ran.

Used by every command that runs an experiment.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from balloonlab.errors import UsageError
from hostdev import __version__

_DEPENDENCIES = ("construct", "pyelftools", "qemu.qmp", "msgspec", "rich", "matplotlib")
_SETTINGS = (
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/vm/swappiness",
    "/sys/kernel/mm/ksm/run",
)


def make_folder(chosen: Path | None, base: Path = Path("runs")) -> Path:
    """Make the run folder: the one chosen, which must be empty or new, or base/TIME with base/latest pointing at it.

    Raises UsageError.
    """
    folder = chosen if chosen is not None else base / time.strftime("%Y-%m-%dT%H.%M.%S")
    try:
        folder.mkdir(parents=True, exist_ok=chosen is not None)
        if any(folder.iterdir()):
            raise UsageError(
                f"--out {folder} is not empty: nothing in it is overwritten, name another folder"
            )
        if not os.access(folder, os.W_OK):
            raise UsageError(f"--out {folder} cannot be written to: name another folder")
    except FileExistsError as error:
        what = "is there already" if folder.is_dir() else "is not a folder"
        raise UsageError(f"{folder} {what}: name another with --out") from error
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}; name another with --out") from error
    if chosen is None:
        _point(base / "latest", folder.name)
    return folder


def _point(link: Path, name: str) -> None:
    """Make link point at name, replacing an older link and nothing else."""
    if link.exists() and not link.is_symlink():
        return
    fresh = link.with_name(f".latest.{os.getpid()}")
    fresh.symlink_to(name)
    fresh.replace(link)


def environment() -> dict[str, Any]:
    """Return versions and host settings, for meta.json."""
    return {
        "command": [sys.executable, *sys.argv],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "vhost-user-balloon": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _DEPENDENCIES},
        },
        "host": {
            "kernel": platform.release(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "settings": {path: _setting(Path(path)) for path in _SETTINGS},
        },
    }


def _setting(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
