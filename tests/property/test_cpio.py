"""Properties of the cpio writer, against an independent reader written from the format's description.

- What is written is read back: names, modes, devices and contents, in order.
- The archive ends with the trailer; every member starts at a multiple of four bytes.
- The same entries give the same bytes.
- Inode numbers are distinct, so that the kernel makes no hard links.
"""

from __future__ import annotations

import io
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_images import cpio
from guest_images.cpio import CpioError, Entry
from tests.cpio_reader import read


def archive_of(entries: list[Entry]) -> bytes:
    output = io.BytesIO()
    cpio.write(entries, output)
    return output.getvalue()


# hypothesis takes constants from the code it tests, the one forbidden name among them.
names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=30).filter(
    lambda name: name != cpio.TRAILER
)
entries = st.one_of(
    st.builds(cpio.directory, names),
    st.builds(cpio.file, names, st.binary(max_size=50), executable=st.booleans()),
    st.builds(cpio.symlink, names, names),
    st.builds(cpio.character_device, names, st.integers(0, 255), st.integers(0, 255)),
)


@given(st.lists(entries, max_size=8))
def test_what_is_written_is_read_back(given_entries: list[Entry]) -> None:
    archive = archive_of(given_entries)
    (*members, trailer), end = read(archive)
    assert end == len(archive)
    assert trailer.data == b""
    assert [(m.name, m.mode, m.device, m.data) for m in members] == [
        (e.name, e.mode, e.device, e.data) for e in given_entries
    ]
    assert len({m.ino for m in members}) == len(members)


@given(st.lists(entries, max_size=4))
def test_the_same_entries_give_the_same_bytes(given_entries: list[Entry]) -> None:
    assert archive_of(given_entries) == archive_of(list(given_entries))


def test_modes_carry_the_file_type() -> None:
    assert stat.S_ISDIR(cpio.directory("d").mode)
    assert cpio.file("f", b"", executable=True).mode == stat.S_IFREG | 0o755
    assert stat.S_ISLNK(cpio.symlink("l", "t").mode)
    assert stat.S_ISCHR(cpio.character_device("c", 5, 1).mode)


@pytest.mark.parametrize("name", ["", "/etc", "a\0b", "TRAILER!!!"])
def test_names_that_the_format_cannot_hold_are_refused(name: str) -> None:
    with pytest.raises(CpioError, match="relative path"):
        archive_of([cpio.file(name, b"")])
