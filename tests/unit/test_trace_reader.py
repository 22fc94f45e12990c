"""Reading a trace while it is written: each record once, none half."""

from __future__ import annotations

from pathlib import Path

from balloonlab.decode import TraceReader
from hostdev.trace import TraceFile
from hostdev.wire import trace as wire


def test_a_reader_goes_on_where_it_ended(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "t")
    reader = TraceReader(tmp_path / "t")
    assert list(reader.records()) == []
    for head in range(3):
        trace.answer(4, head)
        assert [record.value for record in reader.records()] == [wire.Answer(head)]
        assert list(reader.records()) == []
    trace.close()
    assert [record.value.head for record in TraceReader(tmp_path / "t").records()] == [0, 1, 2]


def test_a_reader_that_was_left_goes_on_behind_what_it_took(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "t")
    for head in range(3):
        trace.answer(4, head)
    reader = TraceReader(tmp_path / "t")
    assert next(reader.records()).value == wire.Answer(0)
    assert [record.value.head for record in reader.records()] == [1, 2]
    trace.close()
