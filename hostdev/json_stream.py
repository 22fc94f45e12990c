"""JSON values out of a byte stream that never says where one ends: QMP's clients send no newline.

Framing and parsing are apart. The framer only follows brackets and strings, each byte looked at once however the stream
is cut, and holds one unfinished value of bounded size and depth; what it cuts out goes to Python's json, which by then
cannot recurse too deeply. As with QEMU (docs/interop/qmp-spec, "Forcing the JSON parser into known-good state") a byte
that occurs in no JSON, such as a control character or 0xFF, is an error and drops whatever is unfinished.

Pure; used by qmp_session.py for clients and by control.py for what the worker answers.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from hostdev.errors import CommandError

# Bytes of one value. Our longest command is a few hundred; a value must fit an envelope to the worker anyway.
MAX_VALUE = 64 << 10
# Open brackets within one value. json recurses once a level and Python has 1000 levels for everything; our deepest
# command has 3 and an id, which the client chooses, is rarely more than a number.
MAX_DEPTH = 64

# Bytes of no JSON outside of a string, and within one. 0xC0, 0xC1 and all from 0xF5 on are not UTF-8 either.
_STRAY = rb"\x00-\x08\x0b\x0c\x0e-\x1f\x7f\xc0\xc1\xf5-\xff"
_STRAY_IN_STRING = rb"\x00-\x1f\xc0\xc1\xf5-\xff"
# The next byte that changes anything, in each of the states that a stream can be in.
_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
_END_OF_WORD = re.compile(rb'[\s"{}\[\]' + _STRAY + rb"]")
_IN_BRACKETS = re.compile(rb'["{}\[\]' + _STRAY + rb"]")
_IN_STRING = re.compile(rb'["\\' + _STRAY_IN_STRING + rb"]")

_QUOTE, _BACKSLASH = b'"\\'
_DEPTH = {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}


class JsonStream:
    """Cuts values out of a stream: feed() it, then call next() until there is none."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._restart(0)

    def _restart(self, used: int) -> None:
        del self._data[:used]
        # Everything before this was looked at.
        self._at = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        # The value is too long or too deep, which was said: the rest of it is dropped as it comes.
        self._dropping = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        self._data += data

    def next(self) -> bytes | None:
        """Return the next whole value, not yet known to be valid; None if more of the stream is needed.

        Raises CommandError for what cannot be one; the stream goes on behind it.
        """
        while self._find_start():
            end = self._find_end()
            if end is None:
                return None
            value, dropping = bytes(self._data[:end]), self._dropping
            self._restart(end)
            if not dropping:
                return value
        return None

    @property
    def _inside(self) -> bool:
        return self._depth > 0 or self._in_string

    def _find_start(self) -> bool:
        """Drop white space in front of a value. False if there is nothing else."""
        if self._inside or self._at:
            return True
        found = _NOT_SPACE.search(self._data)
        del self._data[: found.start() if found else len(self._data)]
        return found is not None

    def _find_end(self) -> int | None:
        if not self._inside and _IN_BRACKETS.match(self._data) is None:
            return self._find_end_of_word()
        while (at := self._find_next()) is not None:
            if self._take(self._data[at]):
                return self._at
        return None

    def _find_end_of_word(self) -> int | None:
        """Find what is behind a number or a word such as true: only that says that it has ended."""
        found = _END_OF_WORD.search(self._data, self._at)
        self._at = found.start() if found else len(self._data)
        if self._at > MAX_VALUE:
            self._restart(MAX_VALUE)
            raise CommandError(f"a JSON value is longer than {MAX_VALUE} bytes")
        return self._at if found else None

    def _find_next(self) -> int | None:
        """Find the next byte that changes anything and step behind it."""
        if self._escaped and self._at < len(self._data):
            self._escaped = False
            self._at += self._data[self._at] in (_QUOTE, _BACKSLASH)
        pattern = _IN_STRING if self._in_string else _IN_BRACKETS
        found = pattern.search(self._data, self._at)
        at = found.start() if found else len(self._data)
        if at + bool(found) > MAX_VALUE and not self._dropping:
            self._at = max(self._at, MAX_VALUE)
            self._drop(f"a JSON value is longer than {MAX_VALUE} bytes")
        self._at = at + 1 if found else at
        if self._dropping and not found:
            del self._data[: self._at]
            self._at = 0
        return at if found else None

    def _take(self, byte: int) -> bool:
        """Follow one byte. True if the value has ended with it."""
        if byte == _QUOTE:
            self._in_string = not self._in_string
        elif byte == _BACKSLASH:
            self._escaped = True
        elif byte in _DEPTH:
            self._depth += _DEPTH[byte]
            if self._depth > MAX_DEPTH and not self._dropping:
                self._drop("JSON nesting depth limit exceeded")
        else:
            self._restart(self._at)
            raise CommandError(f"JSON parse error, stray byte 0x{byte:02x}")
        return not self._inside

    def _drop(self, why: str) -> NoReturn:
        """Give a value up at this byte. Raises CommandError."""
        self._dropping = True
        del self._data[: self._at]
        self._at = 0
        raise CommandError(why)


def parse(value: bytes) -> Any:  # noqa: ANN401  (any JSON value)
    """Parse one value. Raises CommandError for what JSON does not allow, and for what cannot be repeated in JSON.

    Numbers as QEMU takes them: integers of 64 bits, others as floating point.
    """
    try:
        parsed = json.loads(
            value.decode(),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
        # A lone surrogate ("\ud800") is no character: who is sent it back could not read the line.
        json.dumps(parsed, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        text = error.msg[0].lower() + error.msg[1:]
        raise CommandError(f"JSON parse error, {text} (character {error.pos})") from None
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise CommandError(f"JSON parse error, not UTF-8: {error.reason}") from None
    return parsed


def parse_whole(text: bytes) -> Any:  # noqa: ANN401
    """Parse text that is one value and nothing else, bounded in size and depth like one in a stream."""
    stream = JsonStream()
    stream.feed(text + b"\n")
    value = stream.next()
    if value is None or stream.next() is not None:
        raise CommandError("not one JSON value")
    return parse(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise CommandError("JSON parse error, duplicate key")
    return made


# More digits than this are no integer of 64 bits, sign included, and need not be converted to see that.
_MAX_DIGITS = 20


def _integer(text: str) -> int | float:
    if len(text) <= _MAX_DIGITS and -(1 << 63) <= (number := int(text)) < 1 << 64:
        return number
    return _number(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise CommandError("JSON parse error, a number is out of range")
    return number


def _constant(text: str) -> NoReturn:
    raise CommandError(f"JSON parse error, invalid keyword '{text}'")
