"""What --verify reads: the releases of a trace as the device writes it, and what the host holds of a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from balloonlab.decode import read_trace
from balloonlab.measure import verify_holes
from balloonlab.measure.ranges import FILE_SHIFT, PAGE
from balloonlab.measure.verify_holes import (
    Look,
    Release,
    ReleaseLog,
    read_releases,
    take_look,
    trace_is_full,
    trace_length,
)
from hostdev.errors import SetupError
from hostdev.pages import Span
from hostdev.trace import MAX_TRACE, TraceFile
from hostdev.wire.layout import LayoutError
from hostdev.wire.trace import Cause, Kind


def write(path: Path) -> list[int]:
    """Write a trace; return how long it was after each release."""
    trace, lengths = TraceFile(path), []
    trace.guest()
    trace.ring(4, started=True, size=128, base=0)
    for number in range(3):
        trace.chain(4, 4, number, ())
        trace.release(4, Cause.REPORT, number << 22, 1 << 21, withheld=number == 1)
        lengths += [trace_length(path)] if number != 1 else []
        trace.answer(4, number)
    trace.close()
    return lengths


def test_releases_are_those_of_the_trace_and_end_where_it_was_then(tmp_path: Path) -> None:
    path = tmp_path / "device.trace"
    lengths = write(path)
    found = read_releases(path)
    assert [one.end for one in found] == lengths
    decoded = [record.value for record in read_trace(path) if record.kind is Kind.RELEASE]
    assert [one.span for one in found] == [Span(one.address, one.length) for one in decoded]
    assert trace_length(path) == path.stat().st_size


def test_a_trace_that_is_written_still_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "device.trace")
    trace.release(4, Cause.REPORT, 1 << 22, PAGE, withheld=False)
    path = tmp_path / "device.trace"
    assert trace_length(path) < path.stat().st_size
    assert [one.span for one in read_releases(path)] == [Span(1 << 22, PAGE)]
    trace.close()


@pytest.mark.parametrize("piece", [64, 100, 1 << 20])
def test_a_trace_is_read_on_where_it_was_left_in_pieces_of_any_size(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece may end within a record, and a record may be what was written since."""
    monkeypatch.setattr(verify_holes, "READ_BYTES", piece)
    path = tmp_path / "device.trace"
    trace, log, expected = TraceFile(path), ReleaseLog(path), []
    for number in range(20):
        trace.release(4, Cause.REPORT, number << 22, 1 << 21, withheld=False)
        expected.append(Release(trace_length(path), Span(number << 22, 1 << 21)))
        if number % 7 == 0:
            assert list(log.read()) == expected
        trace.answer(4, number)
    found = log.read()
    assert (len(found), list(found), found[-2:]) == (20, expected, expected[-2:])
    trace.close()


def test_what_is_no_trace_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(64))
    with pytest.raises(SetupError):
        TraceFile(tmp_path / "x")
    with pytest.raises(LayoutError):
        trace_length(tmp_path / "x")
    assert trace_length(None) == 0


def test_a_trace_that_is_full_is_read_off_the_devices_log(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    trace = TraceFile(tmp_path_factory.mktemp("trace") / "trace")
    trace.answer(4, 1)
    assert trace_is_full(caplog.text) == ""
    trace._used = MAX_TRACE
    trace.answer(4, 2)
    trace._used = 32
    trace.close()
    assert "the trace is full: it has 256 MiB" in trace_is_full("before\n" + caplog.text + "after\n")


def test_a_look_has_the_places_of_every_file(tmp_path: Path) -> None:
    write(tmp_path / "device.trace")
    files = []
    for number, data in enumerate(((0, 3), (2,))):
        descriptor = os.memfd_create("ram")
        os.ftruncate(descriptor, 8 * PAGE)
        for page in data:
            os.pwrite(descriptor, b"x", page * PAGE)
        files.append(Path(f"/proc/self/fd/{descriptor}"))
        assert number == len(files) - 1
    look = take_look("now", files, tmp_path / "device.trace")
    length = trace_length(tmp_path / "device.trace")
    places = (Span(0, PAGE), Span(3 * PAGE, PAGE), Span((1 << FILE_SHIFT) + 2 * PAGE, PAGE))
    assert look == Look("now", length, places, length)
    for file in files:
        os.close(int(file.name))
