"""QEMU really says what tests/qmp_texts.py has, which is what our control socket is held to."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostdev.driver import DEADLINE
from qmp_glue.find import Qemu
from tests import qmp_texts


@pytest.fixture
def client(qemu: Qemu, tmp_path: Path) -> Iterator[socket.socket]:
    """A client of a QEMU without a machine, which has just been greeted."""
    path = tmp_path / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(DEADLINE)
        arguments = ["-M", "none", "-nodefaults", "-display", "none", "-accel", "qtest"]
        command = [*qemu.argv, *arguments, "-qmp", f"unix:{path}"]
        with subprocess.Popen(command, env={**os.environ, **qemu.env}) as process:
            try:
                client, _address = listener.accept()
                with client:
                    client.settimeout(DEADLINE)
                    assert b"QMP" in lines(client, 1)
                    yield client
            finally:
                process.kill()


def lines(client: socket.socket, count: int) -> bytes:
    data = b""
    while data.count(b"\n") < count:
        piece = client.recv(65536)
        assert piece, data
        data += piece
    return data


def compare(client: socket.socket, table: dict[bytes, list[qmp_texts.Reply]]) -> None:
    for sent, expected in table.items():
        client.sendall(sent)
        assert qmp_texts.replies(lines(client, len(expected))) == expected, sent


def test_qemu_says_so(client: socket.socket) -> None:
    compare(client, qmp_texts.BEFORE_NEGOTIATION)
    client.sendall(b'{"execute":"qmp_capabilities"}')
    assert qmp_texts.replies(lines(client, 1)) == [{"return": {}}]
    compare(client, qmp_texts.AFTER_NEGOTIATION)
    # Nothing but the expected answers was sent.
    client.sendall(b'{"execute":"query-version"}')
    (version,) = qmp_texts.replies(lines(client, 1))
    assert version["return"]["qemu"].keys() == {"major", "minor", "micro"}
