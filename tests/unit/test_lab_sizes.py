"""Sizes as people write them: what is read, what is refused, what is shown."""

from __future__ import annotations

import pytest

from balloonlab.errors import UsageError
from balloonlab.sizes import human, parse_size

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1k", KIB),
        ("600M", 600 * MIB),
        ("600 MiB", 600 * MIB),
        ("600mb", 600 * MIB),
        (" 1.5G ", 3 * GIB // 2),
        ("2T", 2048 * GIB),
        ("9007199254740993", 9007199254740993),  # 2**53 + 1: exact, where a float is not
    ],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1M", "1.M", ".5G", "1e3", "1,5G", "1P", "0x10", "1M M", "600M\0", "٣M", "inf", "nan"]
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="write it like 600M"):
        parse_size(text)


@pytest.mark.parametrize("text", ["8388608T", "9" * 400, "9" * 5000 + "T"])
def test_more_than_any_file_can_hold_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="more than a file can hold"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (KIB, "1.0 KiB"),
        (10 * KIB, "10 KiB"),
        (600 * MIB, "600 MiB"),
        (GIB, "1.0 GiB"),
        (4096 * GIB, "4.0 TiB"),
        (4096 * 1024 * GIB, "4096 TiB"),
        (-5 * MIB, "-5.0 MiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit_that_fits(size: int, text: str) -> None:
    assert human(size) == text
