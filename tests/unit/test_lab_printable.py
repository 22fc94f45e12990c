"""Text of a guest's in a message: printable, and no longer than it may be."""

from __future__ import annotations

import pytest

from balloonlab.printable import paragraph


def test_what_is_short_stays_as_it_is() -> None:
    assert paragraph("", 100) == ""
    text = "\n".join(f"line {number}" for number in range(10))
    assert paragraph(text, 100) == text


def test_of_many_lines_the_first_and_the_last_stay() -> None:
    shown = paragraph("\n".join(f"line {number}" for number in range(1000)), 1000).splitlines()
    assert shown == [
        *(f"line {number}" for number in range(5)),
        "…",
        *(f"line {n}" for n in range(996, 1000)),
    ]


@pytest.mark.parametrize(
    "text",
    ["x" * 5000, "\x1b[31m" * 400, "\n".join(["y" * 300] * 9), "\n" * 3000, "\n".join("\x00" * 500 for _ in range(50))],
)  # fmt: skip
def test_it_is_bounded_and_printable(text: str) -> None:
    shown = paragraph(text, 1000)
    assert len(shown) <= 1000
    assert len(shown.splitlines()) <= 10
    assert all(line.isprintable() for line in shown.split("\n"))
