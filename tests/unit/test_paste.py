"""What people paste: words that a shell and QEMU read back, and a file that management software finds.

libvirt's XML is judged by libvirt's own schema in tests/driver/test_pasted.py, as QEMU's words are by QEMU.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from balloonlab import cli, vhost_user_json
from balloonlab.errors import UsageError
from balloonlab.vhost_user_json import DESCRIPTION, FILE_NAME, document, find_program, install
from qmp_glue.errors import MachineError
from qmp_glue.inspect import inspect_arguments
from qmp_glue.machine_setup import setup_of
from qmp_glue.paste import MACHINES, MachineType, libvirt_domain, libvirt_fragments, qemu_arguments, size_text

MIB = 1 << 20
SOCKET = Path("/run/user/1/balloon.sock")


@pytest.mark.parametrize("machine", MACHINES)
def test_words_suit_the_device(machine: MachineType) -> None:
    for transport in (None, *MACHINES[machine]):
        words = qemu_arguments(SOCKET, memory_bytes=512 * MIB, machine=machine, transport=transport)
        assert inspect_arguments(words) == []
        setup = setup_of(words)
        assert (setup.memory_bytes, setup.backend_bytes, setup.balloons) == (512 * MIB, 512 * MIB, 1)


def test_the_device_only() -> None:
    words = qemu_arguments(SOCKET, memory_bytes=None)
    assert words[::2] == ["-chardev", "-device"]
    words = qemu_arguments(SOCKET, memory_bytes=None, machine="microvm")
    assert words[::2] == ["-global", "-chardev", "-device"]
    assert words[-1].startswith("vhost-user-test-device,")


@pytest.mark.parametrize(
    ("size", "text"),
    [(1 << 30, "1G"), (1536 * MIB, "1536M"), (8192, "8K"), (3 << 40, "3T"), ((1 << 30) + 8192, "1048584K")],
)
def test_sizes_are_exact(size: int, text: str) -> None:
    assert size_text(size) == text
    assert setup_of(["-m", text]).memory_bytes == size


@pytest.mark.parametrize("size", [0, -8192, 1, 4096, (1 << 30) + 4096])
def test_sizes_that_qemu_would_refuse(size: int) -> None:
    with pytest.raises(MachineError, match="multiple of 8192"):
        size_text(size)
    with pytest.raises(MachineError, match="multiple of 8192"):
        libvirt_domain(SOCKET, size)


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "\x1b[0m", "\udc80"])
def test_paths_that_cannot_be_pasted(name: str) -> None:
    with pytest.raises(MachineError, match="cannot be pasted"):
        qemu_arguments(Path(name), memory_bytes=None)
    with pytest.raises(MachineError, match="cannot be pasted"):
        libvirt_fragments(Path(name))


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 0
    printed, error = capsys.readouterr()
    assert error == ""
    return printed


def test_a_shell_reads_the_line_back(capsys: pytest.CaptureFixture[str]) -> None:
    """Unquoted, as in qemu-system-x86_64 $(balloonlab qemu-args): the words that a plain path gives need no quotes."""
    line = output(capsys, "qemu-args")
    assert line.count("\n") == 1
    split = subprocess.run(
        ["sh", "-c", 'printf "%s\\n" $LINE'], env={"LINE": line}, capture_output=True, text=True, check=True
    )
    assert split.stdout.splitlines() == json.loads(output(capsys, "qemu-args", "--json"))


def test_odd_paths_are_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("qemu-args", "--socket-path", "/a b/it's, here")
    words = json.loads(output(capsys, *options, "--json"))
    assert "socket,id=balloon,path=/a b/it's,, here" in words
    assert shlex.split(output(capsys, *options)) == words


def test_relative_paths_become_absolute(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"path={tmp_path}/b.sock" in output(capsys, "qemu-args", "--socket-path", "b.sock")
    assert f"path={tmp_path}/b.sock" in output(capsys, "libvirt-xml", "--socket-path", "b.sock")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["qemu-args", "--transport", "mmio"], "q35 has no mmio: choose pci"),
        (["qemu-args", "--machine", "pc"], "invalid choice: 'pc'"),
        (["qemu-args", "--memory", "1000"], "multiple of 8192"),
        (["qemu-args", "--memory", "some"], "'some' is no size"),
        (["libvirt-xml", "--memory", "1G"], "--memory goes with --domain"),
        (["libvirt-xml", "--domain", "--memory", "1"], "multiple of 8192"),
        (["vhost-user-json", "--install", "/nowhere"], "/nowhere is no directory: make it first"),
    ],
)
def test_wrong_options(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(words)
    except SystemExit as end:
        status = int(str(end.code))
    printed, error = capsys.readouterr()
    assert (status, printed) == (2, "")
    assert said in error


# The file by which management software finds the device


def test_the_document_is_what_qemu_specifies(capsys: pytest.CaptureFixture[str]) -> None:
    """VhostUserBackend of docs/interop/vhost-user.json; its program answers as the conventions ask."""
    fields = json.loads(output(capsys, "vhost-user-json"))
    assert fields == {
        "description": DESCRIPTION,
        "type": "balloon",
        "binary": str(find_program()),
        "tags": [],
    }
    assert Path(fields["binary"]).is_absolute()
    asked = [fields["binary"], "--print-capabilities"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(answer.stdout)["type"] == fields["type"]


def test_installed_for_the_user(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "qemu/vhost-user" / FILE_NAME
    assert output(capsys, "vhost-user-json", "--install", "user") == f"{path} is written\n"
    assert path.read_text() == document(find_program())
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert output(capsys, "vhost-user-json", "--install", "user") == f"{path} is there and the same\n"
    assert list(path.parent.iterdir()) == [path]


def test_one_of_ours_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    assert install(path, document(Path("/old")))
    assert install(path, document(Path("/new")))
    assert json.loads(path.read_text())["binary"] == "/new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "theirs", ["", "{", "[]", '{"type": "balloon", "description": "another", "binary": "/x"}']
)
def test_one_of_somebody_else_is_left_alone(theirs: str, tmp_path: Path) -> None:
    """An empty file, too: with one of that name a user hides the system's."""
    path = tmp_path / FILE_NAME
    path.write_text(theirs)
    with pytest.raises(UsageError, match="is left alone"):
        install(path, document(Path("/new")))
    assert path.read_text() == theirs
    assert list(tmp_path.iterdir()) == [path]


def test_one_that_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / FILE_NAME
    fchmod = os.fchmod

    def racing(descriptor: int, mode: int) -> None:
        monkeypatch.setattr(vhost_user_json, "_is_ours", lambda _path: False)
        path.write_text("theirs")
        fchmod(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", racing)
    with pytest.raises(UsageError, match="cannot be written"):
        install(path, document(Path("/new")))
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="install this package with pip"):
        find_program()
