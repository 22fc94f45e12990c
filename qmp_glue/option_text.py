"""QEMU's option values as text: option lists, the JSON that some options take instead, and sizes.

Pure, and forgiving: what is malformed is empty or None, since QEMU itself says what is wrong with it. Used by
machine_setup.py.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["is_on", "parse_option", "parse_size"]

# qapi/common: the suffixes of a size; -m alone takes MiB where there is none.
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_WORDS = {True: "on", False: "off"}


def parse_option(text: str, implied: str) -> dict[str, str]:
    """Parse ``first,key=value,flag`` with doubled commas, or JSON, whose nested objects become dotted keys."""
    if text.startswith("{"):
        return dict(_parse_json(text))
    parsed = {}
    for position, part in enumerate(re.split(r",(?!,)", text.replace(",,", "\0"))):
        key, equals, value = part.replace("\0", ",").partition("=")
        if equals:
            parsed[key] = value
        elif position == 0:
            parsed[implied] = key
        else:
            parsed[key] = "on"
    return parsed


def _parse_json(text: str) -> Iterator[tuple[str, str]]:
    """Yield what the JSON holds; too deeply nested is as malformed as anything."""
    try:
        values = json.loads(text)
        yield from _flatten(values, "")
    except (ValueError, RecursionError):
        return


def _flatten(value: object, key: str) -> Iterator[tuple[str, str]]:
    """As QEMU's own qdict_flatten() does: {"file": {"driver": "nvme"}} is file.driver=nvme."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _flatten(inner, f"{key}.{position}")
    else:
        yield key, _WORDS[value] if isinstance(value, bool) else str(value)


def is_on(text: str) -> bool:
    """Return whether this is one of the words that QEMU takes for true (qapi_bool_parse)."""
    return text in {"on", "true", "yes", "y"}


def parse_size(text: str, *, default_unit: str = "") -> int | None:
    """Return bytes, or None for what is no size."""
    matched = re.fullmatch(r"(0x[0-9a-f]+|\d+(?:\.\d+)?)([bkmgt]?)i?b?", text.lower())
    if matched is None:
        return None
    number = int(matched[1], 16) if matched[1].startswith("0x") else float(matched[1])
    return int(number * _UNITS[matched[2] or default_unit])
