"""A device whose installed version can be changed under it: copies of the package behind one link. Not a test."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hostdev.driver import DEADLINE, Buffer
from hostdev.frontend import Frontend
from hostdev.wire.balloon import Role
from tests.device_program import children, listens, wait_for
from tests.in_process import PAGE

PACKAGE = Path(__file__).parent.parent / "hostdev"

Edit = tuple[str, str, str]

# A later version: its records have a version, a field and a section that the one here does not know.
LATER: tuple[Edit, ...] = (
    ("__init__.py", '__version__ = "', '__version__ = "2.'),
    ("wire/record.py", "\nVERSION = 1\n", "\nVERSION = 2\n"),
    ("wire/record.py", "    keeps_off: int\n", "    keeps_off: int\n    novelty: int = 7\n"),
    (
        "wire/record.py",
        '        "keeps_off" / Int8ul,\n',
        '        "keeps_off" / Int8ul,\n        "novelty" / Int32ul,\n',
    ),
    ("wire/record.py", "    SAMPLES = 9\n", "    SAMPLES = 9\n    NOVELTY = 77\n"),
    (
        "snapshot.py",
        "            section(Tag.SAMPLES,",
        '            section(Tag.NOVELTY, b"new"),\n            section(Tag.SAMPLES,',
    ),
    ("wire/handover.py", "\nVERSION = 1\n", "\nVERSION = 2\n"),
)


def _patient(file: str, name: str, seconds: float) -> Edit:
    return (file, f"\n{name} = {seconds}\n", f"\n{name} = {DEADLINE}\n")


# No worker is taken for one that hangs, and no version refused, because the machine holds it up or a test has stopped it.
PATIENT: tuple[Edit, ...] = (
    _patient("post.py", "ANSWER_SECONDS", 2.0),
    _patient("post.py", "END_SECONDS", 2.0),
    _patient("worker.py", "TURN_SECONDS", 10.0),
    _patient("handover.py", "START_SECONDS", 10.0),
    _patient("handover.py", "SERVE_SECONDS", 5.0),
    _patient("takeover.py", "READY_SECONDS", 4.0),
    _patient("takeover.py", "_SEND_SECONDS", 4.0),
)
# One whose records the version here cannot read.
APART: Edit = ("wire/record.py", "\nREADABLE_BY = 1\n", "\nREADABLE_BY = 2\n")


class Versions:
    """Copies of the package, one of which is installed."""

    def __init__(self, folder: Path, *edits: Edit) -> None:
        """edits: of the version that is installed first."""
        self._folder = folder
        self.installed = folder / "installed"
        self.make("now", *edits)
        self.install("now")

    def make(self, name: str, *edits: Edit) -> None:
        """Make a version. edits: file, what stands there once, and what is to stand there."""
        shutil.copytree(PACKAGE, self._folder / name / "hostdev")
        for file, old, new in (*PATIENT, *edits):
            path = self._folder / name / "hostdev" / file
            text = path.read_text()
            assert text.count(old) == 1, (file, old)
            path.write_text(text.replace(old, new))

    def install(self, name: str) -> None:
        """Have whoever starts from now on get this version."""
        link = self._folder / "link"
        link.symlink_to(name)
        link.replace(self.installed)


class Upgradable:
    """A running device."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, versions: Versions, log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.versions = versions
        self._folder = folder
        self._log = log

    def connect(self, name: str = "vm1") -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._folder / f"{name}.sock"))
        return connection

    @property
    def said(self) -> str:
        return self._log.read_text()

    @property
    def keeper(self) -> int:
        """The process that serves: it has workers, the others wait or are being tried."""
        serving = [line for line in self.said.splitlines() if line.endswith(" serves from now on")]
        return int(serving[-1].split()[-5]) if serving else self.pid

    def settled(self) -> int:
        """How many upgrades have come to an end."""
        return self.said.count(" serves from now on") + self.said.count("the upgrade is refused")

    def ask(self, version: str | None = None) -> int:
        """Begin an upgrade. Returns how many had ended before."""
        if version is not None:
            self.versions.install(version)
        before = self.settled()
        self.process.send_signal(signal.SIGHUP)
        return before

    def upgrade(self, version: str | None = None) -> None:
        """Upgrade, and wait until that has ended one way or the other."""
        before = self.ask(version)
        wait_for(lambda: self.settled() > before, "the upgrade")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(DEADLINE)

    def processes(self) -> list[int]:
        """Every process of this device, whoever's child it is: its command line names our folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if str(self._folder).encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def worker(self) -> int:
        """The only child of the keeper."""
        (pid,) = children(self.keeper)
        return pid


@contextlib.contextmanager
def upgradable(
    folder: Path,
    *options: str,
    names: tuple[str, ...] = ("vm1",),
    pass_fds: tuple[int, ...] = (),
    edits: tuple[Edit, ...] = (),
) -> Iterator[Upgradable]:
    """Start a device that listens for front ends of these names. options: more of them. edits: of its code."""
    sockets = folder / "sockets"
    sockets.mkdir()
    versions = Versions(folder / "versions", *edits)
    where = [f"--socket-path={sockets / name}.sock" for name in names]
    command = [sys.executable, "-m", "hostdev.cli", *where, *options]
    if not names:
        command.append(f"--control={sockets / 'private' / 'qmp'}")  # or nothing of it would name the folder
    log = folder / "log"
    environment = os.environ | {"PYTHONPATH": str(versions.installed)}
    with (
        log.open("w") as said,
        subprocess.Popen(
            command, stderr=said, text=True, cwd=folder, env=environment, pass_fds=pass_fds
        ) as process,
    ):
        device = Upgradable(process, sockets, versions, log)
        try:
            wait_for(lambda: _is_up(device, sockets, names), "listening")
            yield device
        finally:
            for pid in device.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            print(device.said)


def _is_up(device: Upgradable, sockets: Path, names: tuple[str, ...]) -> bool:
    assert device.process.poll() is None, device.said
    return all(listens(sockets / f"{name}.sock") for name in names)


class Busy:
    """A front end that reports, inflates and reads config, and keeps account."""

    def __init__(self, connection: socket.socket) -> None:
        self.guest = Frontend(connection)
        self.guest.start()
        self.turns = 0

    def turn(self) -> None:
        """A report, an inflation and a look at config, each answered."""
        guest, at = self.guest, 0x800000 + self.turns % 512 * 2 * PAGE
        guest.memory.write(at, b"\xaa" * 2 * PAGE)
        inflate = guest.rings[Role.INFLATE]
        pfn = (at // PAGE + 1).to_bytes(4, "little")
        guest.memory.write(0x700000, pfn)
        report = guest.rings[Role.REPORTING].offer([Buffer(at, PAGE, writable=True)])
        page = inflate.offer([Buffer(0x700000, 4)])
        guest.read_config()
        guest.rings[Role.REPORTING].wait_used(report)
        inflate.wait_used(page)
        assert guest.memory.read(at, 2 * PAGE) == bytes(2 * PAGE)
        self.turns += 1

    def check(self) -> None:
        """Each chain was answered once."""
        for role in (Role.INFLATE, Role.REPORTING):
            ring = self.guest.rings[role]
            assert (ring.take_used(), ring.used_index) == ([], self.turns & 0xFFFF)

    def close(self) -> None:
        self.guest.close()

    def __enter__(self) -> Busy:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
