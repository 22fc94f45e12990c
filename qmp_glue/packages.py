"""Package files on this machine: unpacking them without root, and running the tools of apt and dpkg.

It knows no archive and no network: debian.py fetches, and hands the files over. Standard library only.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from qmp_glue.errors import AptMissingError, DownloadError, UnpackError
from qmp_glue.scratch import scratch_directory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["LOCAL_SECONDS", "Package", "run_tool", "unpack"]

LOCAL_SECONDS = 120.0  # Resolving and unpacking one package touch no network.

# A merged /usr, as in every Debian since 12: packages of both layouts then unpack into one tree.
_MERGED = ("bin", "lib", "lib64", "sbin")


@dataclass(frozen=True)
class Package:
    """A downloaded, verified package in the cache."""

    name: str
    version: str
    deb: Path


def unpack(packages: Iterable[Package], into: Path) -> None:
    """Unpack the files of these packages into one new directory with a merged /usr: all of them, or no directory.

    Owners are not kept, maintainer scripts do not run. Raises UnpackError, also where ``into`` is there and not empty,
    and AptMissingError.
    """
    if into.exists() and any(into.iterdir()):
        raise UnpackError(f"{into} is there and not empty: remove it or name another directory")
    into.parent.mkdir(parents=True, exist_ok=True)
    with scratch_directory(into.parent, into.name) as scratch:
        root = scratch / "root"
        for name in _MERGED:
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        for package in packages:
            _unpack_one(package.deb, root)
        try:
            root.rename(into)
        except OSError as error:
            raise UnpackError(
                f"cannot put the unpacked files at {into}: {error.strerror}; name another directory"
            ) from error


def _unpack_one(deb: Path, root: Path) -> None:
    """Pipe dpkg-deb into tar: dpkg-deb knows the compressions, tar keeps sparse files and hard links."""
    tar = [
        "tar",
        "--extract",
        "--no-same-owner",
        "--keep-directory-symlink",
        f"--directory={root}",
        "--file=-",
    ]
    with tempfile.TemporaryFile("w+") as log:
        try:
            with subprocess.Popen(
                ["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE, stderr=log
            ) as unpacker:
                done = subprocess.run(
                    tar, stdin=unpacker.stdout, stderr=log, timeout=LOCAL_SECONDS, check=False
                )
        except FileNotFoundError as error:
            raise AptMissingError(_missing_program(error)) from error
        except subprocess.TimeoutExpired as error:
            raise UnpackError(
                f"unpacking {deb} took over {LOCAL_SECONDS:.0f} s: is the disk full or slow?"
            ) from error
        if unpacker.returncode != 0 or done.returncode != 0:
            log.seek(0)
            raise UnpackError(
                f"cannot unpack {deb}: remove it from the cache and try again\n  {log.read().strip()}"
            )


def run_tool(
    command: Sequence[str],
    *,
    seconds: float = LOCAL_SECONDS,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """Run a program of apt in the C locale, so that its output can be read, and with a deadline."""
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"} | dict(variables)
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            pass_fds=pass_fds,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError as error:
        raise AptMissingError(_missing_program(error)) from error
    except subprocess.TimeoutExpired as error:
        raise DownloadError(
            f"{command[0]} was not done after {seconds:.0f} s: check network and disk, and try again"
        ) from error


def _missing_program(error: FileNotFoundError) -> str:
    return (
        f"{error.filename} is not on this machine: run this on Debian, or install the packages apt and dpkg"
    )
