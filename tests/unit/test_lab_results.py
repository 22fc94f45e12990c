"""The verdict on a run, the words for it, and the file that keeps it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from balloonlab.results import SCHEMA, DeviceResult, GuestResult, QemuResult, Result, sentences, write_json
from balloonlab.verdict import RETURNED_SHARE, STAYED_SHARE, judge

MIB = 1 << 20
PEAK = 700 * MIB
REGAINED = 600 * MIB


def result(
    *,
    discard: str = "auto",
    back: int = REGAINED,
    regained: int = REGAINED,
    features: tuple[str, ...] = ("REPORTING", "VERSION_1"),
    small: int = 0,
) -> Result:
    frees = discard in ("auto", "remove")
    method = {"auto": "remove", "none": ""}.get(discard, discard)
    return Result(
        schema=SCHEMA,
        passed=True,
        notes=[],
        floor_bytes=100 * MIB,
        peak_bytes=PEAK,
        residual_bytes=PEAK - back,
        returned_bytes=back,
        settle_seconds=6.2,
        filled_bytes=REGAINED,
        fill_kind="anonymous",
        device=DeviceResult(
            discard=discard,
            released_bytes=REGAINED if method else 0,
            withheld_bytes=0 if method else REGAINED,
            released_bytes_by_method={method: REGAINED} if method else {},
            reports=13 if frees else 12,
            buffers=400,
            cpu_seconds=0.1,
            cpu_share=0.006,
            proportional_bytes=20 * MIB,
            negotiated_features=list(features),
        ),
        guest=GuestResult(
            suite="trixie",
            kernel="6.12.1",
            memory_bytes=1024 * MIB,
            memfree_regained_bytes=regained,
            small_blocks_bytes=small,
        ),
        qemu=QemuResult(version="11.1.3", accelerator="tcg", anonymous_bytes=50 * MIB),
    )


@pytest.mark.parametrize("discard", ["auto", "remove"])
def test_a_device_that_frees_passes_from_its_share_on(discard: str) -> None:
    least = round(REGAINED * RETURNED_SHARE)
    assert judge(result(discard=discard)) == []
    assert judge(result(discard=discard, back=least)) == []
    assert judge(result(discard=discard, back=least - MIB)) == [
        "only 569 MiB came back, at least 570 MiB should have"
    ]


def test_what_the_guest_does_not_report_is_not_asked_of_the_device() -> None:
    """Free memory in small blocks cannot come back; less of it than before is no excuse and no demand."""
    least = round((REGAINED - 100 * MIB) * RETURNED_SHARE)
    assert judge(result(back=least, small=100 * MIB)) == []
    assert len(judge(result(back=least - MIB, small=100 * MIB))) == 1
    assert len(judge(result(back=least, small=0))) == 1
    assert judge(result(back=round(REGAINED * RETURNED_SHARE), small=-100 * MIB)) == []


def test_a_guest_that_regained_nothing_showed_nothing() -> None:
    """Nothing of nothing is no success."""
    for regained in (0, -MIB):
        assert len(judge(result(back=0, regained=regained))) == 1


@pytest.mark.parametrize("features", [(), ("STATS_VQ", "VERSION_1")])
def test_a_guest_that_does_not_report_is_told_apart(features: tuple[str, ...]) -> None:
    (note,) = judge(result(back=0, features=features))
    assert note.startswith("the guest does not report free pages, so nothing comes back")
    assert f"accepted {', '.join(features) or 'nothing'}." in note


@pytest.mark.parametrize("discard", ["dontneed", "none"])
def test_a_control_passes_while_the_footprint_stays(discard: str) -> None:
    most = round(PEAK * STAYED_SHARE)
    assert judge(result(discard=discard, back=0)) == []
    assert judge(result(discard=discard, back=most)) == []
    assert judge(result(discard=discard, back=-most)) == []
    for moved in (most + MIB, -most - MIB):
        assert judge(result(discard=discard, back=moved)) == [
            f"36 MiB left the footprint although --discard {discard} frees nothing"
        ]


def test_a_run_in_words() -> None:
    assert sentences(result(back=597 * MIB)) == [
        ("guest", "Linux 6.12.1 (trixie), 1.0 GiB"),
        ("host holds", "floor 100 MiB, peak 700 MiB, at the end 103 MiB"),
        ("freed", "600 MiB freed in the guest; 597 MiB back on the host after 6.2 s"),
        ("share", "99.5 % of the 600 MiB that the guest's MemFree regained"),
        ("device", "released 600 MiB in 13 reports, 0.6 % of a core (--discard auto)"),
    ]


def test_dontneed_is_not_called_a_release() -> None:
    device = dict(sentences(result(discard="dontneed", back=0)))["device"]
    assert device.startswith("advised, without freeing, 600 MiB in 12 reports")


def test_a_guest_that_regained_nothing_has_a_share_of_nothing() -> None:
    assert dict(sentences(result(back=0, regained=0)))["share"].startswith("0.0 % of the 0 bytes")


def test_notes_are_part_of_the_words() -> None:
    noted = msgspec.structs.replace(result(), notes=["one", "two"])
    assert sentences(noted)[-2:] == [("note", "one"), ("note", "two")]


def test_a_result_is_read_back_with_its_controls(tmp_path: Path) -> None:
    joint = msgspec.structs.replace(result(), controls={"none": result(discard="none", back=0)})
    path = tmp_path / "result.json"
    path.write_text("an older one")
    write_json(joint, path)
    assert msgspec.json.decode(path.read_bytes(), type=Result) == joint
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_result_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("an older one")
    with pytest.raises(TypeError):
        write_json({"value": object()}, path)
    assert path.read_text() == "an older one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
