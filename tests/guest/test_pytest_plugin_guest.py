"""The pytest plugin boots real guests: the suite that the documentation has, run as somebody else's."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from guest_images.build import build_guest
from qmp_glue.debian import cache_root
from tests.guest.processes import family, wait_until

pytest_plugins = ["pytester"]
pytestmark = [pytest.mark.guest, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/examples/test_my_guest.py"
# pytester has a home of its own, with nothing in its cache.
CACHE = cache_root().parent
OPTIONS = ["-p", "balloonlab.pytest_plugin", "-W", "error", "--strict-markers"]
SECONDS = 300.0

PANIC = """

def test_a_panic(small_vm: BalloonVm) -> None:
    small_vm.run("echo c > /proc/sysrq-trigger")
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder for a suite; this repository's plugin, QEMU and kernels."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    return pytester


def started(folder: Path) -> list[list[str]]:
    """Command lines of the QEMUs and devices that have their files in a folder, whoever their parent is by now."""
    running = [process.argv for process in family(1) if "pytest" not in process.argv]
    return [argv for argv in running if any(str(folder) in word for word in argv)]


def has_qemu(folder: Path) -> bool:
    return any("-object" in argv for argv in started(folder))


def test_the_example_of_the_documentation(suite: pytest.Pytester) -> None:
    """Fills, frees, sees memory come back; and one more test, whose guest panics: its report has the console."""
    suite.makepyfile(test_my_guest=EXAMPLE.read_text() + PANIC)
    ran = suite.runpytest_subprocess(*OPTIONS, "--junitxml=junit.xml", timeout=SECONDS)
    ran.assert_outcomes(passed=4, failed=1)
    ran.stdout.fnmatch_lines(
        [
            "*GuestEndedError: the guest panicked*",
            "*- balloon: the guest's console -*",
            "*Linux version*",
            "*Kernel panic - not syncing: sysrq triggered crash*",
            "*- balloon: the device -*",
        ]
    )
    assert started(suite.path) == []
    numbers = properties(suite.path / "junit.xml", "test_freed_memory_comes_back")
    assert int(numbers["balloon_released_bytes"]) > 150 << 20
    assert 0 < int(numbers["balloon_footprint_bytes"]) <= int(numbers["balloon_memory_bytes"]) == 512 << 20
    assert properties(suite.path / "junit.xml", "test_a_panic") == {}


def properties(report: Path, test: str) -> dict[str, str]:
    (case,) = (one for one in ElementTree.parse(report).iter("testcase") if one.get("name") == test)
    return {one.attrib["name"]: one.attrib["value"] for one in case.iter("property")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_in_a_boot_leaves_nothing(suite: pytest.Pytester, number: signal.Signals) -> None:
    suite.makepyfile(test_boots="def test_boots(balloon_vm): pass")
    command = [sys.executable, "-m", "pytest", *OPTIONS, f"--basetemp={suite.path}/b", "test_boots.py"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=suite.path) as running:
        try:
            wait_until(lambda: has_qemu(suite.path) or running.poll() is not None, "QEMU beside the device")
            assert running.poll() is None
            running.send_signal(number)
            running.wait(SECONDS)
            wait_until(lambda: started(suite.path) == [], "the end of QEMU and device")
        finally:
            running.kill()


def test_a_guest_that_does_not_come_up_shows_what_qemu_said(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU that has the device and does not start a machine."""
    build_guest("bookworm-backports")
    broken = suite.path / "qemu"
    broken.write_text(
        "#!/bin/sh\n"
        "case \"$*\" in *-version) echo 'QEMU emulator version 11.1.3' ;;\n"
        "*'-device help') echo 'name \"vhost-user-test-device-pci\"' ;;\n"
        "*) echo 'no machine today' >&2; exit 1 ;; esac\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("QEMU", str(broken))
    suite.makepyfile("def test_boots(balloon_vm): pass")
    ran = suite.runpytest_subprocess(*OPTIONS, timeout=SECONDS)
    ran.assert_outcomes(errors=1)
    ran.stdout.fnmatch_lines(
        [
            "*QEMU ended with status 1; put right *",
            "*no machine today",
            "*- balloon: QEMU -*",
            "*no machine today",
        ]
    )
