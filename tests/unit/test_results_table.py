"""What a full run writes: a cell that did not pass, or did not run, is never one that did, nor is half a run a whole one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.results import render


def document(figures: dict[str, dict[str, Any]], failed: list[str]) -> dict[str, Any]:
    return {
        "commit": "c",
        "date": "d",
        "minutes": 1,
        "machine": "m",
        "pytest_arguments": "-m full",
        "not_run": 0,
        "outcomes": {"passed": 1, "failed": 1, "skipped": 0},
        "failed": failed,
        "skipped": {"t::c": "no such program"},
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
    assert "- failed: `t::a[y]`" in lines
    assert "- skipped: `t::c`: no such program" in lines


def test_a_run_of_which_nothing_is_given_back() -> None:
    """What moved by less than a MiB is 0, and no negative one."""
    mib = 1 << 20
    sizes = ("floor_bytes", "peak_bytes", "residual_bytes", "returned_bytes", "memfree_regained_bytes")
    figures: dict[str, dict[str, Any]] = {
        "t::a": {"kernel": "k", "discard": "none", "settle_seconds": 0.04}
        | dict.fromkeys(sizes, mib * 100)
        | {"returned_bytes": -(mib // 4)}
    }
    assert "| k | none | 100 | 100 | 100 | 0 | 100 | 0.0 s |" in render(document(figures, [])).splitlines()


@pytest.mark.parametrize(
    ("second", "passed", "not_run"),
    [("pass", 2, 0), ("raise KeyboardInterrupt", 1, 2)],
    ids=["whole", "half"],
)
def test_half_a_run_says_so(second: str, passed: int, not_run: int, tmp_path: Path) -> None:
    text = f"import pytest\ndef test_a(): pass\ndef test_b(): {second}\ndef test_c(): pytest.skip('so')\n"
    (tmp_path / "test_some.py").write_text(text)
    (tmp_path / "pytest.ini").touch()
    root = Path(__file__).parent.parent.parent
    argv = [sys.executable, "-m", "tests.results", "-q", "test_some.py"]
    ran = subprocess.run(
        argv, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, check=False
    )
    assert ran.returncode == (2 if not_run else 0), ran.stdout.decode()
    told = json.loads((tmp_path / "docs/results/full.json").read_text())
    assert (told["outcomes"]["passed"], told["not_run"]) == (passed, not_run)
    lines = (tmp_path / "docs/results/README.md").read_text().splitlines()
    assert "- `pytest -q test_some.py`" in lines
    assert ("- skipped: `test_some.py::test_c`: so" in lines) == (not not_run)
    assert ("- **interrupted: 2 tests were not run**" in lines) == bool(not_run)
