"""The picture of a measurement: every run is in it, each arm is named once, and runs meet where they free."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from balloonlab.measure.evidence import Evidence, read_evidence
from balloonlab.measure.scenario import Arm
from balloonlab.measure.timeline_plot import make_figure, shift, timeline_png
from tests import measured


def evidence(arm: Arm = "ours", number: int = 1) -> Evidence:
    return Evidence(measured.run(arm, number), tuple(measured.samples(arm, number)))


def test_every_run_is_drawn_and_every_arm_is_named_once(tmp_path: Path) -> None:
    report = measured.failed_report()
    read = read_evidence(report, measured.write_failed(tmp_path))
    axes = make_figure(report, read).axes[0]
    labels = [str(line.get_label()) for line in axes.lines if not str(line.get_label()).startswith("_")]
    assert labels == [
        "vhost-user-balloon",
        "no reporting",
        "not free in the first run's guest",
        "ended before its time",
    ]
    # A line at a phase's beginning has two points, and so have here the marks of the two runs that ended early.
    lengths = sorted(length for line in axes.lines if (length := np.size(line.get_xdata())) > 2)
    looked = sum(sample.guest_memfree_bytes is not None for sample in read[0].samples)
    assert lengths == sorted([*(len(of.samples) for of in read), looked])
    assert {text.get_text() for text in axes.texts} == {"boot", "floor", "fill", "return"}


def test_runs_meet_where_they_free_or_else_where_their_guests_are_up() -> None:
    first, late = evidence(number=1), evidence(number=3)
    frees = [of.run.phases[-1].begin for of in (first, late)]
    assert shift(late, first) == pytest.approx(frees[0] - frees[1]) != 0
    assert shift(first, first) == 0
    panicked = Evidence(measured.run(number=2, ending="panicked"))
    assert shift(panicked, first) == pytest.approx(first.run.phases[1].begin - panicked.run.phases[1].begin)
    never_up = Evidence(msgspec.structs.replace(panicked.run, phases=panicked.run.phases[:1]))
    assert shift(never_up, first) == 0


def test_there_is_a_picture_even_where_there_is_nothing_to_see() -> None:
    report = measured.report([measured.run()], kernel="a $x$ \x00 kernel")
    for of in (Evidence(report.runs[0]), evidence()):
        assert timeline_png(report, [of]).startswith(b"\x89PNG\r\n\x1a\n")
