"""Run folders: what is made, what is refused, where latest points."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from balloonlab.errors import UsageError
from balloonlab.runs import environment, make_folder, sha256

NOBODY = 65534


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may write anywhere: be nobody for a moment, and come back."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_folder_is_named_by_its_time_and_latest_points_at_it(tmp_path: Path) -> None:
    base = tmp_path / "runs"
    folder = make_folder(None, base)
    assert folder.parent == base
    assert folder.is_dir()
    assert (base / "latest").readlink() == Path(folder.name)
    assert sorted(path.name for path in base.iterdir()) == sorted(["latest", folder.name])


@pytest.mark.parametrize("older", ["yesterday", "gone"])
def test_latest_is_replaced_wherever_it_points(older: str, tmp_path: Path) -> None:
    (tmp_path / "yesterday").mkdir()
    (tmp_path / "latest").symlink_to(older)
    folder = make_folder(None, tmp_path)
    assert (tmp_path / "latest").resolve() == folder
    assert (tmp_path / "yesterday").is_dir()


def test_a_folder_that_is_called_latest_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "mine").touch()
    folder = make_folder(None, tmp_path)
    assert [path.name for path in (tmp_path / "latest").iterdir()] == ["mine"]
    assert {path.name for path in tmp_path.iterdir()} == {"latest", folder.name}


def test_two_runs_in_one_second_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.strftime", lambda _format: "now")
    make_folder(None, tmp_path)
    with pytest.raises(UsageError, match="now is there already: name another with --out"):
        make_folder(None, tmp_path)


@pytest.mark.parametrize("parts", [["new"], ["several", "new", "ones"]])
def test_a_chosen_folder_is_made_and_latest_is_not_its_business(parts: list[str], tmp_path: Path) -> None:
    chosen = tmp_path.joinpath(*parts)
    assert make_folder(chosen, tmp_path) == chosen
    assert chosen.is_dir()
    assert not (tmp_path / "latest").exists()


def test_a_chosen_folder_may_be_there_and_empty(tmp_path: Path) -> None:
    assert make_folder(tmp_path) == tmp_path


def test_a_chosen_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("precious")
    with pytest.raises(UsageError, match="is not empty: nothing in it is overwritten, name another folder"):
        make_folder(tmp_path)
    assert (tmp_path / "result.json").read_text() == "precious"


@pytest.mark.parametrize(("below", "message"), [("", "is not a folder"), ("inner", "Not a directory")])
def test_a_file_in_the_way_is_refused(below: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"{message}.* name another with --out"):
        make_folder(tmp_path / "file" / below)


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_without_permission_is_refused(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=mode)
    with opened_up_to(tmp_path), ordinary_user(), pytest.raises(UsageError, match="name another"):
        make_folder(folder)
    folder.chmod(0o755)


def test_a_folder_below_one_without_permission_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    with opened_up_to(tmp_path), ordinary_user(), pytest.raises(UsageError, match="Permission denied"):
        make_folder(folder / "inner")


@contextlib.contextmanager
def opened_up_to(path: Path) -> Iterator[None]:
    """Let any user pass to this path: pytest's folders are its owner's alone."""
    changed = [
        (parent, parent.stat().st_mode) for parent in (path, *path.parents) if not parent.stat().st_mode & 1
    ]
    for parent, mode in changed:
        parent.chmod(mode | 0o011)
    try:
        yield
    finally:
        for parent, mode in changed:
            parent.chmod(mode)


def test_what_was_true_of_the_machine_can_be_written_down() -> None:
    known = msgspec.json.decode(msgspec.json.encode(environment()))
    assert {"vhost-user-balloon", "python", "construct", "qemu.qmp"} <= known["versions"].keys()
    assert known["host"]["memory_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert known["host"]["kernel"] == os.uname().release


def test_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"balloon")
    assert sha256(tmp_path / "file") == hashlib.sha256(b"balloon").hexdigest()
