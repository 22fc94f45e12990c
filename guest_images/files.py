"""Puts files into the cache whole or not at all. Every module of this package that writes there uses it."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def atomic_file(place: Path) -> Iterator[BinaryIO]:
    """Open a temporary sibling of `place`; it takes that name when the block ends well, else it is removed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(place: Path, data: bytes) -> None:
    """Write a file that appears whole."""
    with atomic_file(place) as file:
        file.write(data)
