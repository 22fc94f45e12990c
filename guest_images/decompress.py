"""Decompresses what Python's standard library of Debian 12 and 13 cannot: Zstandard and legacy LZ4.

Debian compresses its kernels with these two. The program `zstd` or `lz4` of this machine does it; a machine without
gets the tool from Debian's archive into the cache and runs it there (`guest_images.tree`). It is a filter over bytes in
memory. `guest_images.kernel` and `.modules` use it.
"""

from __future__ import annotations

import shutil
import subprocess

from guest_images.errors import KernelError
from guest_images.tree import package_tree

# The suite a missing tool is taken from: Debian's oldest that this project supports, its tools run on any later one.
TOOL_SUITE = "bookworm"
# 60 MB come out in 0.3 s here; a loaded machine a hundred times slower is still not stuck.
DEADLINE_S = 60.0


def zstd(data: bytes) -> bytes:
    """Decompress Zstandard frames. Raises KernelError for damaged data, DebianError where the tool cannot be had."""
    return _filter("zstd", data)


def lz4(data: bytes) -> bytes:
    """Decompress LZ4, legacy format included. Raises KernelError for damaged data, DebianError without the tool."""
    return _filter("lz4", data)


def _filter(program: str, data: bytes) -> bytes:
    path = shutil.which(program)
    command = [path] if path else package_tree(TOOL_SUITE, (program,)).command(f"usr/bin/{program}")
    try:
        done = subprocess.run(
            [*command, "-dc"], input=data, capture_output=True, check=True, timeout=DEADLINE_S
        )
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip()
        raise KernelError(f"{program} cannot decompress this ({reason}): fetch the kernel again") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(
            f"{program} did not run ({error}): install the Debian package {program} again"
        ) from error
    return done.stdout
