"""The bench against virtme-ng, as far as nothing boots: turns, failures, and a machine without virtme-ng."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench import boot_time
from tests.bench.boot_time import BenchError, Time, interleaved, main, timed
from tests.bench.virtme import WITHOUT_UDEV


@pytest.mark.parametrize("options", [[], ["--virtme-ng", "/nonexistent/vng"]])
def test_without_virtme_ng_it_says_so_and_how_to_get_it(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 3
    assert "pip install virtme-ng into an environment of its own" in capsys.readouterr().err


GONE_SECONDS = 60.0


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
    pid = tmp_path / "pid"
    communicate = subprocess.Popen.communicate

    def once_begun(process: subprocess.Popen[str], *, timeout: float) -> tuple[str, str]:
        end = time.monotonic() + GONE_SECONDS
        while not pid.exists() or not pid.read_text().endswith("\n"):
            assert time.monotonic() < end
            time.sleep(0.01)
        return communicate(process, timeout=timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", once_begun)
    monkeypatch.setattr(boot_time, "RUN_SECONDS", 0.1)
    with pytest.raises(BenchError, match=r"sh has not ended in 0\.1 s"):
        timed(["sh", "-c", f"sleep 60 & echo $! >{pid}; wait"], os.environ)
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    # Killed with its group, which takes a moment; whoever is init here has it as a zombie until it looks.
    end = time.monotonic() + GONE_SECONDS
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_line_for_a_guest_is_one_for_a_shell(tmp_path: Path) -> None:
    line = WITHOUT_UDEV.format(command="echo 'a b'; false")
    done = subprocess.run(
        ["sh", "-n", "-c", line], capture_output=True, check=False, timeout=30, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, b"")
