"""What doctor says of a machine: with a QEMU, without one, and to a program. No QEMU is started but a pretended one."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import pytest

from balloonlab import cli, doctor
from balloonlab.doctor import Check
from qmp_glue.find import DEVICE

PRETENDED = f"""#!/bin/sh
case "$*" in
*-version*) echo "QEMU emulator version 11.1.3 (pretended)" ;;
*) echo 'name "{DEVICE}", bus PCI' ;;
esac
"""


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing on the PATH, an empty cache, no QEMU named."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QEMU", raising=False)
    return tmp_path


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str, str]]:
    """Mark, detail and fix of each check, by its name."""
    found: dict[str, tuple[str, str, str]] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("      -> "):
            mark, detail, _ = found[name]
            found[name] = (mark, detail, line.removeprefix("      -> "))
        else:
            name, _, detail = line[6:].partition(": ")
            found[name] = (line[:4], detail, "")
    return found


def test_without_any_qemu_the_fix_is_named_and_the_status_is_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 3
    said = lines(capsys)
    mark, detail, fix = said["qemu"]
    assert mark == "MISS"
    assert "there is no qemu-system-x86_64 on the PATH" in detail
    assert "scripts/demo, or balloonlab doctor --fetch" in fix
    assert said["apt"][0] == "note"
    assert said["guests"][0] == "note"


def test_whatever_is_not_well_has_its_fix(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor"])
    for mark, detail, fix in lines(capsys).values():
        assert mark in ("ok  ", "note", "MISS")
        assert detail
        assert (fix == "") == (mark == "ok  ")


def test_what_the_sandbox_lacks_is_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hostdev.landlock.abi", lambda: 0)
    cli.main(["doctor"])
    mark, detail, fix = lines(capsys)["sandbox"]
    assert mark == "note"
    assert "no Landlock" in detail
    assert "5.13" in fix


def test_a_qemu_that_lacks_the_device_is_missing_too(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = program(bare_machine / "old-qemu", "#!/bin/sh\necho 'QEMU emulator version 7.2.0'\n")
    monkeypatch.setenv("QEMU", old)
    assert cli.main(["doctor"]) == 3
    mark, detail, _ = lines(capsys)["qemu"]
    assert mark == "MISS"
    assert f"QEMU={old} has no device {DEVICE}: name another QEMU" in detail


def test_with_a_capable_qemu_all_is_well(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QEMU", program(bare_machine / "qemu", PRETENDED))
    assert cli.main(["doctor"]) == 0
    assert lines(capsys)["qemu"] == ("ok  ", "11.1.3, named by QEMU=, can front the device", "")


def test_a_program_gets_a_command_that_runs(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QEMU", program(bare_machine / "qemu", PRETENDED))
    assert cli.main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    assert document["checks"][1] == {
        "name": "qemu",
        "status": "ok",
        "detail": "11.1.3, named by QEMU=, can front the device",
        "fix": "",
    }
    qemu = document["qemu"]
    ran = subprocess.run(
        [*qemu["argv"], "-version"],
        env=os.environ | qemu["env"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert f"version {qemu['version']} " in ran.stdout


def test_a_program_is_told_that_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["qemu"] is None
    assert [check["status"] for check in document["checks"] if check["name"] == "qemu"] == ["missing"]


def test_another_machine_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert cli.main(["doctor"]) == 3
    assert lines(capsys)["host"] == ("MISS", "aarch64", "the device needs the store order of x86-64")


@pytest.mark.parametrize(
    ("shown", "status"),
    [("always within_size [advise] never deny force", "ok"), ("always [never]", "note"), ("", "note")],
)
def test_transparent_huge_pages_of_shared_memory(
    shown: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_read", lambda path: shown if path.endswith("shmem_enabled") else "0")
    huge, thp = doctor._memory_settings()
    assert huge == Check("huge pages", "ok", "0 reserved; guests of the lab use none")
    assert (thp.name, thp.status) == ("shmem THP", status)


def test_a_cache_that_cannot_be_made_is_one_line(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (bare_machine / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(bare_machine / "file"))
    assert cli.main(["env"]) != 0
    output, error = capsys.readouterr()
    assert output == ""
    assert "XDG_CACHE_HOME" in error
    assert error.count("\n") == 1
