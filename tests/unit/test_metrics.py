"""Counters, their text form, and the file that is replaced whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hostdev.metrics import FAMILIES, GAUGES, PREFIX, Metrics, worth_logging


def test_counters_add_up() -> None:
    metrics = Metrics()
    assert metrics.add("released_bytes_total", 10, "report", "remove") == 10
    assert metrics.add("released_bytes_total", 5, "report", "remove") == 15
    metrics.add("released_bytes_total", 1, "inflate", "remove")
    assert metrics.value("released_bytes_total", "report", "remove") == 15
    assert metrics.value("released_bytes_total", "report") == 15
    assert metrics.value("released_bytes_total") == 16
    assert metrics.value("released_bytes_total", "deflate") == 0


def test_undeclared_samples_are_refused() -> None:
    with pytest.raises(KeyError):
        Metrics().add("no_such_total")
    with pytest.raises(ValueError, match="labels"):
        Metrics().add("released_bytes_total", 1, "report")


def test_exposition_is_prometheus_text() -> None:
    metrics = Metrics()
    metrics.add("released_bytes_total", 4096, "report", "remove")
    metrics.add("deflated_pages_total", 3)
    metrics.gauges["inert"] = 1
    text = metrics.exposition()
    assert f'{PREFIX}_released_bytes_total{{cause="report",method="remove"}} 4096\n' in text
    assert f"{PREFIX}_deflated_pages_total 3\n" in text
    assert f"{PREFIX}_inert 1\n" in text
    sample = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+]+|# (HELP|TYPE) [a-z_]+ .+')
    assert all(sample.fullmatch(line) for line in text.splitlines())
    for name in (*FAMILIES, *GAUGES):
        assert text.count(f"# TYPE {PREFIX}_{name} ") == 1


def test_the_file_is_replaced_whole(tmp_path: Path) -> None:
    metrics, path = Metrics(), tmp_path / "metrics.prom"
    path.write_text("old")
    metrics.write(path)
    assert path.read_text() == metrics.exposition()
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.prom"]


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.prom"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        Metrics().write(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.prom"]


def test_log_lines_grow_with_the_logarithm() -> None:
    assert [count for count in range(1, 1001) if worth_logging(count)] == [2**n for n in range(10)]


def test_what_a_killed_worker_left_half_written_is_taken_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.prom"
    Metrics().write(path)
    (tmp_path / ".metrics.prom.new").write_text("half")
    Metrics().write(path)
    assert path.read_text().startswith("# HELP")
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.prom"]
