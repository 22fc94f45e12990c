"""What a person types wrongly: one line that names the cause and the fix, status 2, and nothing made or fetched."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from balloonlab import cli, setup, signals
from balloonlab.errors import EXPECTED, UsageError, exit_status
from balloonlab.setup import GuestOptions
from guest_images.errors import ImageError
from hostdev.errors import SetupError, UnsupportedHostError
from qmp_glue.errors import QemuNotFoundError, QmpGlueError

DEADLINE_SECONDS = 60.0


@pytest.fixture(autouse=True)
def nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Usage is judged before anything is looked for or downloaded."""

    def find_qemu(**_options: object) -> None:
        raise AssertionError("a QEMU was looked for although the command line is wrong")

    monkeypatch.setattr(setup, "find_qemu", find_qemu)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    try:
        return cli.main(words)
    except SystemExit as end:
        return int(str(end.code))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["inflate"], "invalid choice: 'inflate'"),
        (
            ["demo", "--colour"],
            "balloonlab demo: unrecognized arguments: --colour (see balloonlab demo --help)",
        ),
        (["demo", "extra"], "unrecognized arguments: extra"),
        (["demo", "--suite", "sid"], "invalid choice: 'sid' (choose from "),
        (["demo", "--memory", "lots"], "'lots' is no size: write it like 600M or 1.5G"),
        (["demo", "--memory", "1K"], "--memory 1.0 KiB is too little: give the guest 128M or more"),
        (["demo", "--memory", "-1G"], "expected one argument"),
        (["demo", "--fill", "600Q"], "'600Q' is no size: write it like 600M or 1.5G"),
        (["demo", "--fill", "0"], "--fill 0: give more than nothing and less than --memory 1G"),
        (["demo", "--fill", "1G"], "--fill 1G: give more than nothing and less than --memory 1G"),
        (["demo", "--cpus", "0"], "--cpus 0: give one or more"),
        (["demo", "--cpus", "two"], "invalid int value: 'two'"),
        (["demo", "--kernel", "vmlinuz"], "--kernel and --modules go together"),
        (["demo", "--modules", "6.12.1"], "--kernel and --modules go together"),
        (["demo", "--discard", "burn"], "invalid choice: 'burn'"),
        (["demo", "--kind", "swap"], "invalid choice: 'swap'"),
        (["demo", "--hold", "long"], "invalid float value: 'long'"),
        (["fidelity", "--fill", "2G"], "--fill 2G: give more than nothing and less than --memory 1G"),
        (["fidelity", "--kind", "swap"], "invalid choice: 'swap'"),
        (["fidelity", "--suite", "sid"], "invalid choice: 'sid' (choose from "),
        (["env", "--cpus", "0"], "--cpus 0: give one or more"),
        (["env", "--kernel", "vmlinuz"], "--kernel and --modules go together"),
        (["doctor", "--fix"], "unrecognized arguments: --fix"),
        (["check"], "check needs a command line or --qmp PATH: balloonlab check -- qemu-system-x86_64"),
        (["check", "--qmp", "q", "--", "qemu"], "check needs a command line or --qmp PATH"),
        (
            ["check", "--qmp", "nowhere"],
            "no QMP at nowhere (No such file or directory): name the socket of -qmp",
        ),
        (["attach"], "the following arguments are required: --qmp, --socket-path"),
        (
            ["attach", "--qmp", "nowhere", "--socket-path", "s"],
            "no QMP at nowhere (No such file or directory)",
        ),
        (["attach", "--qmp", "q", "--socket-path", "s", "--inhibit-if-unsafe"], "needs --control"),
        (["detach", "--qmp", "x" * 200], "(AF_UNIX path too long)"),
        (["detach", "--qmp", "q", "--timeout", "long"], "invalid float value: 'long'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    output, error = capsys.readouterr()
    assert said in error
    assert error.startswith("balloonlab")
    assert error.count("\n") == 1
    assert output == ""
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_holds_something_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").touch()
    assert run("demo", "--out", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert (
        error
        == f"balloonlab: --out {tmp_path} is not empty: nothing in it is overwritten, name another folder\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_a_qemu_no_run_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_qemu(**_options: object) -> None:
        raise QemuNotFoundError("there is none: install one")

    monkeypatch.setattr(setup, "find_qemu", find_qemu)
    assert run("demo") == 3
    assert capsys.readouterr().err == "balloonlab: there is none: install one\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_during_the_set_up_is_one_line(
    number: signal.Signals,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def find_qemu(**_options: object) -> None:
        try:
            signal.raise_signal(number)
        finally:
            for impatient in signals.ENDING:
                signal.raise_signal(impatient)

    monkeypatch.setattr(setup, "find_qemu", find_qemu)
    assert run("demo") == status
    assert capsys.readouterr().err == f"balloonlab: {said}, everything that was started has ended\n"


def test_the_handlers_of_before_are_put_back() -> None:
    before = [signal.getsignal(number) for number in signals.ENDING]
    run("demo", "--cpus", "0")
    assert [signal.getsignal(number) for number in signals.ENDING] == before


@pytest.mark.parametrize("number", signals.ENDING)
def test_a_signal_cancels_what_runs_on_asyncio_and_lets_it_clean_up(number: signal.Signals) -> None:
    steps = []

    async def work() -> None:
        try:
            signal.raise_signal(number)
            await asyncio.sleep(DEADLINE_SECONDS)
        finally:
            for impatient in signals.ENDING:
                signal.raise_signal(impatient)
                await asyncio.sleep(0)
            steps.append("cleaned up")

    with pytest.raises(signals.SignalledError) as caught:
        signals.run(work())
    assert (caught.value.number, steps) == (number, ["cleaned up"])


@pytest.mark.parametrize("error", [None, UsageError("QEMU has ended"), ZeroDivisionError()], ids=type)
def test_a_signal_is_what_ended_work_that_comes_to_another_end_meanwhile(error: Exception | None) -> None:
    """A defect stays one."""

    async def work() -> None:
        signal.raise_signal(signal.SIGINT)
        if error is not None:
            raise error

    with pytest.raises(type(error) if isinstance(error, ZeroDivisionError) else signals.SignalledError):
        signals.run(work())


def test_after_a_signal_on_asyncio_further_ones_are_ignored_to_the_end() -> None:
    async def work() -> None:
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(DEADLINE_SECONDS)

    def both() -> None:
        with signals.first_only(signals.unwind):
            signals.run(work())

    with pytest.raises(signals.SignalledError):
        both()
    assert [signal.getsignal(each) for each in signals.ENDING] == [signal.SIG_IGN, signal.SIG_IGN]


def test_work_that_nobody_ends_returns_and_a_cancellation_of_its_own_stays_one() -> None:
    async def work(*, cancelled: bool) -> str:
        if cancelled:
            raise asyncio.CancelledError
        return "done"

    assert signals.run(work(cancelled=False)) == "done"
    with pytest.raises(asyncio.CancelledError):
        signals.run(work(cancelled=True))


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_qemu(**_options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(setup, "find_qemu", find_qemu)
    with pytest.raises(ZeroDivisionError):
        run("demo")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError(""), 2),
        (ImageError(""), 2),
        (QmpGlueError(""), 2),
        (QemuNotFoundError(""), 3),
        (SetupError(""), 2),
        (UnsupportedHostError(""), 3),
    ],
)
def test_every_package_decides_its_own_status(error: Exception, status: int) -> None:
    assert isinstance(error, EXPECTED)
    assert exit_status(error) == status


def test_guest_options_are_checked_whoever_makes_them() -> None:
    assert GuestOptions(memory_bytes=setup.MIN_MEMORY).cpus == 1
    with pytest.raises(UsageError, match="choose one of bookworm, "):
        GuestOptions(suite="sid")


def test_a_command_line_that_suits_the_device_is_approved(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["qemu", "-M", "q35,memory-backend=m", "-m", "1G", "-object"]
    assert run("check", "--", *argv, "memory-backend-memfd,id=m,size=1G,share=on") == 0
    assert capsys.readouterr().out == "nothing in it stands in the way of giving memory back\n"
    assert run("check", "--", *argv, "memory-backend-memfd,id=m,size=2G,share=off") == 1
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["error", "error"]


def test_as_a_program_of_its_own() -> None:
    """The whole way, in a process: the line, the status, no traceback."""
    ended = subprocess.run(
        [sys.executable, "-m", "balloonlab.cli", "demo", "--memory", "1K"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "balloonlab: --memory 1.0 KiB is too little: give the guest 128M or more\n"
