"""Comparing the model with real guests: recordings of three kernels, and recordings that it must not agree with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from balloonlab.comparison import compare, seconds_to, sentences
from balloonlab.errors import UsageError
from balloonlab.fidelity import conclude
from balloonlab.recording import Recording, group, modelled_passes, read_recording, traced_passes
from guest_images.page_reporting import Parameters, Pass
from hostdev.trace import TraceFile
from hostdev.wire.balloon import Role
from hostdev.wire.virtqueue import Descriptor
from tests.unit.test_proc_state import KERNELS, RECORDED

MIB = 1 << 20


@pytest.fixture(params=KERNELS)
def recording(request: pytest.FixtureRequest) -> Recording:
    return read_recording(RECORDED / f"{request.param}.json")


def falls(*sizes: int, interval: float = 2.0) -> list[Pass]:
    """Passes of so many MiB each."""
    return [Pass(interval * number, 1, 1, size * MIB) for number, size in enumerate(sizes, 1)]


def recorded(*passes: Pass) -> Recording:
    return msgspec.structs.replace(read_recording(RECORDED / "6.12.json"), passes=list(passes))


def test_the_model_repeats_a_recorded_guest(recording: Recording) -> None:
    modelled = modelled_passes(recording, recording.parameters)
    comparison = compare(recording, modelled)
    assert comparison.notes == []
    assert comparison.passed
    assert len(modelled) == len(recording.passes) == 3
    # Better than it has to be: to the block.
    assert [one.bytes for one in modelled] == [one.bytes for one in recording.passes]
    assert [one.reports for one in modelled] == [one.reports for one in recording.passes]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (Parameters.v17(), "pass 1: the model reports"),
        (Parameters(share=None), "pass 1: the model reports"),
        (Parameters(capacity=16), "pass 1: the model reports 122 MiB"),
        (Parameters(order=10, delay=5.0), "50 % of the fall: 10.00 s in the model"),
    ],
)
def test_a_model_of_something_else_is_told_apart(parameters: Parameters, said: str) -> None:
    recording = read_recording(RECORDED / "6.12.json")
    comparison = compare(recording, modelled_passes(recording, parameters))
    assert not comparison.passed
    assert said in " ".join(comparison.notes)


def test_a_model_that_takes_nothing_for_reported_is_told_apart() -> None:
    recording = read_recording(RECORDED / "6.12.json")
    nothing = replace(recording.before, pagetypeinfo=recording.before.pagetypeinfo.replace("DMA32", "Normal"))
    recording = msgspec.structs.replace(recording, before=nothing)
    assert not compare(recording, modelled_passes(recording, recording.parameters)).passed


def test_a_fifth_is_tolerated_and_more_is_not() -> None:
    assert compare(recorded(*falls(200, 200)), falls(160, 240)).notes == []
    comparison = compare(recorded(*falls(200, 200)), falls(159, 241))
    assert comparison.notes == [
        "pass 1: the model reports 159 MiB, the real guest 200 MiB",
        "pass 2: the model reports 241 MiB, the real guest 200 MiB",
    ]


def test_a_late_block_or_two_are_noise_and_three_are_not() -> None:
    assert compare(recorded(*falls(200, 200, 8)), falls(200, 200)).passed
    assert not compare(recorded(*falls(200, 200, 12)), falls(200, 200)).passed
    assert not compare(recorded(*falls(200, 200)), falls(200, 200, 12)).passed


def test_one_pass_in_time_is_tolerated_and_more_is_not() -> None:
    assert compare(recorded(*falls(200, 200)), falls(200, 200, interval=3.0)).passed
    late = compare(recorded(*falls(200, 200)), falls(200, 200, interval=4.5))
    assert late.notes == [
        "50 % of the fall: 4.50 s in the model, 2.00 s in the real guest",
        "90 % of the fall: 9.00 s in the model, 4.00 s in the real guest",
    ]


def test_a_guest_that_reports_nothing_proves_nothing() -> None:
    comparison = compare(recorded(), [])
    assert comparison.notes == ["the real guest reported nothing after the free: there is nothing to compare"]
    assert not comparison.passed


def test_seconds_to_a_share() -> None:
    assert seconds_to(falls(50, 40, 10), 0.5) == 2.0
    assert seconds_to(falls(50, 40, 10), 0.9) == 4.0
    assert seconds_to([], 0.9) == 0.0


def test_reports_close_to_each_other_are_one_pass() -> None:
    reports = [(2.0, [4, 4]), (2.1, [4]), (4.2, [2]), (5.1, [2]), (6.2, [1])]
    assert group(reports, 1.0) == [Pass(2.0, 2, 3, 12), Pass(4.2, 2, 2, 4), Pass(6.2, 1, 1, 1)]
    assert group([], 1.0) == []


def test_passes_are_read_off_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports since the moment count, other rings do not."""
    clock = 100.0
    monkeypatch.setattr("hostdev.trace.time.time_ns", lambda: int(clock * 1e9))
    trace = TraceFile(tmp_path / "trace")
    for moment, role in (
        (101.0, Role.REPORTING),
        (105.0, Role.REPORTING),
        (105.2, Role.REPORTING),
        (105.3, Role.STATISTICS),
    ):
        clock = moment
        trace.chain(3, role, 0, (Descriptor(0, 2 * MIB, 2, 0), Descriptor(4 * MIB, 4 * MIB, 2, 0)))
    trace.close()
    (one,) = traced_passes(tmp_path / "trace", 103.0, 1.0)
    assert one == Pass(pytest.approx(2.0), 2, 4, 12 * MIB)  # type: ignore[arg-type]


def test_a_run_is_kept_and_can_be_compared_again(tmp_path: Path, recording: Recording) -> None:
    compared = conclude(recording, tmp_path)
    assert read_recording(tmp_path / "recording.json") == recording
    kept = msgspec.json.decode((tmp_path / "fidelity.json").read_bytes())
    assert kept["passed"] is True
    assert kept["real_bytes"] == kept["model_bytes"] == sum(one.bytes for one in recording.passes)
    assert (tmp_path / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    assert "The model was right." in sentences(compared.comparison)


@pytest.mark.parametrize("text", [None, "{", '{"schema": 1}'])
def test_other_files_are_no_recordings(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "recording.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=r"name a recording\.json of balloonlab fidelity"):
        read_recording(path)
