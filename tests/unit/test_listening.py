"""Where front ends come from: what is made at a path, what is in the way there, and what can be inherited."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from hostdev.errors import SetupError
from hostdev.listening import ListeningPath, inherited, is_listening


def unix() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def test_a_socket_that_only_its_owner_may_use(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with ListeningPath(str(path)) as listener, unix() as client:
        assert is_listening(listener)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        client.connect(str(path))
        assert not is_listening(client)
    assert not path.exists()
    assert listener.fileno() == -1


def test_the_path_is_removed_only_if_it_is_still_ours(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with ListeningPath(str(path)):
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"
    path.unlink()
    with ListeningPath(str(path)):
        path.unlink()
    assert not path.exists()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with unix() as stale:
        stale.bind(str(path))
    with ListeningPath(str(path)), unix() as client:
        client.connect(str(path))


def test_a_stale_socket_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "socket"
    with unix() as stale:
        stale.bind(str(path))
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(SetupError, match="stale socket is there and cannot be removed: Permission denied"):
        ListeningPath(str(path)).__enter__()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_socket_that_somebody_holds(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        with pytest.raises(SetupError, match="another program listens"):
            ListeningPath(str(path)).__enter__()
        assert path.exists()


def test_the_program_that_holds_it_notices_nothing(tmp_path: Path) -> None:
    """It may be waiting for its only front end: that must not be us, asking."""
    path = tmp_path / "socket"
    with ListeningPath(str(path)) as listener:
        with pytest.raises(SetupError):
            ListeningPath(str(path)).__enter__()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_something_else_at_the_path(tmp_path: Path, what: str) -> None:
    path = tmp_path / "taken"
    if what == "file":
        path.write_text("precious")
    else:
        path.mkdir()
    with pytest.raises(SetupError, match="not a socket"):
        ListeningPath(str(path)).__enter__()
    assert path.exists()


def test_paths_are_as_long_as_the_kernel_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ListeningPath("x" * 107):
        assert (tmp_path / ("x" * 107)).is_socket()
    with pytest.raises(SetupError, match=r"108 bytes long.*at most 107.*shorter"):
        ListeningPath("x" * 108).__enter__()
    with pytest.raises(SetupError, match="108 bytes"):
        ListeningPath("\u00e4" * 54).__enter__()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="does not exist"):
        ListeningPath(str(tmp_path / "none" / "socket")).__enter__()


def test_the_umask_is_put_back(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with ListeningPath(str(tmp_path / "socket")):
            assert os.umask(0o022) == 0o022
        with pytest.raises(SetupError):
            ListeningPath(str(tmp_path / "none" / "socket")).__enter__()
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


# Inherited descriptors


def test_an_inherited_socket_is_not_inherited_further() -> None:
    ours, theirs = socket.socketpair()
    theirs.set_inheritable(True)
    with ours, inherited(theirs.detach()) as given:
        assert not given.get_inheritable()
        given.send(b"x")
        assert ours.recv(1) == b"x"


@pytest.mark.parametrize("number", [-1, 999, 99999999999])
def test_numbers_that_are_no_descriptors(number: int) -> None:
    with pytest.raises(SetupError, match=f"--fd {number}: not an inherited socket"):
        inherited(number)


def test_descriptors_that_are_no_sockets() -> None:
    with open(os.devnull) as file, pytest.raises(SetupError, match="not an inherited socket"):  # noqa: PTH123
        inherited(file.fileno())


@pytest.mark.parametrize(
    ("family", "kind"), [(socket.AF_UNIX, socket.SOCK_DGRAM), (socket.AF_INET, socket.SOCK_STREAM)]
)
def test_sockets_of_another_kind(family: int, kind: int) -> None:
    with socket.socket(family, kind) as other:
        with pytest.raises(SetupError, match="not a unix stream socket"):
            inherited(other.fileno())
        assert other.getsockname() is not None  # still open, and its owner's
