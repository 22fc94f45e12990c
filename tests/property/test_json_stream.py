"""Properties of the framing of a client's bytes.

- However a stream is cut, the same values and the same errors come out of it, in the same order.
- JSON values one behind the other come out as they went in, with any white space between them or none.
- Any bytes give values or CommandErrors, and never does the stream hold more than one value's worth of them.
- After any bytes, a byte that is in no JSON makes the stream understand what follows.
- Whatever parses can be written as JSON again, and reads the same.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from hostdev import json_stream
from hostdev.errors import CommandError
from hostdev.json_stream import MAX_DEPTH, MAX_VALUE, JsonStream, parse, parse_whole

SPACE = st.text(" \t\r\n", max_size=3).map(str.encode)
NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
# Bytes that matter to the framing, far more often than any others.
BYTES = st.lists(st.sampled_from([bytes([byte]) for byte in b'{}[]":,\\ \n1at\x01\x7f\xff\xc3\xa9'])).map(
    b"".join
) | st.binary(max_size=60)
FRAGMENTS = st.lists(BYTES | st.sampled_from([b'{"execute":"query-version"}', b'"\\\\"', b'{"a":"\\"}"}']))


def outcomes(pieces: list[bytes], bound: int = MAX_VALUE) -> list[object]:
    """Values and the texts of errors, in order."""
    stream, found = JsonStream(), list[object]()
    for piece in pieces:
        stream.feed(piece)
        while True:
            try:
                value = stream.next()
            except CommandError as error:
                found.append(str(error))
                continue
            if value is None:
                break
            found.append(value)
        assert len(stream._data) <= bound
    return found


@given(FRAGMENTS.map(b"".join), st.lists(st.integers(0, 200)))
@example(b'"\\\xff"1 ', [2])
@example(b'{"a":"\\', [6])
def test_any_cut_gives_the_same(stream: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), max(len(stream), *cuts, 0)]
    pieces = [stream[begin:end] for begin, end in pairwise(edges)]
    assert b"".join(pieces) == stream
    assert outcomes(pieces) == outcomes([stream])
    assert outcomes([bytes([byte]) for byte in stream]) == outcomes([stream])


@given(
    st.lists(
        st.sampled_from([b"[", b"{", b'"', b"\\", b"x", b"}", b"]", b" ", b"\xff", b"xxxxxx"]), max_size=40
    ),
    st.lists(st.integers(0, 100)),
)
@example([b'"', b"xxxxxx", b"\\", b'"', b'"', b"]"], [8])
def test_any_cut_gives_the_same_at_the_bounds(words: list[bytes], cuts: list[int]) -> None:
    """With bounds of 8 bytes and 3 levels, which such streams reach."""
    bounds = json_stream.MAX_VALUE, json_stream.MAX_DEPTH
    json_stream.MAX_VALUE, json_stream.MAX_DEPTH = 8, 3
    try:
        stream = b"".join(words)
        edges = [0, *sorted(cuts), max(len(stream), *cuts, 0)]
        pieces = [stream[begin:end] for begin, end in pairwise(edges)]
        assert outcomes(pieces, 8) == outcomes([stream], 8)
        assert outcomes([bytes([byte]) for byte in stream], 8) == outcomes([stream], 8)
        assert all(len(found) <= 8 for found in outcomes([stream], 8) if isinstance(found, bytes))
    finally:
        json_stream.MAX_VALUE, json_stream.MAX_DEPTH = bounds


@given(st.lists(st.tuples(VALUES, SPACE, st.booleans()), max_size=6))
def test_values_come_out_as_they_went_in(sequence: list[tuple[Any, bytes, bool]]) -> None:
    """Numbers and words need something behind them to have an end; brackets and strings do not."""
    stream = b""
    for value, space, ascii_only in sequence:
        stream += json.dumps(value, ensure_ascii=ascii_only).encode() + space
        if not isinstance(value, dict | list | str) and not space:
            stream += b"\n"
    found = [parse(value) for value in outcomes([stream]) if isinstance(value, bytes)]
    assert found == [value for value, _space, _ascii in sequence]


@given(BYTES)
def test_any_bytes_are_values_or_errors(stream: bytes) -> None:
    for found in outcomes([stream]):
        if isinstance(found, bytes):
            try:
                parsed = parse(found)
            except CommandError:
                continue
            again = json.dumps(parsed, allow_nan=False).encode()
            assert parse_whole(again) == parsed


@given(BYTES, st.sampled_from([b"\x00", b"\x01", b"\x1f", b"\xff", b"\xc0"]))
def test_a_byte_of_no_json_helps_out_of_anything(before: bytes, stray: bytes) -> None:
    command = b'{"execute":"query-version"}'
    assert outcomes([before + stray + command])[-1] == command
    too_deep = b"[" * (MAX_DEPTH + 1)
    assert outcomes([before + too_deep + stray + command])[-1] == command
