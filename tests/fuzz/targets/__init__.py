"""What is fuzzed: a module for each target, whose check() takes one input and raises for a property that does not hold.

Nothing here needs atheris: a saved input is replayed by plain Python (tests/fuzz/test_replay.py). Nothing of the device is
imported before load(), so that the fuzzer can instrument it first.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Check = Callable[[bytes], None]

NAMES = (
    "messages",
    "chains",
    "pfns",
    "statistics",
    "hints",
    "control",
    "channel",
    "record",
    "trace",
)


def load(name: str) -> Check:
    """Import a target. Raises KeyError for one that there is not."""
    if name not in NAMES:
        raise KeyError(name)
    check: Check = importlib.import_module(f"{__name__}.{name}").check
    return check


def summary(name: str) -> str:
    """Return the first line of what a target says of itself."""
    text = importlib.import_module(f"{__name__}.{name}").__doc__ or ""
    return text.splitlines()[0]


@contextmanager
def silence() -> Iterator[None]:
    """Have the device log nothing meanwhile: what it is given here is wrong on purpose."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
