"""Where the control socket may be, and who may connect to it and to the device's."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hostdev.driver import DEADLINE
from hostdev.errors import EXIT_PASS, EXIT_USAGE
from tests.control_process import controlled
from tests.device_program import serves

pytestmark = pytest.mark.usefixtures("nothing_is_left")


# Where the socket may be


def refusal(tmp_path: Path, control: Path) -> str:
    command = [
        sys.executable,
        "-m",
        "hostdev.cli",
        f"--socket-path={tmp_path}/balloon.sock",
        f"--control={control}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (EXIT_USAGE, "", 1)
    assert done.stderr.startswith("vhost-user-balloon: --")
    assert str(control) in done.stderr
    return done.stderr


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_to(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    said = refusal(tmp_path, folder / "balloon.qmp")
    assert "others can write to the folder" in said
    assert "$XDG_RUNTIME_DIR/vhost-user-balloon/balloon.qmp" in said
    folder.rmdir()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path, tmp_path / "none" / "none" / "balloon.qmp")


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    """/proc is root's, and for root any folder can be made somebody else's."""
    folder = Path("/proc")
    if os.geteuid() == 0:
        folder = tmp_path / "foreign"
        folder.mkdir(0o700)
        os.chown(folder, 65534, 65534)
    assert "is not yours" in refusal(tmp_path, folder / "balloon.qmp")
    if os.geteuid() == 0:
        folder.rmdir()


def test_a_folder_that_is_a_link(tmp_path: Path) -> None:
    """Whoever made the link could have it point elsewhere later."""
    folder, link = tmp_path / "private", tmp_path / "link"
    folder.mkdir(0o700)
    link.symlink_to(folder)
    assert "is a link, name the folder itself" in refusal(tmp_path, link / "balloon.qmp")
    link.unlink()
    folder.rmdir()


def test_a_folder_of_ones_own_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    with controlled(tmp_path) as device:
        assert device.device.end()[0] == EXIT_PASS
    assert list(folder.iterdir()) == []
    folder.rmdir()


def test_a_second_program_leaves_the_first_alone(tmp_path: Path) -> None:
    with controlled(tmp_path) as device:
        assert "another program listens there" in refusal(tmp_path / "private", device.path)
        with device.client() as client:
            assert "return" in client.execute("query-version")
        assert device.device.end()[0] == EXIT_PASS


def test_one_path_for_both(tmp_path: Path) -> None:
    assert "is taken" in refusal(tmp_path, tmp_path / "balloon.sock")


# Who may connect


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_strangers_are_turned_away(tmp_path: Path) -> None:
    """Even where a careless chmod let them through: of the control socket and of the device's."""
    with controlled(tmp_path) as device:
        paths = device.path, tmp_path / "balloon.sock"
        for path in paths:
            path.chmod(0o666)
        reachable = [tmp_path, *tmp_path.parents, device.path.parent]
        modes = {folder: stat.S_IMODE(folder.stat().st_mode) for folder in reachable}
        closed = {folder: mode for folder, mode in modes.items() if mode & 0o011 != 0o011}
        for folder, mode in closed.items():
            folder.chmod(mode | 0o011)
        try:
            for path in paths:
                assert heard_by_a_stranger(path) == 0
        finally:
            for folder, mode in closed.items():
                folder.chmod(mode)
        serves(device.device.connect())
        with device.client() as client:
            assert "return" in client.execute("query-version")
        status, said = device.device.end()
    assert status == EXIT_PASS
    assert "a client of the control socket of user 65534 is turned away" in said
    assert "a front end of user 65534 is turned away" in said


def heard_by_a_stranger(path: Path) -> int:
    """Bytes that one who connects as another user gets. By a fork: that user need not reach this Python."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(DEADLINE)
                connection.connect(str(path))
                status = len(connection.recv(1))
        except OSError:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
