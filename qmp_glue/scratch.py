"""Files that several processes share in the cache: locks, and directories that do not outlive their owner.

Both rest on flock(2), which the kernel drops with its holder, so that a killed process leaves nothing that has to be
told from the living. Used by debian.py and find.py. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from qmp_glue.errors import LockTimeoutError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LOCK_SECONDS", "locked", "scratch_directory"]

LOCK_SECONDS = 3600.0  # The longest step under a lock is a download of 60 MB over a slow line.
LOCK_POLL_SECONDS = 0.1


@contextlib.contextmanager
def locked(path: Path, *, seconds: float = LOCK_SECONDS) -> Iterator[int]:
    """Hold an exclusive lock on this file, made if need be; yield its descriptor, to pass to children. Raises LockTimeoutError when it stays taken."""
    deadline = time.monotonic() + seconds
    with path.open("a") as file:
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise LockTimeoutError(
                    f"another process has held {path} for {seconds:.0f} s: end it (fuser {path})"
                )
            time.sleep(LOCK_POLL_SECONDS)
        yield file.fileno()


@contextlib.contextmanager
def scratch_directory(parent: Path, name: str) -> Iterator[Path]:
    """Make a directory ``.name.*`` that is gone afterwards, and remove those that killed processes left.

    A living owner holds a lock on its directory; one that can be locked has none.
    """
    for stale in parent.glob(f".{name}.*"):
        with contextlib.suppress(OSError):
            _remove_if_dead(stale)
    path, fd = _own_directory(parent, name)
    try:
        yield path
    finally:
        os.close(fd)
        shutil.rmtree(path, ignore_errors=True)


def _own_directory(parent: Path, name: str) -> tuple[Path, int]:
    """Make a directory and lock it; again if somebody took it for a dead one's in between."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if path.exists():
                return path, fd
            os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_if_dead(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _try_lock(fd):
            shutil.rmtree(path)
    finally:
        os.close(fd)
