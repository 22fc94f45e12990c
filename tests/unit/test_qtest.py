"""The qtest client against a peer that answers in every wrong way: each is a typed error, none hangs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from qmp_glue.commandline import Machine, arguments, inherited_fds
from qmp_glue.errors import DeadlineError, QtestError
from qmp_glue.qtest import MAX_TRANSFER_BYTES, Qtest


class Peer:
    """Answers each line by a function, in a thread, until the other end is closed."""

    def __init__(self, answer: Callable[[str], bytes]) -> None:
        self.asked: list[str] = []
        self._ours, self.theirs = socket.socketpair()
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with self._ours, self._ours.makefile("r") as lines:
            for line in lines:
                self.asked.append(line.rstrip("\n"))
                self._ours.sendall(self._answer(self.asked[-1]))

    def ask(self, question: Callable[[Qtest], object], seconds: float = 10.0) -> object:
        try:
            with Qtest(self.theirs, seconds=seconds) as qtest:
                return question(qtest)
        finally:
            self._thread.join()


def test_lines_and_values() -> None:
    peer = Peer(lambda _line: b"OK 0x00000000000000ff\n")
    assert peer.ask(lambda qtest: [qtest.inl(0xCFC), qtest.readq(0x10), qtest.clock_step(5)]) == [255] * 3
    assert peer.asked == ["inl 0xcfc", "readq 0x10", "clock_step 5"]


def test_every_width() -> None:
    peer = Peer(lambda _line: b"OK 0x1\n")

    def ask(qtest: Qtest) -> None:
        for read in (qtest.inb, qtest.inw, qtest.inl, qtest.readb, qtest.readw, qtest.readl, qtest.readq):
            assert read(4) == 1
        for out in (qtest.outb, qtest.outw, qtest.outl):
            out(4, 2)
        for write in (qtest.writeb, qtest.writew, qtest.writel, qtest.writeq):
            write(4, 2)
        qtest.clock_step()

    peer.ask(ask)
    reads = [f"{name} 0x4" for name in ("inb", "inw", "inl", "readb", "readw", "readl", "readq")]
    writes = ["outb", "outw", "outl", "writeb", "writew", "writel", "writeq"]
    assert peer.asked == [*reads, *(f"{name} 0x4 0x2" for name in writes), "clock_step"]


def test_bytes_in_pieces() -> None:
    size = MAX_TRANSFER_BYTES + 2
    peer = Peer(
        lambda line: b"OK" + (b" 0x" + b"5a" * int(line.split()[2], 0) if "read" in line else b"") + b"\n"
    )

    def ask(qtest: Qtest) -> bytes:
        qtest.write(0x1000, b"\x01\x02")
        qtest.memset(0x2000, 3, 0xAA)
        qtest.memset(0x2000, 0, 0xAA)
        assert qtest.read(0x1000, 0) == b""
        return qtest.read(0x1000, size)

    assert peer.ask(ask) == b"\x5a" * size
    assert peer.asked[:2] == ["write 0x1000 0x2 0x0102", "memset 0x2000 0x3 0xaa"]
    assert peer.asked[2:] == [
        f"read 0x1000 {MAX_TRANSFER_BYTES:#x}",
        f"read {0x1000 + MAX_TRANSFER_BYTES:#x} 0x2",
    ]


@pytest.mark.parametrize("answer", [b"FAIL Unknown command\n", b"ERR no\n", b"\n", b"OK\n", b"OK nothing\n"])
def test_an_answer_that_is_none(answer: bytes) -> None:
    with pytest.raises(QtestError, match="readb 0x0"):
        Peer(lambda _line: answer).ask(lambda qtest: qtest.readb(0))


def test_a_peer_that_is_silent() -> None:
    with pytest.raises(DeadlineError, match=r"readb 0x0' in 0\.05 s"):
        Peer(lambda _line: b"OK").ask(lambda qtest: qtest.readb(0), seconds=0.05)


def test_a_peer_that_closes() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with Qtest(ours) as qtest, pytest.raises(QtestError, match="closed"):
        qtest.readb(0)
    with pytest.raises(QtestError, match="closed"):
        qtest.readb(0)


def test_its_place_on_the_command_line() -> None:
    machine = Machine(1 << 20, accelerator="qtest", qtest=9)
    words = arguments(machine)
    assert words[words.index("-qtest") + 1] == "chardev:qtest"
    assert "socket,id=qtest,fd=9" in words
    assert inherited_fds(machine) == (9,)
    assert "-qtest" not in arguments(Machine(1 << 20, accelerator="qtest"))
