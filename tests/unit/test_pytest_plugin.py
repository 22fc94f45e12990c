"""The pytest plugin in a pytest of its own, as it is in other people's suites; no guest is booted here."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from balloonlab import pytest_plugin

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
PLUGIN = "balloonlab.pytest_plugin"
# A pytest starts in half a second, the device in a quarter of one; CI machines share their cores.
SECONDS = 60.0

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def surroundings(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder for a suite, and an environment in which this repository's plugin is loaded and nothing is cached."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(pytester.path / "cache"))
    monkeypatch.delenv("CI", raising=False)
    return pytester


@pytest.fixture
def inner(surroundings: pytest.Pytester) -> Run:
    def run(*arguments: str) -> pytest.RunResult:
        return surroundings.runpytest_subprocess(
            "-p", PLUGIN, "-W", "error", "--strict-markers", "-rs", *arguments, timeout=SECONDS
        )

    return run


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {SECONDS} s"
        time.sleep(0.01)


def lives(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Loading


def test_nothing_is_imported_before_it_is_used(surroundings: pytest.Pytester) -> None:
    surroundings.makeconftest(
        "import json, sys\n"
        "def pytest_sessionfinish(session):\n"
        "    session.config.rootpath.joinpath('modules').write_text(json.dumps(sorted(sys.modules)))\n"
    )
    surroundings.makepyfile(test_empty="")
    loaded = []
    for plugin in ([], ["-p", PLUGIN]):
        surroundings.runpytest_subprocess("--collect-only", *plugin, timeout=SECONDS)
        loaded.append(set(json.loads((surroundings.path / "modules").read_text())))
    without, with_it = loaded
    assert with_it - without == {"balloonlab", PLUGIN}
    heavy = {"asyncio", "rich", "msgspec", "qemu.qmp", "matplotlib", "construct"}
    assert not heavy & with_it


def test_it_is_what_an_installation_loads() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (name,) = project["entry-points"]["pytest11"].values()
    assert importlib.import_module(name) is pytest_plugin


def test_help_has_a_group_of_its_own(inner: Run) -> None:
    inner("--help").stdout.fnmatch_lines(
        [
            "guests beside vhost-user-balloon:",
            "*--balloon-kernel=KERNEL*",
            "*--balloon-memory=SIZE*",
            "*--balloon-accelerator=*",
        ]
    )


def test_the_marker_is_registered(inner: Run) -> None:
    inner("--markers").stdout.fnmatch_lines(["@pytest.mark.balloon(kernel=*"])


# The device


DEVICE = """
    import pytest

    @pytest.mark.balloon(discard="none")
    def test_it_listens(balloon_device, request):
        import socket
        from hostdev.frontend import Frontend
        from tests.device_program import works, wait_for
        with Frontend(socket.socket(socket.AF_UNIX)) as guest:
            guest.connection.connect(str(balloon_device.socket_path))
            guest.start()
            assert balloon_device.counters().released_bytes == 0
            wait_for(lambda: "method is none" in balloon_device.log_text(), "the word of the marker")
        request.config.rootpath.joinpath("device").write_text(f"{balloon_device.pid} {balloon_device.socket_path}")
"""


@pytest.mark.parametrize(("name", "deep"), [("b", False), ("d" * 80, True), ("b c", False)])
def test_serves(surroundings: pytest.Pytester, inner: Run, name: str, deep: bool) -> None:
    """Also where pytest's own folders leave no room for the path of a socket, or have a space. It ends with its test."""
    surroundings.makepyfile(DEVICE)
    base = surroundings.path / name
    inner(f"--basetemp={base}").assert_outcomes(passed=1)
    pid, _, path = (surroundings.path / "device").read_text().partition(" ")
    assert not lives(int(pid))
    assert not Path(path).exists()
    assert Path(path).is_relative_to(base) != deep
    assert Path(path).parent.exists() != deep


def test_a_failed_test_shows_what_the_device_wrote(surroundings: pytest.Pytester, inner: Run) -> None:
    surroundings.makepyfile(
        """
        def test_before(balloon_device):
            pass

        def test_fails(balloon_device):
            import socket, os
            with socket.socket(socket.AF_UNIX) as front_end:
                front_end.connect(str(balloon_device.socket_path))
                while "connected" not in balloon_device.log_text():
                    os.sched_yield()
            assert False

        def test_fails_without_any():
            assert False
        """
    )
    ran = inner()
    ran.assert_outcomes(passed=1, failed=2)
    ran.stdout.fnmatch_lines(["*- balloon: the device -*", "*front end connected*"])
    assert ran.stdout.str().count("- balloon: the device -") == 1


def test_a_device_that_does_not_start_says_why(surroundings: pytest.Pytester, inner: Run) -> None:
    surroundings.makepyfile(
        """
        import pytest

        @pytest.mark.balloon(features="+wings")
        def test_never_runs(balloon_device):
            pass
        """
    )
    ran = inner()
    ran.assert_outcomes(errors=1)
    ran.stdout.fnmatch_lines(["the device ended with status 2; put right *", "*wings*"])
    assert "Traceback" not in ran.stdout.str()


