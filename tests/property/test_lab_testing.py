"""What the pytest plugin makes of words and of logs.

- Whatever words a marker has, they are a guest or a UsageError, never another error.
- A guest that is asked for by words has what the words say, and the defaults of a scenario else.
- A log in a report has no control character but newline and tab, its lines and printable characters are as they were,
  and it is bounded: its end is kept, and what is left out is counted.
"""

from __future__ import annotations

import contextlib
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloonlab.errors import UsageError
from balloonlab.measure.scenario import ARMS, Arm, DeviceSpec, GuestSpec
from balloonlab.testing.logs import MOST_BYTES, printable, sections, tail
from balloonlab.testing.wanted import WORDS, Wanted, wanted

VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.binary(max_size=8) | st.floats()


@given(st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=8), VALUES, max_size=5))
def test_any_words_are_a_guest_or_a_usage_error(words: dict[str, object]) -> None:
    with contextlib.suppress(UsageError):
        guest = wanted(words)
        assert set(words) <= set(WORDS)
        assert guest.arm == words.get("arm", "ours")


@given(
    mebibytes=st.integers(128, 1 << 20),
    arm=st.sampled_from(ARMS),
    kernel=st.text(string.ascii_letters + "/.-", min_size=1),
    features=st.text(string.ascii_letters + "+-,"),
)
def test_a_guest_has_what_the_words_say(mebibytes: int, arm: Arm, kernel: str, features: str) -> None:
    guest = wanted({"memory": f"{mebibytes}M", "arm": arm, "kernel": kernel, "features": features})
    assert guest == Wanted(
        GuestSpec(memory=mebibytes << 20, kernel=kernel), DeviceSpec(features=features), arm
    )


def test_no_words_are_the_guest_of_a_scenario() -> None:
    assert wanted({}) == Wanted(GuestSpec(), DeviceSpec(), "ours")


def test_a_misspelt_word_is_guessed() -> None:
    with pytest.raises(UsageError, match="did you mean command_line"):
        wanted({"comand_line": ""})


@given(st.text())
def test_logs_are_printable(text: str) -> None:
    shown = printable(text)
    assert all(character in "\n\t" or not ("\0" <= character < " ") for character in shown)
    assert not {"\x7f", "\x9b"} & set(shown)
    assert shown.count("\n") == text.count("\n")
    if text.isprintable():
        assert shown == text


@given(st.integers(0, 3 * MOST_BYTES))
def test_long_logs_lose_their_beginning(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "log"
    path.write_bytes(b"a" * size + b"the end")
    shown = tail(path)
    assert shown.endswith("the end")
    left_out = max(0, size + 7 - MOST_BYTES)
    assert shown.startswith(f"({left_out} bytes before") == bool(left_out)
    assert shown.count("a" * 64) <= MOST_BYTES // 64


def test_sections_are_of_the_logs_that_say_something(tmp_path: Path) -> None:
    (tmp_path / "console.log").write_text("Linux version\r\n\x1b[2Jgone\n")
    (tmp_path / "qemu.log").write_text("")
    assert sections(tmp_path) == [
        ("balloon: the guest's console", "Linux version\n\\x1b[2Jgone\n"),
    ]
