"""The fuzzer's own ends: what it says, its exit status, that nothing is left of it, and how few inputs are chosen of many.

Properties of the choice: it covers all that the inputs cover if there is room; it never is more than there is room for; no
input is chosen that adds nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import __main__ as command
from tests.fuzz import campaign, distil, targets
from tests.fuzz.campaign import Job

# Importing, and instrumenting what is imported: some seconds, on a machine that has other things to do many.
START_SECONDS = 60.0
LOG = """#2	INITED cov: 31 ft: 32 corp: 1/1b exec/s: 0 rss: 49Mb
#700	NEW    cov: 433 ft: 1533 corp: 169/1419b lim: 4 exec/s: 700 rss: 51Mb L: 9/9 MS: 1 CMP-
 === Uncaught Python exception: ===
AssertionError: pages that the chain does not name
#11843	DONE   cov: 434 ft: 1540 corp: 170/12Kb lim: 17 exec/s: 740 rss: 51Mb
stat::number_of_executed_units: 11843
"""
STEPS = st.frozensets(
    st.tuples(st.just("f"), st.integers(0, 3), st.integers(0, 3), st.integers(1, 2)), max_size=6
)


def test_without_a_target_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(targets.NAMES)
    assert all(len(line.split()) > 5 for line in lines)


@pytest.mark.parametrize("arguments", [["nothing"], ["trace", "--time", "0"], ["trace", "--time", "x"]])
def test_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2


def test_without_atheris(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert command.main(["trace"]) == 3
    assert "pip install 'atheris" in capsys.readouterr().err


def test_replay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(campaign.found("trace") / "cause-that-is-none")
    assert command.main(["trace", "--replay", file]) == 0
    assert command.main(["trace", "--replay", f"{file}-not"]) == 2
    monkeypatch.setattr("balloonlab.decode._check_names", lambda _value: None)
    assert command.main(["trace", "--replay", file]) == 1
    assert "3 is not a valid Cause" in capsys.readouterr().out


def test_figures() -> None:
    assert campaign._figures(LOG) == (11843, 434, 1540, 170, 12 << 10)
    assert campaign._figures("") == (0, 0, 0, 0, 0)
    assert "pages that the chain does not name" in campaign._interesting(LOG)


@given(st.dictionaries(st.binary(max_size=9), STEPS, max_size=12))
def test_a_choice_covers_all(covered: dict[bytes, frozenset[distil.Step]]) -> None:
    chosen = distil.choose(covered)
    everything = frozenset().union(*covered.values())
    assert frozenset().union(*(covered[data] for data in chosen)) == everything
    for place, data in enumerate(chosen):
        assert covered[data] - frozenset().union(*(covered[each] for each in chosen[:place]))


@given(st.dictionaries(st.binary(max_size=9), STEPS, max_size=12), st.integers(0, 4), st.integers(0, 20))
def test_a_choice_has_room(covered: dict[bytes, frozenset[distil.Step]], files: int, size: int) -> None:
    chosen = distil.choose(covered, files, size)
    assert len(chosen) <= files
    assert sum(map(len, chosen)) <= size


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    for inputs in ([b"one", b"two"], [b"two", b"three"]):
        distil.replace(tmp_path / "corpus", inputs)
        assert sorted(file.read_bytes() for file in campaign.files(tmp_path / "corpus")) == sorted(inputs)


# With atheris


@pytest.fixture
def atheris(unmet: Callable[[str], None]) -> None:
    if importlib.util.find_spec("atheris") is None:
        unmet("atheris is not installed: pip install 'atheris>=3,<4'")


@pytest.mark.usefixtures("atheris")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    words = [sys.executable, "-m", "tests.fuzz", "trace", "--time", "60", "--work", str(tmp_path)]
    log = tmp_path / "trace" / "fuzz.log"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + START_SECONDS
        while not log.exists() or "INITED" not in log.read_text(errors="replace"):
            assert time.monotonic() < end, "the fuzzer does not start"
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert len(children) == 1
    assert not os.path.exists(f"/proc/{children[0]}")  # noqa: PTH110


@pytest.mark.usefixtures("atheris")
def test_a_finding_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More memory than is allowed is one: here no input has any."""
    figures = tmp_path / "figures.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "MEMORY_MIB", 1)
        status = command.main(["trace", "--time", "20", "--work", str(tmp_path), "--json", str(figures)])
    assert status == 1
    (target,) = json.loads(figures.read_text())["targets"]
    assert target["target"] == "trace"
    assert target["status"] != 0
    assert "out-of-memory" in capsys.readouterr().out


def test_jobs_of_one_folder_each() -> None:
    words = campaign._command(Job("trace", 5, Path("/nowhere"), 7))
    assert {"-max_total_time=5", "-seed=7", "-artifact_prefix=/nowhere/found/"} <= {*words}