WAITS = """
    import time

    def test_waits(balloon_device, request):
        request.config.rootpath.joinpath("pid.new").write_text(str(balloon_device.pid))
        request.config.rootpath.joinpath("pid.new").rename(request.config.rootpath / "pid")
        while True:  # pause() would miss a signal that comes just before it
            time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, pytest.ExitCode.INTERRUPTED), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_run_that_is_ended_leaves_no_device(
    surroundings: pytest.Pytester, number: signal.Signals, status: int
) -> None:
    surroundings.makepyfile(test_waits=WAITS)
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "test_waits.py"]
    written = surroundings.path / "pid"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=surroundings.path) as running:
        try:
            wait_until(lambda: written.exists() or running.poll() is not None, "the device")
            pid = int(written.read_text())
            assert lives(pid)
            running.send_signal(number)
            assert running.wait(SECONDS) == status
            wait_until(lambda: not lives(pid), "the device's end")
        finally:
            running.kill()


def test_two_workers_of_xdist_share_nothing(surroundings: pytest.Pytester, inner: Run) -> None:
    """Each waits until the other's device is there as well."""
    surroundings.makepyfile(
        """
        import pytest, time

        @pytest.mark.parametrize("number", [0, 1])
        def test_both(balloon_device, number, request):
            places = request.config.rootpath
            places.joinpath(f"device{number}").touch()
            end = time.monotonic() + 30
            while not places.joinpath(f"device{1 - number}").exists():
                assert time.monotonic() < end
                time.sleep(0.01)
            assert balloon_device.socket_path.is_socket()
        """
    )
    inner("-p", "xdist.plugin", "-n", "2").assert_outcomes(passed=2)


# What cannot be had, and what cannot be asked for


def boot_with(surroundings: pytest.Pytester, words: str = "") -> None:
    surroundings.makepyfile(
        f"""
        import pytest

        @pytest.mark.balloon({words})
        def test_never_runs(balloon_vm):
            pass
        """
    )


def test_no_qemu_is_a_skip_with_the_reason(
    surroundings: pytest.Pytester, inner: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEMU", "/nonexistent/qemu")
    boot_with(surroundings)
    ran = inner()
    ran.assert_outcomes(skipped=1)
    ran.stdout.fnmatch_lines(["SKIPPED *QEMU=/nonexistent/qemu is no executable file*"])


def test_no_qemu_is_a_failure_where_nothing_may_be_skipped(
    surroundings: pytest.Pytester, inner: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEMU", "/nonexistent/qemu")
    monkeypatch.setenv("CI", "true")
    boot_with(surroundings)
    ran = inner()
    ran.assert_outcomes(errors=1)
    ran.stdout.fnmatch_lines(["CI must have what this test needs: QEMU=/nonexistent/qemu *"])


def test_a_kernel_that_cannot_be_fetched_is_a_skip(
    surroundings: pytest.Pytester, inner: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU that says it has the device, an empty cache, and no apt on the PATH. The second test asks nobody again."""
    qemu = surroundings.path / "qemu"
    qemu.write_text(
        "#!/bin/sh\necho 'QEMU emulator version 11.1.3'; echo 'name \"vhost-user-test-device-pci\"'\n"
    )
    qemu.chmod(0o755)
    monkeypatch.setenv("QEMU", str(qemu))
    monkeypatch.setenv("PATH", str(surroundings.mkdir("empty")))
    surroundings.makepyfile("def test_a(balloon_vm): pass\ndef test_b(balloon_vm): pass")
    ran = inner()
    ran.assert_outcomes(skipped=2)
    ran.stdout.fnmatch_lines(["SKIPPED *apt*"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("kernal='forky'", "*a guest has no 'kernal': did you mean kernel?*"),
        ("memory='much'", "*'much' is no size*"),
        ("memory='1M'", "guest.memory is 1.0 MiB: give 128 MiB or more*"),
        ("cpus='two'", "*Expected `int`, got `str`*cpus*"),
        ("arm='theirs'", "*choose one of ours, qemu, off*"),
        ("'1G'", "*takes words only*"),
    ],
)
def test_words_that_nobody_understands(
    surroundings: pytest.Pytester, inner: Run, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.setenv("QEMU", "/nonexistent/qemu")
    boot_with(surroundings, words)
    ran = inner()
    ran.assert_outcomes(errors=1)
    ran.stdout.fnmatch_lines([message])


def test_an_option_is_a_default_and_the_closer_marker_is_right(
    surroundings: pytest.Pytester, inner: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by what each is refused for."""
    monkeypatch.setenv("QEMU", "/nonexistent/qemu")
    surroundings.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.balloon(memory="2M")

        def test_the_module_s(balloon_vm):
            pass

        @pytest.mark.balloon(memory="3M")
        def test_its_own(balloon_vm):
            pass
        """,
        test_unmarked="def test_the_option_s(balloon_vm): pass",
    )
    text = inner("--balloon-memory=4M").stdout.str()
    assert [text.count(f"guest.memory is {size}.0 MiB") for size in (2, 3, 4)] == [1, 1, 1]


def test_the_environment_of_these_tests_is_what_they_think(inner: Run, surroundings: pytest.Pytester) -> None:
    """The code under test is this repository's, whatever is installed."""
    surroundings.makepyfile(
        f"def test_a():\n    import balloonlab, os\n    assert balloonlab.__file__.startswith({str(ROOT)!r} + os.sep)"
    )
    inner().assert_outcomes(passed=1)
    assert os.environ["PYTHONPATH"] == str(ROOT)
