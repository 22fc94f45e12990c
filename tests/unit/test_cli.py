"""The command line: each bad start is one line and status 2, --print-capabilities answers whatever else is there."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hostdev import __version__, launch
from hostdev.errors import EXIT_PASS, EXIT_UNSUPPORTED, EXIT_USAGE, SetupError, UnsupportedHostError
from hostdev.launch import parse_features
from hostdev.wire.balloon import DEFAULT_FEATURES, Feature

COMMAND = [sys.executable, "-m", "hostdev.cli"]


def run(*arguments: str, pass_fds: Sequence[int] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        pass_fds=pass_fds,
        stdin=subprocess.DEVNULL,
    )


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == EXIT_USAGE
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("vhost-user-balloon: ")
    for word in words:
        assert word in done.stderr


# Bad starts, as a user sees them


def test_neither_path_nor_descriptor() -> None:
    assert_refused(run(), "--socket-path", "--fd", "--help")


def test_both_path_and_descriptor(tmp_path: Path) -> None:
    assert_refused(run(f"--socket-path={tmp_path}/socket", "--fd=3"), "not allowed with")


@pytest.mark.parametrize("number", ["999", "-1", "99999999999", "x", ""])
def test_bad_descriptors(number: str) -> None:
    assert_refused(run(f"--fd={number}"), "--fd")


def test_a_descriptor_that_is_no_socket() -> None:
    with open(os.devnull) as file:  # noqa: PTH123
        assert_refused(run(f"--fd={file.fileno()}", pass_fds=[file.fileno()]), "not an inherited socket")


def test_a_path_taken_by_a_live_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert_refused(run(f"--socket-path={path}"), "is taken", "choose another path")
        assert path.exists()


def test_a_path_taken_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert_refused(run(f"--socket-path={tmp_path}/file"), "not a socket", "choose another path")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("path", "words"),
    [("none/socket", "does not exist"), ("x" * 108, "use a shorter one"), ("", "choose another path")],
)
def test_impossible_paths(tmp_path: Path, path: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(tmp_path)
    assert_refused(run(f"--socket-path={path}"), words)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A folder whose mode the test takes away."""
    folder = Path(tempfile.mkdtemp(prefix="vhost-user-balloon-"))
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


def run_as_ordinary_user(argument: str) -> subprocess.CompletedProcess[str]:
    """Root may write everywhere, by a capability: a test that runs as root starts the program without any."""
    powerless = ["setpriv", "--bounding-set=-all"] if os.geteuid() == 0 else []
    return subprocess.run(
        [*powerless, *COMMAND, argument], capture_output=True, text=True, timeout=30, check=False
    )


def test_a_folder_that_cannot_be_written_to(foreign: Path) -> None:
    foreign.chmod(0o555)
    done = run_as_ordinary_user(f"--socket-path={foreign}/socket")
    assert_refused(done, "Permission denied", "cannot be written to, choose another")


def test_a_folder_that_cannot_be_looked_into(foreign: Path) -> None:
    foreign.chmod(0o000)
    done = run_as_ordinary_user(f"--socket-path={foreign}/below/socket")
    assert_refused(done, "Permission denied", "cannot be written to, choose another")


def test_a_stale_socket_in_a_folder_that_cannot_be_written_to(foreign: Path) -> None:
    path = foreign / "socket"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    path.chmod(0o777)
    foreign.chmod(0o555)
    assert_refused(run_as_ordinary_user(f"--socket-path={path}"), "cannot be removed", "choose another path")


def test_somebody_elses_socket(foreign: Path) -> None:
    """Mode 0600: it cannot be told if it is stale, so it is left alone."""
    path = foreign / "socket"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
    path.chmod(0o000)
    foreign.chmod(0o555)
    assert_refused(run_as_ordinary_user(f"--socket-path={path}"), "is taken", "Permission denied")
    assert path.is_socket()


@pytest.mark.parametrize(
    "option",
    [
        "--discard=everything",
        "--log-level=loud",
        "--no-such-option",
        "--soc=x",
        "--on-term=never",
        "--term-timeout=-1",
        "--term-timeout=inf",
        "--term-timeout=nan",
        "--term-timeout=soon",
    ],
)
def test_unknown_options_and_values(tmp_path: Path, option: str) -> None:
    assert_refused(run(f"--socket-path={tmp_path}/socket", option))
    assert list(tmp_path.iterdir()) == []


