"""When a run has settled, how long it took, and the CSV that keeps it."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from balloonlab.timeline import (
    COLUMNS,
    NOISE_BYTES,
    QUIET_SECONDS,
    TOLERANCE_BYTES,
    Sample,
    has_settled,
    quiet_seconds,
    settle_seconds,
    write_csv,
)

MIB = 1 << 20
HELD = 100 * MIB


def samples(seconds: float, *, named: int | None = 0) -> list[Sample]:
    """A guest at rest, looked at ten times a second."""
    return [Sample(tick / 10, "floor", HELD, named_bytes=named) for tick in range(round(seconds * 10) + 1)]


def at(run: list[Sample], seconds: float, *, footprint: int = 0, named: int = 0) -> list[Sample]:
    """The same run with more held and named from that second on."""
    return [
        sample
        if sample.seconds < seconds
        else replace(
            sample,
            footprint_bytes=sample.footprint_bytes + footprint,
            named_bytes=(sample.named_bytes or 0) + named,
        )
        for sample in run
    ]


@pytest.mark.parametrize(
    ("run", "since", "settled"),
    [
        pytest.param([], 0.0, False, id="nothing was seen"),
        pytest.param(samples(QUIET_SECONDS - 1), 0.0, False, id="too early"),
        pytest.param(samples(QUIET_SECONDS), 0.0, True, id="quiet just long enough"),
        pytest.param(samples(30), 25.0, False, id="quiet for long, but not since"),
        pytest.param(samples(30), 24.0, True, id="quiet for long enough since"),
        pytest.param(at(samples(12), 8, footprint=2 * MIB), 0.0, False, id="footprint rose"),
        pytest.param(at(samples(12), 8, footprint=-2 * MIB), 0.0, False, id="footprint fell"),
        pytest.param(at(samples(12), 8, footprint=TOLERANCE_BYTES), 0.0, True, id="a guest at rest"),
        pytest.param(at(samples(12), 3, footprint=-50 * MIB), 0.0, True, id="it fell before"),
        pytest.param(at(samples(12), 8, named=NOISE_BYTES + 4096), 0.0, False, id="pages were named"),
        pytest.param(at(samples(12), 8, named=NOISE_BYTES), 0.0, True, id="noise was named"),
        pytest.param(samples(30, named=None), 0.0, False, id="nobody looked at the device"),
    ],
)
def test_has_settled(run: list[Sample], since: float, settled: bool) -> None:
    assert has_settled(run, since) is settled


@pytest.mark.parametrize(
    ("delay_ms", "seconds"),
    [(None, QUIET_SECONDS), (0, QUIET_SECONDS), (500, QUIET_SECONDS), (2000, QUIET_SECONDS), (20_000, 60.0)],
)
def test_quiet_is_three_passes_of_a_guest_that_reports_less_often(
    delay_ms: int | None, seconds: float
) -> None:
    assert quiet_seconds(delay_ms) == pytest.approx(seconds)


def test_a_rise_and_a_fall_within_the_window_are_seen() -> None:
    run = samples(12)
    run[100] = replace(run[100], footprint_bytes=HELD + 2 * MIB)
    assert not has_settled(run, 0.0)


def test_a_gap_in_the_samples_is_not_taken_for_quiet() -> None:
    """A host that stood still saw nothing; what changed meanwhile counts."""
    before, after = Sample(0.0, "floor", HELD, named_bytes=0), Sample(60.0, "floor", HELD, named_bytes=0)
    assert has_settled([before, after], 0.0)
    assert not has_settled([before, replace(after, footprint_bytes=HELD // 2)], 0.0)
    assert not has_settled([before, replace(after, named_bytes=HELD)], 0.0)


def test_samples_that_began_late_do_not_vouch_for_what_was_before() -> None:
    late = [sample for sample in samples(20) if sample.seconds > 19]
    assert not has_settled(late, 0.0)


@pytest.mark.parametrize(
    ("run", "since", "seconds"),
    [
        pytest.param([], 0.0, 0.0, id="no samples"),
        pytest.param(samples(5), 6.0, 0.0, id="none since"),
        pytest.param(samples(5), 1.0, 0.0, id="nothing moved"),
        pytest.param(at(samples(12), 5, footprint=-50 * MIB), 2.0, 2.9, id="the last that was different"),
        pytest.param(at(samples(12), 5, footprint=TOLERANCE_BYTES), 0.0, 0.0, id="within the tolerance"),
    ],
)
def test_settle_seconds(run: list[Sample], since: float, seconds: float) -> None:
    assert settle_seconds(run, since) == pytest.approx(seconds)


def test_the_csv_has_every_field_and_leaves_out_what_was_not_seen(tmp_path: Path) -> None:
    path = tmp_path / "timeline.csv"
    write_csv([Sample(0.1234, "boot", 7), Sample(1.0, "fill", 8, 9, 10, 11, 12)], path)
    assert path.read_text().splitlines() == [
        "seconds,phase,footprint_bytes,guest_memfree_bytes,named_bytes,released_bytes,reports",
        "0.123,boot,7,,,,",
        "1.000,fill,8,9,10,11,12",
    ]


def test_the_csv_of_no_samples_has_a_header(tmp_path: Path) -> None:
    path = tmp_path / "timeline.csv"
    write_csv([], path)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        assert list(reader) == []
        assert tuple(reader.fieldnames or ()) == COLUMNS
