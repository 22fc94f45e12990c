"""Looks at the world before each line of one function: what another processor, or a successor, could see there. Not a test."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def at_each_line(function: Callable[..., object], look: Callable[[], None]) -> Iterator[list[int]]:
    """Call look before each line of the function and when it returns. Gives the lines at which it did."""
    code, lines = function.__code__, []
    looking = False

    def inside(frame: FrameType, event: str, _argument: object) -> Any:  # noqa: ANN401  (a trace function returns one)
        nonlocal looking
        if event in ("line", "return") and not looking:
            looking = True
            lines.append(frame.f_lineno)
            look()
            looking = False
        return inside

    def calls(frame: FrameType, event: str, _argument: object) -> Any:  # noqa: ANN401
        return inside if event == "call" and frame.f_code is code and not looking else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        yield lines
    finally:
        sys.settrace(before)
