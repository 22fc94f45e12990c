"""The metrics file: when it is due, and that one that cannot be written is given up with a line."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from hostdev.metrics import Metrics
from hostdev.metrics_file import PERIOD, MetricsFile
from tests.clock import Clock


def due_of(file: MetricsFile) -> float | None:
    """A function's value changes, which of an attribute mypy does not expect."""
    return file.due


def test_it_is_due_once_something_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, metrics = Clock(), Metrics()
    monkeypatch.setattr(time, "monotonic", clock)
    file = MetricsFile(metrics, tmp_path / "metrics.prom")
    assert due_of(file) is None
    file.touch()
    due = clock.now + PERIOD
    assert due_of(file) == due
    clock.now += PERIOD / 2
    file.touch()
    assert due_of(file) == due
    file.tick()
    assert not (tmp_path / "metrics.prom").exists()
    clock.now = due
    file.tick()
    assert (due_of(file), (tmp_path / "metrics.prom").read_text()) == (None, metrics.exposition())


def test_one_that_cannot_be_written_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line; then it is never due and never tried again, though it could be written."""
    folder = tmp_path / "gone"
    file = MetricsFile(Metrics(), folder / "metrics.prom")
    for _ in range(3):
        file.touch()
        file.write()
        assert due_of(file) is None
    folder.mkdir()
    file.touch()
    assert due_of(file) is None
    file.write()
    assert list(folder.iterdir()) == []
    (line,) = caplog.messages
    assert line == f"no more metrics: {folder / 'metrics.prom'}: No such file or directory"


def test_one_that_can_no_longer_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "goes"
    folder.mkdir()
    file = MetricsFile(Metrics(), folder / "metrics.prom")
    file.write()
    assert caplog.messages == []
    shutil.rmtree(folder)
    for _ in range(2):
        file.write()
    assert len(caplog.messages) == 1


def test_none_is_never_due(caplog: pytest.LogCaptureFixture) -> None:
    file = MetricsFile(Metrics(), None)
    file.touch()
    file.write()
    assert (due_of(file), caplog.messages) == (None, [])
