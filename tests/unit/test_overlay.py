"""Where files of one's own come to lie in a guest, and what cannot be put there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from guest_images.errors import GuestFileError
from guest_images.overlay import digests, members


def names(files: dict[str, str]) -> list[str]:
    return [entry.name for entry in members(files)]


def test_a_merged_usr_stays_one(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("")
    (tmp_path / "root/lib/x").mkdir(parents=True)
    (tmp_path / "root/bin").symlink_to("usr/bin")
    places = ["/bin/tool", "/sbin/tool", "/lib64/tool", "/usr/bin/tool", "//opt/./tool"]
    found = [names({place: str(tmp_path / "tool")}) for place in places]
    assert found == [["usr/bin/tool"], ["usr/bin/tool"], ["usr/lib64/tool"], ["usr/bin/tool"], ["opt/tool"]]
    (tmp_path / "root/.profile").write_text("")
    (tmp_path / "root/proc").mkdir()
    assert names({"/": str(tmp_path / "root")}) == [".profile", "usr/lib", "usr/lib/x", "proc"]


def test_a_file_may_be_named_through_a_link_and_links_in_a_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("text")
    (tmp_path / "folder/link").symlink_to("file")
    (tmp_path / "folder/away").symlink_to("/nowhere")
    [entry] = members({"/a": str(tmp_path / "folder/link")})
    assert entry.data == b"text"
    found = {entry.name: entry.data for entry in members({"/b": str(tmp_path / "folder")})}
    assert found == {"b": b"", "b/file": b"text", "b/link": b"file", "b/away": b"/nowhere"}


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("relative", "no place in a guest: give an absolute path"),
        ("/opt/../init", r"absolute path without '\.\.'"),
        ("/init", "/init is the guest's own"),
        ("/lib/agent.pyc", "/lib/agent.pyc is the guest's own"),
        ("/", "/ is the guest's own"),
        ("/proc/x", "/proc/x would not be seen"),
        ("/mnt/x", "/mnt/x would not be seen"),
        ("/bin", "cannot be /bin, a folder of the guest"),
        ("/mnt", "cannot be /mnt, a folder of the guest"),
        ("/usr", "cannot be /usr, a folder of the guest"),
    ],
)
def test_places_that_are_the_guests_own(inside: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GuestFileError, match=message):
        names({inside: str(tmp_path / "file")})


def test_what_lies_in_a_folder_is_checked_as_well(tmp_path: Path) -> None:
    (tmp_path / "root/usr/lib").mkdir(parents=True)
    (tmp_path / "root/usr/lib/agent.pyc").write_text("")
    with pytest.raises(GuestFileError, match=r"/usr/lib/agent\.pyc is the guest's own"):
        names({"/": str(tmp_path / "root")})


def test_what_cannot_be_taken_is_named(tmp_path: Path) -> None:
    with pytest.raises(GuestFileError, match=r"cannot read .*gone .*No such file.*: name files"):
        names({"/gone": str(tmp_path / "gone")})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GuestFileError, match="pipe is neither a file nor a folder"):
        names({"/folder": str(tmp_path)})
    (tmp_path / "pipe").unlink()
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff")).write_text("")
    with pytest.raises(GuestFileError, match=r"udcff' is not UTF-8: rename"):
        names({"/folder": str(tmp_path)})


def test_a_file_that_no_archive_holds_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(GuestFileError, match="4 GiB and more"):
        names({"/large": str(tmp_path / "large")})


def test_a_digest_follows_the_contents_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("text")
    files = {"/b": str(tmp_path / "folder"), "/a": str(tmp_path / "folder/file")}
    found = digests(files)
    assert list(found) == ["/b", "/a"]
    os.utime(tmp_path / "folder/file", (0, 0))
    assert digests({"/b": str(tmp_path / "other"), "/a": str(tmp_path / "other/file")}) == found
    (tmp_path / "folder/file").write_text("test")
    assert all(digests(files)[place] != found[place] for place in found)
    (tmp_path / "folder/file").write_text("text")
    assert digests(files) == found
    (tmp_path / "folder/file").chmod(0o700)
    assert all(digests(files)[place] != found[place] for place in found)
