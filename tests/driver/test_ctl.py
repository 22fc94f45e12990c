"""balloonlab ctl beside several guests: what it asks, of whom, and what it prints.

The control process is real, the test is the keeper, and the workers answer when they are told to.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostdev.driver import DEADLINE
from hostdev.wire.control import Envelope, Kind
from tests.control_process import ANSWERS, GUEST, ControlProcess, FakeWorker, exchange, say

pytestmark = pytest.mark.usefixtures("nothing_is_left")

GUESTS = [
    {"name": "vm1", "socket-path": "/run/vm1", "connected": True, "worker": 7, "restarts": 1},
    {"name": "vm2", "socket-path": "/run/vm2", "connected": False, "restarts": 0},
]


@contextlib.contextmanager
def ctl(process: ControlProcess, *words: str, folder: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run it as a person does."""
    # By its file: python -m would find the package by the folder that it runs in.
    program = Path(__file__).parents[2] / "balloonlab" / "cli.py"
    argv = [sys.executable, "-P", str(program), "ctl", "--control", str(process.path), *words]
    environment = {"PYTHONPATH": str(program.parents[1])}
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe) as running:
        try:
            yield running
        finally:
            running.kill()


def said(running: subprocess.Popen[str], status: int = 0) -> str:
    """What it prints, if it ends with this status."""
    out, error = running.communicate(timeout=DEADLINE)
    assert running.returncode == status, error
    return out or error


def asked(process: ControlProcess) -> Envelope:
    """What the keeper is asked. A program starts in a second, or in some."""
    poll = select.poll()
    poll.register(process.keeper, select.POLLIN)
    assert poll.poll(DEADLINE * 1000), "the keeper is asked nothing"
    return exchange(process.keeper)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["set", "512M"], {"execute": "set-target", "arguments": {"size": 512 << 20}}),
        (["inhibit"], {"execute": "inhibit", "arguments": {}}),
        (["stats"], {"execute": "query-balloon-stats", "arguments": {"refresh": True}}),
        (["rings", "--json"], {"execute": "query-rings", "arguments": {}}),
    ],
)
def test_the_guest_that_is_named(
    process: ControlProcess, worker: FakeWorker, other: FakeWorker, words: list[str], command: dict[str, Any]
) -> None:
    with ctl(process, *words, "--guest", "vm2") as running:
        poll = select.poll()
        poll.register(other.channel, select.POLLIN)
        assert poll.poll(DEADLINE * 1000), "the worker is asked nothing"
        other.serve()
        text = said(running)
    assert other.commands == [command]
    assert not worker.is_asked()
    if "--json" in words:
        assert json.loads(text) == ANSWERS["query-rings"]


def test_no_guest_is_named(process: ControlProcess, other: FakeWorker) -> None:
    with ctl(process, "status") as running:
        assert f'"guest": "{GUEST}"' in said(running, status=2)
    with ctl(process, "status", "--guest", "vm3") as running:
        assert "Guest 'vm3' not found" in said(running, status=2)
    assert other.commands == []


@pytest.mark.parametrize("words", [["guests", "--guest", "vm1"], ["quit", "--guest", "vm1"], ["guest-add"]])
def test_what_is_about_no_guest(process: ControlProcess, words: list[str]) -> None:
    with ctl(process, *words) as running:
        assert "(see " in said(running, status=2)


@pytest.mark.parametrize("words", [["guests"], ["guests", "--json"]], ids=["for people", "for programs"])
def test_guests(process: ControlProcess, words: list[str]) -> None:
    with ctl(process, *words) as running:
        question = asked(process)
        assert question.kind == Kind.GUESTS
        say(process.keeper, Kind.RETURN, question.id, GUESTS)
        text = said(running)
    if "--json" in words:
        assert json.loads(text) == GUESTS
    else:
        assert text == "vm1  worker 7, restarts: 1  /run/vm1\nvm2  no front end           /run/vm2\n"


# What is typed, what the keeper is asked, and what is printed; {} is the folder that it is typed in.
CHANGES = {
    "guest-add vm3.sock": (Kind.ADD, "{}/vm3.sock", "a front end is waited for at {}/vm3.sock"),
    "guest-add /run/vm3": (Kind.ADD, "/run/vm3", "a front end is waited for at /run/vm3"),
    "guest-remove vm2": (Kind.REMOVE, "vm2", "vm2 is served no longer"),
    "upgrade": (Kind.UPGRADE, "", "the new version serves"),
}


@pytest.mark.parametrize("typed", CHANGES)
@pytest.mark.parametrize("granted", [True, False])
def test_changes(process: ControlProcess, tmp_path: Path, typed: str, granted: bool) -> None:
    kind, text, line = CHANGES[typed]
    with ctl(process, *typed.split(), folder=tmp_path) as running:
        question = asked(process)
        assert (question.kind, question.text.decode()) == (kind, text.format(tmp_path))
        if granted:
            say(process.keeper, Kind.RETURN, question.id, {})
            assert said(running) == line.format(tmp_path) + "\n"
        else:
            say(process.keeper, Kind.ERROR, question.id, {"class": "GenericError", "desc": "why not"})
            assert "why not" in said(running, status=2)
