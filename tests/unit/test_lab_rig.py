"""What a rig refuses before anything is started, and who it says was the first to end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from balloonlab.errors import DeviceError, UsageError
from balloonlab.rig import (
    CONSOLE_BYTES,
    CONSOLE_CHARACTERS,
    CONSOLE_LINES,
    END_SECONDS,
    GONE_SECONDS,
    Rig,
    Setup,
)
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


class Ends:
    """A QEMU that ends while it is waited for, and a device whose end, if it has one, is seen no sooner."""

    def __init__(self, qemu: int, device: int | None) -> None:
        self.waited: list[float] = []
        self._qemu, self._device = qemu, device
        self.vm = SimpleNamespace(
            returncode=None, wait=self._wait, last_lines=lambda: ["Aborted"], console_text=lambda _most: ""
        )
        self.device = SimpleNamespace(returncode=None, error=lambda: DeviceError("the device ended"))

    async def _wait(self, *, seconds: float) -> int:
        self.waited.append(seconds)
        self.vm.returncode, self.device.returncode = self._qemu, self._device
        return self._qemu


@pytest.mark.parametrize("is_gone", [True, False])
@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        ((-6, -9), "the device ended"),
        ((-6, 0), "QEMU ended with signal 6"),
        ((-6, None), "QEMU ended with signal 6"),
        ((0, 0), "the guest panicked or powered off"),
    ],
)
def test_a_device_that_was_killed_is_named_though_qemu_is_seen_to_end_first(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, statuses: tuple[int, int | None], said: str, is_gone: bool
) -> None:
    """A QEMU that has closed its guest's port is about to end; one whose guest says nothing may go on."""
    ends = Ends(*statuses)
    for name, value in (
        ("vm", ends.vm),
        ("device", ends.device),
        ("agent", SimpleNamespace(is_gone=is_gone)),
    ):
        monkeypatch.setattr(rig, name, value, raising=False)
    assert said in str(asyncio.run(rig.why_ended()))
    assert ends.waited == [GONE_SECONDS if is_gone else END_SECONDS]
