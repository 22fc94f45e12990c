"""Chooses, of many inputs, few that together execute what all of them do: the corpus that the repository keeps.

libFuzzer's own merge keeps hundreds of files a target. Here what counts is which line of the device follows which and how
often, to the power of two, seen by sys.settrace, so that it needs no atheris and chooses the same whoever runs it. Greedy:
the input that adds most for its bytes comes next. Used by the command with --keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import balloonlab
import hostdev
from tests.fuzz.targets import Check

# What the repository has room for, a target.
MAX_FILES = 60
MAX_BYTES = 100_000

# File, line, line after it, and how many bits the count has.
Step: TypeAlias = tuple[str, int, int, int]
_FOLDERS = tuple(str(Path(module.__file__ or "").parent) for module in (hostdev, balloonlab))


def steps(check: Check, data: bytes) -> frozenset[Step]:
    """Return which lines follow which, how often, when the device is given an input, whatever comes of it."""
    seen: Counter[tuple[str, int, int]] = Counter()
    before = sys.gettrace()

    def enter(frame: FrameType, _event: str, _argument: object) -> Any:  # noqa: ANN401  (settrace's own type)
        name = frame.f_code.co_filename
        if not name.startswith(_FOLDERS):
            return None
        last = 0

        def follow(frame: FrameType, _event: str, _argument: object) -> Any:  # noqa: ANN401
            nonlocal last
            seen[name, last, frame.f_lineno] += 1
            last = frame.f_lineno
            return follow

        return follow(frame, "call", None)

    sys.settrace(enter)
    try:
        with contextlib.suppress(Exception):  # a finding is no matter of what it covers
            check(data)
    finally:
        sys.settrace(before)
    return frozenset((*step, count.bit_length()) for step, count in seen.items())


def choose(
    covered: Mapping[bytes, frozenset[Step]], files: int = MAX_FILES, size: int = MAX_BYTES
) -> list[bytes]:
    """Choose inputs, the most useful first, until all is covered or there is no room for more."""
    left, chosen, known = dict(covered), list[bytes](), set[Step]()
    while left and len(chosen) < files:
        best = max(left, key=lambda data: (len(left[data] - known) / (16 + len(data)), data))
        gained = left.pop(best) - known
        if not gained:
            break
        if len(best) <= size:
            size -= len(best)
            known |= gained
            chosen.append(best)
    return chosen


def replace(folder: Path, chosen: Iterable[bytes]) -> None:
    """Have a folder hold these inputs, under names that come of their content, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {hashlib.sha256(data).hexdigest()[:16]: data for data in chosen}
    for file in folder.iterdir():
        if file.name not in wanted:
            file.unlink()
    for name, data in wanted.items():
        (folder / name).write_bytes(data)
