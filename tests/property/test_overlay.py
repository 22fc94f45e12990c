"""Properties of the files that are put into a guest, read back by a reader of several archives.

- What the image had is still there, byte for byte and in front.
- Of a folder each file, folder and link comes to its place: contents, modes and targets as they were.
- The same contents give the same image, however they are called here; others give another.
"""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_images import cpio
from guest_images.initramfs import PAGE, write_padded
from guest_images.overlay import with_files
from tests.cpio_reader import read_all

names = st.text("abcdefgh.é ", min_size=1, max_size=6).filter(lambda name: name.strip(".") != "")
contents = st.tuples(st.sampled_from([0o644, 0o755, 0o600, 0o4755]), st.binary(max_size=5000))
folders: st.SearchStrategy[dict[str, object]] = st.recursive(
    st.dictionaries(names, contents, max_size=3),
    lambda inner: st.dictionaries(names, st.one_of(contents, names, inner), max_size=3),
    max_leaves=8,
)


def lay(folder: Path, tree: dict[str, object]) -> dict[str, tuple[int, bytes]]:
    """Make a folder; return what is in it by path: mode and content or target."""
    folder.mkdir(parents=True)
    folder.chmod(0o711)
    made = {".": (stat.S_IFDIR | 0o711, b"")}
    for name, what in tree.items():
        match what:
            case dict():
                below = lay(folder / name, what)
                made |= {name if key == "." else f"{name}/{key}": value for key, value in below.items()}
            case (int(mode), bytes(data)):
                (folder / name).write_bytes(data)
                (folder / name).chmod(mode)
                made[name] = (stat.S_IFREG | mode, data)
            case str():
                (folder / name).symlink_to(what)
                made[name] = (stat.S_IFLNK | 0o777, what.encode())
    return made


def base(folder: Path) -> Path:
    """An image such as guests have."""
    image = folder / "base.cpio"
    with image.open("wb") as output:
        write_padded(
            [cpio.file("init", b"#!/bin/sh", executable=True), cpio.file("usr/bin/a", b"old")], output
        )
    return image


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@given(folders)
def test_a_folder_comes_whole_to_its_place(tree: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        initrd = base(Path(scratch))
        made = lay(Path(scratch) / "given", tree)
        image = with_files(initrd, {"/opt/given": f"{scratch}/given"})
        data = image.read_bytes()
        assert data.startswith(initrd.read_bytes())
        assert len(data) % PAGE == 0
        found = {name: (one.mode, one.data) for name, one in read_all(data).items()}
    places = {"opt/given" if key == "." else f"opt/given/{key}": value for key, value in made.items()}
    above = dict.fromkeys(("usr", "usr/bin", "opt"), (stat.S_IFDIR | 0o755, b""))
    rest = {"init": (stat.S_IFREG | 0o755, b"#!/bin/sh"), "usr/bin/a": (stat.S_IFREG | 0o644, b"old")}
    assert found == {**places, **above, **rest}


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_an_image_is_cached_by_content(first: bytes, second: bytes) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        initrd = base(Path(scratch))
        for name, data in {"one": first, "same": first, "two": second}.items():
            (Path(scratch) / name).write_bytes(data)
        one, same, two = (
            with_files(initrd, {"/file": f"{scratch}/{name}"}) for name in ("one", "same", "two")
        )
    assert one == same
    assert (one == two) == (first == second)
