"""Cutting a client's bytes into values: bounds, resynchronization, and what Python's json would have let through."""

from __future__ import annotations

from typing import Any

import pytest

from hostdev.errors import CommandError
from hostdev.json_stream import MAX_DEPTH, MAX_VALUE, JsonStream, parse, parse_whole

COMMAND = b'{"execute":"query-version"}'


def values(*pieces: bytes) -> list[object]:
    stream, found = JsonStream(), list[object]()
    for piece in pieces:
        stream.feed(piece)
        while True:
            try:
                value = stream.next()
            except CommandError as error:
                found.append(str(error))
            else:
                if value is None:
                    break
                found.append(value)
    return found


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b" ", b"\t"])
@pytest.mark.parametrize("begin", [b"", b"\n", b"\r\n  "])
def test_no_newline_is_needed(begin: bytes, end: bytes) -> None:
    assert values(begin + COMMAND + end) == [COMMAND]


def test_brackets_and_quotes_within_strings() -> None:
    for value in (b'{"a":"}"}', b'{"a":"\\"}"}', b'{"a":"\\\\"}', b'["[{",{"]":"\\\\\\""}]', b'"{"'):
        assert values(value + COMMAND) == [value, COMMAND]


def test_words_end_where_something_else_begins() -> None:
    assert values(b'foo 1{}true"x"12') == [b"foo", b"1", b"{}", b"true", b'"x"']
    assert values(b"fo", b"o", b" ") == [b"foo"]


def test_a_bracket_too_many_costs_itself_alone() -> None:
    assert values(COMMAND + b"}" + COMMAND) == [COMMAND, b"}", COMMAND]


@pytest.mark.parametrize("stray", [b"\x00", b"\x01", b"\x0b", b"\xc0", b"\xff"])
@pytest.mark.parametrize("unfinished", [b"", b'{"execute":', b"[[[", b'{"a', b'{"a\\'])
def test_a_stray_byte_drops_what_is_unfinished(unfinished: bytes, stray: bytes) -> None:
    assert values(unfinished + stray + COMMAND) == [f"JSON parse error, stray byte 0x{stray.hex()}", COMMAND]


def test_a_newline_in_a_string_is_stray() -> None:
    assert values(b'{"a":"b\n' + COMMAND) == ["JSON parse error, stray byte 0x0a", COMMAND]


def test_the_longest_value() -> None:
    longest = b'"' + b"x" * (MAX_VALUE - 2) + b'"'
    assert values(longest + COMMAND) == [longest, COMMAND]
    error = f"a JSON value is longer than {MAX_VALUE} bytes"
    assert values(b'"x' + longest[1:] + COMMAND) == [error, COMMAND]
    assert values(b"[" * 3 + longest + b"]" * 3 + COMMAND) == [error, COMMAND]
    escaped_at_the_bound = longest[:-1] + b'\\"x"'
    assert values(escaped_at_the_bound + COMMAND) == [error, COMMAND]


def test_a_value_without_end_holds_no_memory() -> None:
    stream = JsonStream()
    stream.feed(b'{"a":"')
    errors = 0
    for _ in range(100):
        stream.feed(b"x" * 4096)
        try:
            assert stream.next() is None
        except CommandError:
            errors += 1
        assert len(stream._data) <= MAX_VALUE
    stream.feed(b'"}' + COMMAND)
    assert (errors, stream.next()) == (1, COMMAND)


def test_a_word_without_end_holds_no_memory() -> None:
    found = values(*[b"x" * 4096] * 40, b" ", COMMAND)
    error = f"a JSON value is longer than {MAX_VALUE} bytes"
    assert found == [error, error, b"x" * (40 * 4096 - 2 * MAX_VALUE), COMMAND]


def test_the_deepest_value() -> None:
    deepest = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert values(deepest) == [deepest]
    parse(deepest)
    for depth in (MAX_DEPTH + 1, 1100, 30000):
        error = "JSON nesting depth limit exceeded"
        assert values(b"[" * depth + b"]" * depth + COMMAND) == [error, COMMAND]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"18446744073709551615", (1 << 64) - 1),
        (b"-9223372036854775808", -(1 << 63)),
        (b"18446744073709551616", float(1 << 64)),
        (b"123456789012345678901234567890", 1.2345678901234568e29),
        (b"1.10", 1.1),
        ('"é\\u00e9\\ud83d\\ude00"'.encode(), "éé😀"),
        (b'{"a": [true, false, null]}', {"a": [True, False, None]}),
    ],
)
def test_values_are_read_as_qemu_reads_them(text: bytes, value: Any) -> None:  # noqa: ANN401
    assert parse(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"NaN", "invalid keyword 'NaN'"),
        (b"-Infinity", "invalid keyword"),
        (b"1e400", "out of range"),
        (b"9" * 5000, "out of range"),
        (b'{"a":1,"a":2}', "duplicate key"),
        (b'"\\ud800"', "not UTF-8"),
        (b'"\xc3"', "not UTF-8"),
        (b'"\x80"', "not UTF-8"),
        (b"{,}", "character 1"),
        (b"}", "expecting value"),
        (b"", "expecting value"),
        (b'{"a" 1}', "expecting ':'"),
    ],
)
def test_what_is_no_json(text: bytes, words: str) -> None:
    with pytest.raises(CommandError, match="JSON parse error, ") as caught:
        parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{} {}", b"[", b'{}"', b"[" * 60000])
def test_text_that_is_not_one_value(text: bytes) -> None:
    with pytest.raises(CommandError):
        parse_whole(text)


def test_text_that_is_one_value() -> None:
    assert [parse_whole(text) for text in (b"2", b' "x" ', b"{}", b"null\n")] == [2, "x", {}, None]
