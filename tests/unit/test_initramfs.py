"""What goes into an initramfs, as far as it needs no packages: directories, the kernel's command line, atomic files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from guest_images import cpio
from guest_images.__main__ import main
from guest_images.files import atomic_file, write_atomically
from guest_images.initramfs import (
    INIT,
    PAGE,
    kernel_command_line,
    source_digest,
    with_parents,
    write_padded,
)

if TYPE_CHECKING:
    from pathlib import Path


def test_each_directory_comes_once_and_before_what_lies_in_it() -> None:
    entries = with_parents([cpio.file("a/b/c", b"1"), cpio.file("a/d", b"2"), cpio.directory("a/b")])
    names = [entry.name for entry in entries]
    assert names == ["a", "a/b", "a/b/c", "a/d"]


@pytest.mark.parametrize("size", [0, 3000, 4096, 100_000])
def test_an_image_is_whole_pages_and_ends_in_zeroes(size: int) -> None:
    output = io.BytesIO()
    write_padded([cpio.file("a", b"x" * size)], output)
    archive = output.getvalue()
    end = archive.index(b"TRAILER!!!") + len(b"TRAILER!!!")
    assert len(archive) % PAGE == 0
    assert archive[end:] == bytes(len(archive) - end)


def test_the_command_line_ends_the_vm_on_a_panic_and_takes_more_words() -> None:
    words = kernel_command_line("init_on_free=1").split()
    assert {"console=ttyS0", "panic=-1", "init_on_free=1"} <= set(words)


def test_the_agent_and_init_are_part_of_the_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = source_digest()
    changed = tmp_path / "init"
    changed.write_text(INIT.read_text() + "\n")
    monkeypatch.setattr("guest_images.initramfs.INIT", changed)
    assert source_digest() != before


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "image"
    with pytest.raises(ZeroDivisionError):
        write_half(place)
    assert list(place.parent.iterdir()) == []
    write_atomically(place, b"whole")
    assert place.read_bytes() == b"whole"
    assert list(place.parent.iterdir()) == [place]


def write_half(place: Path) -> None:
    with atomic_file(place) as file:
        file.write(b"half")
        raise ZeroDivisionError


def test_the_command_line_reports_a_kernel_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "--kernel", str(tmp_path / "gone"), "--modules", str(tmp_path)]) == 2
    assert "cannot read the kernel image" in capsys.readouterr().err


def test_a_kernel_needs_its_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["build", "--kernel", str(tmp_path / "vmlinuz")])
    assert "go together" in capsys.readouterr().err
