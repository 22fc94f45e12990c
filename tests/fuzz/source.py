"""An input of the fuzzer as a source of choices: each takes the next bytes, and the end of the input reads as zeroes.

So any bytes are a valid input, a short one is a simple one, and a changed byte changes one choice. Of our own and not
atheris' FuzzedDataProvider, because replaying a saved input must not need atheris. Pure. Used by the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Source:
    """Reads an input from its start to its end. True while there is something left."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece

    def number(self, width: int) -> int:
        """Return a number of so many bytes."""
        return int.from_bytes(self.take(width), "little")

    def below(self, limit: int) -> int:
        """Return a number from 0 to limit - 1, limit at most 65536."""
        return self.number(1 if limit <= 1 << 8 else 2) % limit

    def flag(self) -> bool:
        """Return one choice of two."""
        return bool(self.number(1) & 1)

    def one_in(self, count: int) -> bool:
        """Return True for one choice of so many, the last: what is rare does not come of zeroes."""
        return self.below(count) == count - 1

    def pick(self, items: Sequence[Item]) -> Item:
        """Return one of these."""
        return items[self.below(len(items))]
