"""The table of features that a full run writes: a cell that did not pass, or did not run, is never one that did."""

from __future__ import annotations

from typing import Any

from tests.results import render


def document(figures: dict[str, dict[str, Any]], not_passed: list[str]) -> dict[str, Any]:
    return {
        "commit": "c",
        "date": "d",
        "minutes": 1,
        "machine": "m",
        "outcomes": {"passed": 1, "failed": 1, "skipped": 0},
        "not_passed": not_passed,
        "figures": figures,
    }


def test_cells() -> None:
    figures: dict[str, dict[str, Any]] = {
        "t::a[x]": {"feature": "inflate", "suite": "x", "seen": "1 s"},
        "t::a[y]": {"feature": "inflate", "suite": "y", "seen": "2 s"},
        "t::b[y]": {"feature": "reset", "suite": "y", "seen": "kept", "more": 5},
    }
    lines = render(document(figures, ["t::a[y]"])).splitlines()
    assert "| feature | x | y |" in lines
    assert "| inflate | 1 s | **failed** |" in lines
    assert "| reset | not run | kept |" in lines
    assert "| b[y] | more | 5 |" in lines
    assert not any("| feature | inflate" in line for line in lines)
