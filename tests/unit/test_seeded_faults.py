"""The seeded faults can be put in: each changes what stands there once, and what comes of it is still a program."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hostdev
from tests.seeded.faults import FAULTS, Fault
from tests.seeded.run import ROOT

PACKAGE = Path(hostdev.__file__).parent


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_can_be_put_in(fault: Fault) -> None:
    for edit in fault.edits:
        text = (PACKAGE / edit.file).read_text()
        assert text.count(edit.old) == 1
        ast.parse(text.replace(edit.old, edit.new))
    assert all((ROOT / path).exists() for path in fault.tests)


def test_each_has_a_name_of_its_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 20
