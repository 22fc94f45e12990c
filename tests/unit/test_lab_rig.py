"""What a rig refuses before anything is started."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from balloonlab.errors import UsageError
from balloonlab.rig import CONSOLE_BYTES, CONSOLE_CHARACTERS, CONSOLE_LINES, Rig, Setup
from guest_images.build import GuestImage
from qmp_glue.commandline import Machine
from qmp_glue.find import Qemu
from qmp_glue.vm import VirtualMachine


def test_a_machine_that_ends_at_a_reset_is_not_rebooted(tmp_path: Path) -> None:
    image = GuestImage("own", "6.99", Path("/vmlinux"), Path("/initrd"), pvh=True)
    rig = Rig(Setup(Qemu(("qemu",)), image, 1 << 28), tmp_path)
    with pytest.raises(UsageError, match=r"Board\(reboots=True\)"):
        asyncio.run(rig.reboot())


@pytest.fixture
def console(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


@pytest.fixture
def rig(console: Path, tmp_path: Path) -> Rig:
    """A rig that has not been started, with a console that somebody wrote."""
    image = GuestImage("own", "6.99", Path("/vmlinux"), Path("/initrd"), pvh=True)
    made = Rig(Setup(Qemu(("qemu",)), image, 1 << 28), tmp_path)
    made.vm = VirtualMachine(made.setup.qemu, Machine(memory_bytes=1 << 28, console=console))
    return made


def test_a_consoles_tail_is_its_last_lines(rig: Rig, console: Path) -> None:
    assert rig.console_tail().endswith("\n  (nothing)")
    console.write_text("".join(f"line {number}\n" for number in range(100)))
    assert rig.console_tail().splitlines()[1:] == [
        f"  line {number}" for number in range(100 - CONSOLE_LINES, 100)
    ]


def test_a_panics_first_lines_are_its_tail(rig: Rig, console: Path) -> None:
    trace = "".join(f"trace {number}\n" for number in range(100))
    console.write_text("before\n" * 100 + "[    1.0] Kernel panic - not syncing: own\n" + trace)
    assert rig.console_tail().splitlines()[1:3] == ["  Kernel panic - not syncing: own", "  trace 0"]


def test_of_a_console_without_end_the_end_is_read(
    rig: Rig, console: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console.write_bytes(b"Kernel panic, long ago\n" + b"\x1b" * 3 * CONSOLE_BYTES + b"\nlast")
    wanted: list[int | None] = []
    whole = rig.vm.console_text

    def read(most: int | None = None) -> str:
        wanted.append(most)
        return whole(most)

    monkeypatch.setattr(rig.vm, "console_text", read)
    lines = rig.console_tail().splitlines()
    assert wanted == [CONSOLE_BYTES]
    assert lines[-1] == "  last"
    assert all(len(line) <= CONSOLE_CHARACTERS + 2 for line in lines[1:])
    assert whole(10) == "\x1b" * 5 + "\nlast"
    assert whole().startswith("Kernel panic, long ago\n")
