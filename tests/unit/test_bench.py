"""The bench against virtme-ng, as far as nothing boots: turns, failures, and a machine without virtme-ng."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import boot_time
from tests.bench.boot_time import BenchError, Time, interleaved, main, timed
from tests.bench.virtme import WITHOUT_UDEV
from tests.device_program import wait_for
from tests.killing import is_alive


@pytest.mark.parametrize("options", [[], ["--virtme-ng", "/nonexistent/vng"]])
def test_without_virtme_ng_it_says_so_and_how_to_get_it(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 3
    assert "pip install virtme-ng into an environment of its own" in capsys.readouterr().err


def test_who_was_first_is_second_the_next_time() -> None:
    ran: list[str] = []

    def contestant(name: str) -> Time:
        ran.append(name)
        return Time(len(ran), 0)

    times = interleaved({"a": lambda: contestant("a"), "b": lambda: contestant("b")}, 3)
    assert "".join(ran) == "abbaab"
    assert [one.wall for one in times["a"]] == [1, 4, 5]
    assert [one.wall for one in times["b"]] == [2, 3, 6]


def test_a_program_is_timed_to_its_end() -> None:
    own, said = timed([sys.executable, "-c", "import time; print('text'); time.sleep(0.2)"], os.environ)
    assert said == "text\n"
    assert own.wall >= 0.2
    assert 0 < own.cpu < own.wall + 1


def test_a_program_that_fails_or_hangs_is_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="sh ended with status 3:\nwhy"):
        timed(["sh", "-c", "echo why; exit 3"], os.environ)
    monkeypatch.setattr(boot_time, "RUN_SECONDS", 0.25)
    pid, communicate = tmp_path / "pid", subprocess.Popen.communicate

    def at_work(process: subprocess.Popen[str], timeout: float) -> tuple[str, str]:
        wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"), "a process of its group")
        return communicate(process, None, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", at_work)
    with pytest.raises(BenchError, match=r"sh has not ended in 0.25 s"):
        timed(["sh", "-c", f"sleep 60 & echo $! >{pid}; wait"], os.environ)
    # Killed with its group, which takes a moment; whoever is init here has it as a zombie until it looks.
    wait_for(lambda: not is_alive(int(pid.read_text())), "its end")


def test_the_line_for_a_guest_is_one_for_a_shell(tmp_path: Path) -> None:
    line = WITHOUT_UDEV.format(command="echo 'a b'; false")
    done = subprocess.run(
        ["sh", "-n", "-c", line], capture_output=True, check=False, timeout=30, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, b"")
