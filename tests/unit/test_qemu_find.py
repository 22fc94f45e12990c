"""find_qemu(): which QEMU it takes, what it says where there is none, and that it asks each file once.

The QEMUs are shell scripts that answer the probe's two questions, or fail to.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmp_glue import find
from qmp_glue.errors import QemuNotFoundError
from qmp_glue.find import choose_accelerator, find_qemu, version_of

CAPABLE = f"""
echo "$@" >> "$0.log"
case "$*" in
-version) echo 'QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)' ;;
*) echo 'name "{find.DEVICE}", bus PCI' ;;
esac
"""
INCAPABLE = """
case "$*" in
-version) echo 'QEMU emulator version 10.0.2' ;;
*) echo 'name "virtio-balloon-pci", bus PCI' ;;
esac
"""


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on its PATH but what a test puts there, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(find.VARIABLE, raising=False)
    monkeypatch.delenv("DEBIAN_MIRROR", raising=False)
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


def script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def test_system_qemu_with_the_device(bare_machine: Path) -> None:
    path = script(bare_machine / find.PROGRAM, CAPABLE)
    qemu = find_qemu(fetch=False)
    assert (qemu.argv, qemu.version, qemu.origin) == ((str(path),), "11.1.3", "system")
    assert dict(qemu.env) == {}


def test_environment_goes_first(bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(bare_machine / find.PROGRAM, CAPABLE)
    own = script(tmp_path / "own", CAPABLE)
    monkeypatch.setenv(find.VARIABLE, str(own))
    qemu = find_qemu(fetch=False)
    assert (qemu.argv, qemu.origin) == ((str(own),), "environment")


def test_each_file_is_asked_once(bare_machine: Path) -> None:
    path = script(bare_machine / find.PROGRAM, CAPABLE)
    for _ in range(3):
        find_qemu(fetch=False)
    asked = Path(f"{path}.log")
    assert asked.read_text().splitlines() == ["-version", "-machine none -device help"]
    os.utime(path, ns=(0, 0))
    find_qemu(fetch=False)
    assert len(asked.read_text().splitlines()) == 4


@pytest.mark.parametrize("damage", ["{", "[]", '{"x": 1}', "\xff"])
def test_damaged_memory_is_none(bare_machine: Path, tmp_path: Path, damage: str) -> None:
    script(bare_machine / find.PROGRAM, CAPABLE)
    find_qemu(fetch=False)
    (tmp_path / "cache/vhost-user-balloon/probes.json").write_text(damage, "latin-1")
    assert find_qemu(fetch=False).version == "11.1.3"


@pytest.mark.parametrize(
    ("text", "seconds", "problem"),
    [
        (INCAPABLE, 60.0, f"has no device {find.DEVICE}"),
        ("echo 'libfoo.so: not found' >&2; exit 127", 60.0, "ended with status 127 (libfoo.so: not found)"),
        ("exec /bin/sleep 60", 0.2, "did not answer in"),
    ],
)
def test_unusable_qemu_is_named_with_its_problem(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch, text: str, seconds: float, problem: str
) -> None:
    monkeypatch.setattr(find, "PROBE_SECONDS", seconds)
    path = script(bare_machine / find.PROGRAM, text)
    with pytest.raises(QemuNotFoundError) as caught:
        find_qemu(fetch=False)
    assert f"{path} {problem}" in str(caught.value)
    monkeypatch.setenv(find.VARIABLE, str(path))
    with pytest.raises(QemuNotFoundError, match="unset QEMU"):
        find_qemu()


def test_not_a_program(bare_machine: Path) -> None:
    (bare_machine / find.PROGRAM).write_bytes(b"\x7fELF of another machine")
    (bare_machine / find.PROGRAM).chmod(0o755)
    with pytest.raises(QemuNotFoundError, match="does not start"):
        find_qemu(fetch=False)


def test_named_file_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(find.VARIABLE, "/nowhere/qemu")
    with pytest.raises(QemuNotFoundError, match="no executable file"):
        find_qemu()


def test_nothing_and_no_apt_says_what_to_install() -> None:
    with pytest.raises(QemuNotFoundError, match="install qemu-system-x86 ") as caught:
        find_qemu()
    assert caught.value.exit_code == 3
    assert "apt" in str(caught.value)
    assert "there is no qemu-system-x86_64 on the PATH" in str(caught.value)


def test_prefix_fetched_before(bare_machine: Path, tmp_path: Path) -> None:
    script(bare_machine / find.PROGRAM, INCAPABLE)
    prefix = tmp_path / "cache/vhost-user-balloon/qemu/11.1.3"
    prefix.mkdir(parents=True)
    script(prefix / find.PROGRAM, "")
    qemu = find_qemu(fetch=False)
    assert (qemu.version, qemu.origin) == ("11.1.3", "private")
    assert qemu.argv[0].startswith(f"{prefix}/usr/lib")
    assert qemu.env["QEMU_MODULE_DIR"].startswith(f"{prefix}/usr/lib")


def test_unfinished_prefix_does_not_count(tmp_path: Path) -> None:
    for name in ("11.1.3/usr", ".unpack.abc/prefix"):
        (tmp_path / "cache/vhost-user-balloon/qemu" / name).mkdir(parents=True)
    with pytest.raises(QemuNotFoundError):
        find_qemu(fetch=False)


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\nCopyright", "11.1.3"),
        ("QEMU emulator version 10.2.50 (v10.2.0-123-gabc)", "10.2.50"),
        ("mine\nx", "mine"),
        ("", ""),
    ],
)
def test_version(output: str, version: str) -> None:
    assert version_of(output) == version


@pytest.mark.parametrize(
    ("flags", "device", "name", "reason"),
    [
        ("fpu vmx sse", True, "kvm", "opens"),
        ("fpu svm", True, "kvm", "opens"),
        ("fpu vmxish", True, "tcg", "neither vmx nor svm"),
        ("fpu vmx", False, "tcg", "does not open"),
    ],
)
def test_accelerator(tmp_path: Path, flags: str, device: bool, name: str, reason: str) -> None:
    cpuinfo, kvm = tmp_path / "cpuinfo", tmp_path / "kvm"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: vmx\n")
    if device:
        kvm.touch()
    choice = choose_accelerator(cpuinfo, kvm)
    assert choice.name == name
    assert reason in choice.reason
