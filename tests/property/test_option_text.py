"""Properties of reading QEMU's option values.

1. An option list written with doubled commas is read back, whatever its values hold.
2. JSON is read as the same option written with dotted keys.
3. Any text is read without an error: as an option, as JSON, as a size.
4. A size is read as the bytes that it was written from, in each unit.
"""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from qmp_glue.device_words import escaped
from qmp_glue.machine_setup import block_drivers, setup_of
from qmp_glue.option_text import parse_option, parse_size

keys = st.text("abcdefgh-_", min_size=1, max_size=8)
# QEMU has no way to write an option list's value that holds a NUL.
value_texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)


@given(st.dictionaries(keys, value_texts, min_size=1))
def test_option_lists_are_read_back(options: dict[str, str]) -> None:
    text = "first," + ",".join(f"{key}={escaped(value)}" for key, value in options.items())
    assert parse_option(text, "driver") == {"driver": "first"} | options


nested = st.recursive(
    value_texts, lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3), max_leaves=6
)


def dotted(value: object, key: str) -> dict[str, str]:
    if isinstance(value, dict):
        return {path: leaf for name in value for path, leaf in dotted(value[name], f"{key}.{name}").items()}
    return {key[1:]: str(value)}


@given(st.dictionaries(keys, nested, min_size=1, max_size=3))
def test_json_is_the_dotted_form(options: dict[str, object]) -> None:
    assert parse_option(json.dumps(options), "driver") == dotted(options, "")


@given(st.text(), st.sampled_from(["", "{", '{"a":', "{" * 2000, '{"a":' * 3000]))
def test_any_text_is_read(text: str, before: str) -> None:
    options = parse_option(before + text, "driver")
    assert all(isinstance(value, str) for value in options.values())
    block_drivers(options)
    parse_size(text)


@given(
    st.lists(st.sampled_from(["-m", "-object", "-blockdev", "-global", "-machine"]) | st.text(), max_size=6)
)
def test_any_command_line_is_read(argv: list[str]) -> None:
    setup = setup_of(argv)
    assert setup.incoming == ""
    assert setup.balloons == 0


@given(st.integers(0, 1 << 20), st.sampled_from([("", 0), ("k", 10), ("M", 20), ("GiB", 30), ("TB", 40)]))
def test_sizes(number: int, unit: tuple[str, int]) -> None:
    assert parse_size(f"{number}{unit[0]}") == number << unit[1]
    assert parse_size(f"{number:#x}") == number
