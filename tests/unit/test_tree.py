"""Unpacked packages: apt is asked once a day, and again where what it said is not there any more."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from guest_images.tree import package_tree
from qmp_glue import debian


class FakeArchive:
    """An archive with one version of everything, which counts how often it is asked."""

    version = "1"
    asked = 0

    def __init__(self, suite: str, **_: object) -> None:
        self.suite = suite

    def closure(self, *names: str) -> list[tuple[str, str]]:
        FakeArchive.asked += 1
        return [(name, FakeArchive.version) for name in (*names, "libc6")]

    def download(self, packages: Iterable[tuple[str, str]]) -> list[debian.Package]:
        return []


@pytest.fixture(autouse=True)
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(debian, "Archive", FakeArchive)
    monkeypatch.setattr(FakeArchive, "asked", 0)


def test_apt_is_asked_once_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = package_tree("bookworm", ["busybox"])
    assert first.packages == (("busybox", "1"), ("libc6", "1"))
    assert package_tree("bookworm", ["busybox"]) == first
    assert FakeArchive.asked == 1
    monkeypatch.setattr(FakeArchive, "version", "2")
    [record] = (tmp_path / "vhost-user-balloon/trees").glob("*.json")
    old = time.time() - debian.FRESH_SECONDS
    os.utime(record, (old, old))
    second = package_tree("bookworm", ["busybox"])
    assert second.packages == (("busybox", "2"), ("libc6", "2"))
    assert second.root != first.root
    assert FakeArchive.asked == 2


def test_what_is_kept_of_the_same_packages_is_decided_anew() -> None:
    package_tree("bookworm", ["busybox"])
    kept = package_tree("bookworm", ["busybox"], keep=lambda name: name == "libc6")
    assert kept.packages == (("libc6", "1"),)
    assert package_tree("bookworm", ["python3"]).packages == (("libc6", "1"), ("python3", "1"))


@pytest.mark.parametrize("damage", [b"", b"{}", b'[["one"]]'])
def test_a_record_that_is_damaged_or_leads_nowhere_is_as_good_as_none(damage: bytes, tmp_path: Path) -> None:
    tree = package_tree("bookworm", ["busybox"])
    [record] = (tmp_path / "vhost-user-balloon/trees").glob("*.json")
    record.write_bytes(damage)
    assert package_tree("bookworm", ["busybox"]) == tree
    for folder in sorted(tree.root.rglob("*"), reverse=True):
        folder.unlink() if folder.is_symlink() else folder.rmdir()
    tree.root.rmdir()
    assert package_tree("bookworm", ["busybox"]) == tree
    assert tree.root.is_dir()
    assert FakeArchive.asked == 3
