"""How the device is told to be inhibited over its control socket, by a stand-in that speaks QMP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from balloonlab import attach
from balloonlab.errors import UsageError
from qmp_glue.errors import CommandFailedError, DeadlineError, MonitorClosedError
from qmp_glue.monitor import open_monitor

GREETING = {
    "QMP": {"version": {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": ""}, "capabilities": []}
}
DONE: dict[str, object] = {"return": {}}


def error(kind: str) -> dict[str, object]:
    return {"error": {"class": kind, "desc": "No balloon device has been activated"}}


class Control:
    """Answers qmp_capabilities, and then one answer for each command; the last one stays."""

    def __init__(self, *answers: dict[str, object]) -> None:
        self.answers = list(answers)
        self.commands: list[str] = []
        self.arguments: list[dict[str, object]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\n")
        decoder, text = json.JSONDecoder(), ""
        while data := await reader.read(4096):
            text += data.decode()
            while text.strip():
                asked, end = decoder.raw_decode(text.lstrip())
                text = text.lstrip()[end:]
                answer = DONE if asked["execute"] == "qmp_capabilities" else self.answer(asked)
                writer.write(
                    json.dumps(answer | {key: asked[key] for key in ("id",) if key in asked}).encode() + b"\n"
                )
        writer.close()

    def answer(self, asked: dict[str, Any]) -> dict[str, object]:
        self.commands.append(asked["execute"])
        self.arguments.append(asked.get("arguments", {}))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def inhibit(control: Control, path: Path) -> None:
    async def main() -> None:
        async with await asyncio.start_unix_server(control.serve, path), open_monitor(path) as device:
            await attach._inhibit(device, path.with_name("vm2.sock"))

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_front_end_that_is_not_known_yet_is_waited_for(tmp_path: Path) -> None:
    control = Control(error("DeviceNotActive"), error("DeviceNotActive"), DONE)
    inhibit(control, tmp_path / "control")
    assert control.commands == ["inhibit"] * 3


def test_one_that_never_comes_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "INHIBIT_SECONDS", 0.2)
    with pytest.raises(DeadlineError, match="is --control of this device"):
        inhibit(Control(error("DeviceNotActive")), tmp_path / "control")


def test_a_refusal_is_not_repeated(tmp_path: Path) -> None:
    control = Control(error("GenericError"))
    with pytest.raises(CommandFailedError, match="inhibit"):
        inhibit(control, tmp_path / "control")
    assert control.commands == ["inhibit", "query-guests"]


def test_several_guests(tmp_path: Path) -> None:
    """The one that is meant is the one whose front end connects at --socket-path."""
    inherited, first, second = (
        {"name": "vm0"},
        {"name": "vm1", "socket-path": str(tmp_path / "vm1.sock")},
        {"name": "vm2", "socket-path": str(tmp_path / "vm2.sock")},
    )
    guests: dict[str, object] = {"return": [inherited, first, second]}
    control = Control(error("GenericError"), guests, error("DeviceNotActive"), DONE)
    inhibit(control, tmp_path / "control")
    assert control.commands == ["inhibit", "query-guests", "inhibit", "inhibit"]
    assert control.arguments == [{}, {}, {"guest": "vm2"}, {"guest": "vm2"}]
    stranger = Control(error("GenericError"), {"return": [inherited, first]})
    with pytest.raises(UsageError, match=r"listens for no guest at .*vm2\.sock"):
        inhibit(stranger, tmp_path / "control")


def test_a_refusal_under_a_name_is_one(tmp_path: Path) -> None:
    guest = {"name": "vm2", "socket-path": str(tmp_path / "vm2.sock")}
    control = Control(error("GenericError"), {"return": [guest]}, error("GenericError"))
    with pytest.raises(CommandFailedError, match="inhibit"):
        inhibit(control, tmp_path / "control")
    assert control.commands == ["inhibit", "query-guests", "inhibit"]


def test_no_control_socket(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_monitor(tmp_path / "nowhere"):
            pytest.fail("there is nothing to talk to")

    with pytest.raises(MonitorClosedError, match="no QMP at"):
        asyncio.run(main())
