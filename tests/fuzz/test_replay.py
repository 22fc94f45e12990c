"""Every input that the repository keeps, given to its target again by plain Python: what was found once stays mended."""

from __future__ import annotations

import pytest

from tests.fuzz import campaign, targets

pytestmark = pytest.mark.usefixtures("nothing_is_left_of_others")


@pytest.mark.parametrize("name", targets.NAMES)
def test_replay(name: str) -> None:
    check = targets.load(name)
    files = campaign.inputs(name)
    assert files, "the repository keeps no input of this target: scripts/fuzz TARGET --keep"
    with targets.silence():
        for file in files:
            try:
                check(file.read_bytes())
            except Exception as error:  # which of many inputs it is must be said
                raise AssertionError(f"scripts/fuzz {name} --replay {file}") from error


@pytest.mark.parametrize("name", targets.NAMES)
def test_the_empty_input(name: str) -> None:
    with targets.silence():
        targets.load(name)(b"")
