"""Reads newc archives, one or several behind each other, as the kernel does; written from the format's description."""

from __future__ import annotations

from typing import NamedTuple


class Member(NamedTuple):
    """One member as its header has it."""

    name: str
    ino: int
    mode: int
    device: tuple[int, int]
    data: bytes


def read(archive: bytes, at: int = 0) -> tuple[list[Member], int]:
    """Read one archive, its trailer included; also returns where it ends."""
    members = []
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        field = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name_end = at + 110 + field[11]
        assert archive[name_end - 1] == 0
        start = (name_end + 3) // 4 * 4
        end = start + field[6]
        name = archive[at + 110 : name_end - 1].decode()
        members.append(Member(name, field[0], field[1], (field[9], field[10]), archive[start:end]))
        at = (end + 3) // 4 * 4
        if name == "TRAILER!!!":
            return members, at


def read_all(image: bytes) -> dict[str, Member]:
    """Read archives with zeroes between them; of members of the same name the last counts."""
    found: dict[str, Member] = {}
    at = 0
    while at < len(image):
        members, at = read(image, at)
        found |= {member.name: member for member in members[:-1]}
        while at < len(image) and image[at] == 0:
            at += 1
    return found
