"""The catalogue has forty-six cases: each has a test that is named after it, wherever in tests/ that is."""

from __future__ import annotations

import re
from pathlib import Path

CASES = 46
_NAMED = re.compile(r"^def test_case_(\d\d)_\w+\(", re.MULTILINE)


def test_every_case_has_a_test() -> None:
    tests = Path(__file__).parent.parent
    found = {int(number) for path in tests.rglob("test_*.py") for number in _NAMED.findall(path.read_text())}
    assert found == set(range(1, CASES + 1))
