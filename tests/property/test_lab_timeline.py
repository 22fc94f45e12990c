"""Properties of what is read off a run.

1. Nothing has settled before QUIET_SECONDS have gone by since the moment asked about.
2. A run that stays as it is settles, QUIET_SECONDS after that moment and ever after.
3. What has settled has a footprint that moved by TOLERANCE_BYTES at most in the last QUIET_SECONDS.
4. settle_seconds() lies between 0 and the run's length; after it the footprint is within TOLERANCE_BYTES of its last.
5. A run read back from its CSV is the run, seconds rounded to a millisecond, by our reader as by the standard one.
6. Whatever a file holds, our reader returns samples or raises ValueError.
"""

from __future__ import annotations

import contextlib
import csv
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloonlab.timeline import (
    COLUMNS,
    QUIET_SECONDS,
    TOLERANCE_BYTES,
    Sample,
    has_settled,
    read_csv,
    settle_seconds,
    write_csv,
)

BYTES = st.integers(0, 1 << 40)
NEAR = st.integers(0, 3 * TOLERANCE_BYTES)
SINCE = st.floats(0, 40)


@st.composite
def runs(draw: st.DrawFn) -> list[Sample]:
    """Samples in order of time; the device's counter only grows, and is not always looked at."""
    times = sorted(draw(st.lists(st.floats(0, 60), min_size=1, max_size=60)))
    named = 0
    run = []
    for seconds in times:
        named += draw(st.sampled_from([0, 0, 1 << 20, 16 << 20]))
        looked = draw(st.booleans())
        run.append(Sample(seconds, "floor", draw(NEAR), named_bytes=named if looked else None))
    return run


@given(runs(), SINCE)
def test_nothing_settles_too_early(run: list[Sample], since: float) -> None:
    if has_settled(run, since):
        assert run[-1].seconds - since >= QUIET_SECONDS


@given(BYTES, BYTES, st.integers(0, 300), st.integers(1, 300))
def test_a_run_at_rest_settles_after_the_quiet_and_not_before(
    footprint: int, named: int, since: int, length: int
) -> None:
    """Ticks are of an eighth of a second, which floats add exactly."""
    run = [Sample(tick / 8, "floor", footprint, named_bytes=named) for tick in range(since + length + 1)]
    assert has_settled(run, since / 8) == (length / 8 >= QUIET_SECONDS)


@given(runs(), SINCE)
def test_what_has_settled_did_not_move(run: list[Sample], since: float) -> None:
    if has_settled(run, since):
        start = run[-1].seconds - QUIET_SECONDS
        seen = [sample.footprint_bytes for sample in run if sample.seconds >= start]
        assert max(seen) - min(seen) <= TOLERANCE_BYTES


@given(runs(), SINCE)
def test_after_settling_the_footprint_stays(run: list[Sample], since: float) -> None:
    seconds = settle_seconds(run, since)
    assert 0 <= seconds <= max(0.0, run[-1].seconds - since)
    after = [sample.footprint_bytes for sample in run if sample.seconds - since > seconds]
    assert all(abs(footprint - run[-1].footprint_bytes) <= TOLERANCE_BYTES for footprint in after)


WHOLE = st.builds(
    Sample,
    st.integers(0, 10**6).map(lambda milliseconds: milliseconds / 1000),
    st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
    BYTES,
    *[st.one_of(st.none(), BYTES)] * 4,
)


@given(st.lists(WHOLE))
def test_the_csv_holds_the_run(tmp_path: Path, run: list[Sample]) -> None:
    path = tmp_path / "timeline.csv"
    write_csv(run, path)
    with path.open(newline="") as file:
        assert [read(row) for row in csv.DictReader(file)] == run
    assert read_csv(path) == run


def read(row: dict[str, str]) -> Sample:
    numbers = [int(row[field.name]) if row[field.name] else None for field in fields(Sample)[3:]]
    return Sample(float(row["seconds"]), row["phase"], int(row["footprint_bytes"]), *numbers)


HEAD = ",".join(COLUMNS).encode() + b"\n"


@given(st.binary(), st.booleans())
def test_what_is_no_timeline_is_said_to_be_none(tmp_path: Path, content: bytes, begun: bool) -> None:
    path = tmp_path / "timeline.csv"
    path.write_bytes(HEAD * begun + content)
    with contextlib.suppress(ValueError):
        assert all(isinstance(sample, Sample) for sample in read_csv(path))


def test_a_cut_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "timeline.csv"
    path.write_bytes(HEAD + b"0.1,boot,4096,,,,\n0.2,bo")
    with pytest.raises(ValueError, match=r"timeline\.csv, line 3: a row of 2 columns is none of a timeline"):
        read_csv(path)
