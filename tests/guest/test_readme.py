"""README.md by hand: its terminals are run as they are written, and show what it says they show.

But for the folder of the sockets: what stands in /tmp may be somebody's, or left over.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.processes import Process, Program, family, started, wait_until

pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
WRITTEN = Path("/tmp")
# What a person's shell has; the virtual environment is not activated.
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "VIRTUAL_ENV": ""}
MIB = 1 << 20
GUEST_BYTES = 1 << 30


def block(number: int, folder: Path = WRITTEN) -> str:
    """Return the commands for one terminal, with their sockets in a folder."""
    pattern = rf"^<!-- terminal {number} -->\n+```sh\n(.*?)^```$"
    (found,) = re.findall(pattern, README.read_text(), re.MULTILINE | re.DOTALL)
    return str(found).replace(f"{WRITTEN}/", f"{folder}/")


def typed() -> str:
    """Return the line that README.md has one type into the guest."""
    (found,) = re.findall(r"`(dd if=/dev/zero [^`]*)`", README.read_text())
    return str(found)


def socket_path(folder: Path = WRITTEN) -> Path:
    (found,) = set(re.findall(r"--socket-path=(\S+)", block(1, folder)))
    return Path(found)


def qemu_of(terminal: Program) -> Process | None:
    running = [process for process in family(terminal.pid) if "-object" in process.argv]
    return running[0] if running else None


def held(qemu: Process) -> int:
    """Bytes that the host holds of the guest's RAM: what stat says of the file, whichever descriptor it is."""
    for path in Path(f"/proc/{qemu.pid}/fd").iterdir():
        try:
            if path.readlink().name.startswith("memfd:memory-backend") and path.stat().st_size == GUEST_BYTES:
                return path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return 0


def shown(device: Program) -> list[int]:
    """Bytes that the host held of the guest after each chain that the device returned, by its log."""
    lines = re.findall(r"given back so far, the host holds (\d+) MiB of this guest", device.errors())
    return [int(size) * MIB for size in lines]


def test_the_blocks_name_the_same_sockets() -> None:
    assert f"path={socket_path()}," in block(2) or f"path={socket_path()} " in block(2)
    (control,) = re.findall(r"--control=(\S+)", block(1))
    assert set(re.findall(r"--control (\S+)", block(3))) == {control}


def test_the_parts_that_the_lab_names_are_there_and_run() -> None:
    """What terminal 2 evaluates, in the plainest of shells."""
    commands = 'eval "$(balloonlab env)"; set -eu; $QEMU -version; head -c 1 "$KERNEL" "$INITRD" >/dev/null'
    ran = subprocess.run(
        ["sh", "-c", commands.replace("balloonlab", f"{sys.executable} -m balloonlab.cli")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("QEMU emulator version ")


def test_doctor_gives_programs_a_command_that_runs() -> None:
    asked = [sys.executable, "-m", "balloonlab.cli", "doctor", "--json"]
    told = subprocess.run(asked, cwd=ROOT, capture_output=True, timeout=120, check=True).stdout
    qemu = json.loads(told)["qemu"]
    ran = subprocess.run(
        [*qemu["argv"], "-version"],
        env=os.environ | qemu["env"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert f"version {qemu['version']} " in ran.stdout


def test_the_terminals_show_memory_coming_back(tmp_path: Path, unmet: Callable[[str], None]) -> None:
    if not (ROOT / ".venv/bin/vhost-user-balloon").exists():
        unmet("the project is not installed in .venv: run scripts/demo or scripts/test once")
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    with (
        started(["bash", "-c", block(1, sockets)], tmp_path, env=ENVIRONMENT, cwd=ROOT) as device,
        started(
            ["bash", "-c", block(2, sockets)], tmp_path, env=ENVIRONMENT, cwd=ROOT, stdin=subprocess.PIPE
        ) as terminal,
    ):
        keeper = next(process for process in family(device.pid) if process.argv)
        walk(device, terminal, block(3, sockets))
        # The guest is gone, the device goes on to serve the next one until it is told to end.
        assert keeper.alive
        assert socket_path(sockets).is_socket()
        left = family(device.pid)
        device.send(signal.SIGTERM)
        wait_until(lambda: not any(process.alive for process in left), "the device's end")
        assert list(sockets.iterdir()) == []


def walk(device: Program, terminal: Program, third: str) -> None:
    """Type what README.md says and look at what the host holds: down, up, down again. third: what a third terminal does."""
    wait_until(lambda: "connected" in device.errors(), "a connection in the device's log")
    wait_until(lambda: re.search(r"accepted: .*\bREPORTING\b", device.errors()), "REPORTING in the log")
    terminal.wait_for("here is a shell")
    qemu = qemu_of(terminal)
    assert qemu is not None
    reports = len(shown(device))
    floor = held(qemu)
    assert 0 < floor < GUEST_BYTES // 2
    enter(terminal, typed())
    # It may be there for a moment only: as the first terminal shows it after the first report, of 128 MiB at the most.
    wait_until(
        lambda: any(size > floor + 400 * MIB for size in shown(device)[reports:]),
        "memory in use in the guest",
    )
    wait_until(lambda: held(qemu) < floor + 150 * MIB, "memory back on the host")
    assert_sized(qemu, third)
    enter(terminal, "exit")
    assert terminal.wait() == 0
    assert not qemu.alive


def assert_sized(qemu: Process, commands: str) -> None:
    """The third terminal: the guest makes do with less, says how it is, and gets everything back."""
    ran = subprocess.run(
        ["bash", "-ec", commands],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    first, *statistics, last = ran.stdout.splitlines()
    assert first.startswith("the guest has 512 MiB after ")
    assert any(line.startswith("free-memory") for line in statistics)
    assert last.startswith("the guest has 1.0 GiB after ")
    assert held(qemu) < GUEST_BYTES // 2


def enter(terminal: Program, line: str) -> None:
    assert terminal.popen.stdin is not None
    terminal.popen.stdin.write(line.encode() + b"\n")
    terminal.popen.stdin.flush()
