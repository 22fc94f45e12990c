"""What a run leaves behind: result.json and meta.json, as declared values with exact bytes.

schema counts up when a field changes its meaning or goes; new fields alone do not change it. Used by demo.py, and by
whoever reads a run folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from balloonlab.sizes import human

SCHEMA = 1


class DeviceResult(msgspec.Struct, frozen=True, kw_only=True):
    """The device. released_bytes: handed to the host by the discard method; cpu_seconds: from the fill to the end."""

    discard: str
    released_bytes: int
    withheld_bytes: int
    released_bytes_by_method: dict[str, int]
    reports: int
    buffers: int
    cpu_seconds: float
    cpu_share: float
    proportional_bytes: int
    negotiated_features: list[str]


class GuestResult(msgspec.Struct, frozen=True, kw_only=True):
    """The guest. memfree_regained_bytes: its MemFree at the end less its MemFree just before the free.

    small_blocks_bytes: how much of that is in blocks under the order that the guest reports, 2 MiB on x86.
    """

    suite: str
    kernel: str
    memory_bytes: int
    memfree_regained_bytes: int
    small_blocks_bytes: int


class QemuResult(msgspec.Struct, frozen=True, kw_only=True):
    """QEMU. anonymous_bytes: its RssAnon, what it holds beside guest RAM."""

    version: str
    accelerator: str
    anonymous_bytes: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run. All _bytes of the top level are of the RAM file: st_blocks * 512.

    floor_bytes: settled after boot. peak_bytes: the most between fill and free. residual_bytes: settled after the free,
    and what stat on the RAM file says at the end. returned_bytes: peak less residual. settle_seconds: from the free until
    the footprint stayed where it ended. passed: what the run was to show, it showed; notes say what did not go as usual.
    """

    schema: int
    passed: bool
    notes: list[str]
    floor_bytes: int
    peak_bytes: int
    residual_bytes: int
    returned_bytes: int
    settle_seconds: float
    filled_bytes: int
    fill_kind: str
    device: DeviceResult
    guest: GuestResult
    qemu: QemuResult
    controls: dict[str, Result] = {}


def sentences(result: Result) -> list[tuple[str, str]]:
    """Return a run in words, as rows of a label and a text."""
    device, guest = result.device, result.guest
    share = result.returned_bytes / guest.memfree_regained_bytes if guest.memfree_regained_bytes > 0 else 0.0
    footprint = ", ".join(
        f"{name} {human(size)}"
        for name, size in (
            ("floor", result.floor_bytes),
            ("peak", result.peak_bytes),
            ("at the end", result.residual_bytes),
        )
    )
    freed = (
        f"{human(result.filled_bytes)} freed in the guest; {human(result.returned_bytes)} back on the host"
    )
    regained = f"the {human(guest.memfree_regained_bytes)} that the guest's MemFree regained"
    if guest.small_blocks_bytes > 0:
        regained += f", {human(guest.small_blocks_bytes)} of it in blocks too small to be reported"
    released = f"{_verb(device)} {human(device.released_bytes)} in {device.reports} reports"
    return [
        ("guest", f"Linux {guest.kernel} ({guest.suite}), {human(guest.memory_bytes)}"),
        ("host holds", footprint),
        ("freed", f"{freed} after {result.settle_seconds:.1f} s"),
        ("share", f"{share * 100:.1f} % of {regained}"),
        ("device", f"{released}, {device.cpu_share * 100:.1f} % of a core (--discard {device.discard})"),
        *[("note", note) for note in result.notes],
    ]


def _verb(device: DeviceResult) -> str:
    if device.released_bytes_by_method.get("dontneed"):
        return "advised, without freeing,"
    return "released"


def write_json(value: Any, path: Path) -> None:  # noqa: ANN401  (any msgspec value)
    """Write a value as indented JSON; a reader sees all of it or nothing."""
    write_whole(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n", path)


def write_whole(content: bytes, path: Path) -> None:
    """Write a file of which a reader sees all or nothing, or what was there before."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