def test_two_guests_of_one_name(tmp_path: Path) -> None:
    """Their metrics and traces would be one file, and nobody could say which is meant."""
    (tmp_path / "other").mkdir()
    paths = [f"--socket-path={tmp_path}/vm.sock", f"--socket-path={tmp_path}/other/vm.sock"]
    assert_refused(run(*paths), "choose another name for the socket")
    assert not (tmp_path / "vm.sock").exists()
    assert not (tmp_path / "other" / "vm.sock").exists()


def test_the_choices_are_plain_words(tmp_path: Path) -> None:
    done = run(f"--socket-path={tmp_path}/socket", "--discard=everything")
    # Python 3.11 puts each into quotes, 3.12 and later do not.
    assert "(choose from auto, remove, dontneed, none)" in done.stderr.replace("'", "")


def test_an_unknown_feature(tmp_path: Path) -> None:
    done = run(f"--socket-path={tmp_path}/socket", "--features=+levitation")
    assert_refused(done, "+levitation", "reporting", "page_poison")
    assert list(tmp_path.iterdir()) == []


def test_a_metrics_file_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "metrics"):
        done = run(f"--socket-path={tmp_path}/socket", f"--metrics-file={path}")
        assert_refused(done, "--metrics-file", "folder")
    assert list(tmp_path.iterdir()) == []


# What is asked without serving


@pytest.mark.parametrize(
    "beside", [(), ("--fd=999",), ("--nonsense", "\udcff", "--fd"), ("--help",), ("--version",), ("x", "y")]
)
def test_capabilities_whatever_is_beside(beside: tuple[str, ...]) -> None:
    """vhost-user.rst, backend program conventions: other options are ignored, the exit status is 0."""
    for arguments in ((*beside, "--print-capabilities"), ("--print-capabilities", *beside)):
        done = run(*arguments)
        assert (done.returncode, done.stderr) == (EXIT_PASS, "")
        assert json.loads(done.stdout)["type"] == "balloon"


def test_capabilities_without_the_slow_imports() -> None:
    """Asked at each start of a VM: neither construct nor argparse is paid for."""
    code = (
        "import sys; from hostdev import cli; cli.main(['--print-capabilities']);"
        "print(sorted({'construct', 'argparse', 'logging', 'socket', 'hostdev.launch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (EXIT_PASS, f"vhost-user-balloon {__version__}\n")


def test_help_shows_a_whole_example() -> None:
    done = run("--help")
    assert done.returncode == EXIT_PASS
    for word in ("vhost-user-test-device-pci", "config_size=16", "memory-backend-memfd", "--once"):
        assert word in done.stdout


# Parts


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("", DEFAULT_FEATURES),
        ("-page_poison", DEFAULT_FEATURES & ~Feature.PAGE_POISON),
        ("-page-poison,+must-tell-host", DEFAULT_FEATURES & ~Feature.PAGE_POISON | Feature.MUST_TELL_HOST),
        ("+Reporting,-REPORTING,", DEFAULT_FEATURES & ~Feature.REPORTING),
    ],
)
def test_features(text: str, features: Feature) -> None:
    assert parse_features(text) == features


@pytest.mark.parametrize("text", ["reporting", "+", "-", "=reporting", "+reporting -page_poison", "+5"])
def test_features_that_are_none(text: str) -> None:
    with pytest.raises(SetupError, match="write \\+name or -name"):
        parse_features(text)


@pytest.mark.parametrize("machine", ["aarch64", "ppc64le", "i686"])
def test_other_hosts_are_refused(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """Their memory order is not the one that the used ring relies on."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(UnsupportedHostError, match=machine) as caught:
        launch._check_host()
    assert caught.value.exit_status == EXIT_UNSUPPORTED


def test_a_python_that_writes_for_perf_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """3.12 and later. It would write to a number that is another file's in a worker."""
    monkeypatch.setattr(sys, "is_stack_trampoline_active", lambda: True, raising=False)
    with pytest.raises(SetupError, match="PYTHONPERFSUPPORT"):
        launch._check_host()


def test_a_trace_on_a_full_disk_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hostdev.cli", f"--socket-path={tmp_path / 's'}", "--trace=/dev/full"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (EXIT_USAGE, 1)
    assert "--trace /dev/full: " in done.stderr
    assert list(tmp_path.iterdir()) == []
