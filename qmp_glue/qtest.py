"""QEMU's qtest protocol: a guest's reads and writes of ports and memory, made from outside, with no guest.

Text lines over a socket, one answer to each command (system/qtest.c). It is synchronous, because what a CPU does next
depends on what it read. It knows no devices (virtio_pci.py does) and starts no process: a machine with
``accelerator="qtest"`` and ``qtest=`` set to one end of a socket pair is what it speaks to. Tests and benches use it.

    ours, theirs = socket.socketpair()
    machine = Machine(64 << 20, accelerator="qtest", qtest=theirs.fileno())
    ... start it, close theirs ...
    Qtest(ours).outl(0xCF8, 0x80000000)
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from qmp_glue.errors import DeadlineError, QtestError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["ANSWER_SECONDS", "Qtest"]

# A command takes some 10 us; a config read waits for the device behind it, which may be starting.
ANSWER_SECONDS = 10.0
# QEMU builds the whole line in memory, at two hexadecimal digits a byte: longer transfers are cut.
MAX_TRANSFER_BYTES = 1 << 20
RECEIVE_BYTES = 1 << 16


class Qtest:
    """One qtest connection, which it owns.

    Every method raises QtestError when QEMU refuses the command or has closed, and DeadlineError when it does not answer
    within ``seconds``. After a DeadlineError the connection is closed: a late answer would be taken for the next one.
    """

    def __init__(self, connection: socket.socket, *, seconds: float = ANSWER_SECONDS) -> None:
        self._connection = connection
        self._seconds = seconds
        self._received = b""

    def command(self, line: str) -> list[str]:
        """Send one line, return the words after OK."""
        end = time.monotonic() + self._seconds
        try:
            self._connection.settimeout(self._seconds)
            self._connection.sendall(line.encode("ascii") + b"\n")
            words = self._line(end).split()
        except TimeoutError as error:
            self.close()
            raise DeadlineError(
                f"QEMU did not answer the qtest command {line[:40]!r} in {self._seconds:g} s: does the device hang?"
            ) from error
        except OSError as error:
            raise QtestError(
                f"the qtest connection is closed ({error.strerror or error}): see what QEMU wrote last"
            ) from error
        if not words or words[0] != "OK":
            raise QtestError(
                f"QEMU refused the qtest command {line[:40]!r} ({' '.join(words)[:80]}): correct its arguments"
            )
        return words[1:]

    def _line(self, end: float) -> str:
        """Receive one line. What QEMU sends unasked (IRQ lines after an intercept) is never asked for here."""
        while b"\n" not in self._received:
            self._connection.settimeout(max(0.001, end - time.monotonic()))
            piece = self._connection.recv(RECEIVE_BYTES)
            if not piece:
                raise QtestError("QEMU closed the qtest connection: see what it wrote last")
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        return line.decode("ascii", errors="replace")

    def _value(self, line: str) -> int:
        words = self.command(line)
        try:
            return int(words[0], 0)
        except (IndexError, ValueError) as error:
            raise QtestError(f"QEMU's answer to {line!r} holds no number: {words}; is it qtest?") from error

    # Ports

    def inb(self, port: int) -> int:
        """Read 1 byte from an I/O port."""
        return self._value(f"inb {port:#x}")

    def inw(self, port: int) -> int:
        """Read 2 bytes from an I/O port."""
        return self._value(f"inw {port:#x}")

    def inl(self, port: int) -> int:
        """Read 4 bytes from an I/O port."""
        return self._value(f"inl {port:#x}")

    def outb(self, port: int, value: int) -> None:
        """Write 1 byte to an I/O port."""
        self.command(f"outb {port:#x} {value:#x}")

    def outw(self, port: int, value: int) -> None:
        """Write 2 bytes to an I/O port."""
        self.command(f"outw {port:#x} {value:#x}")

    def outl(self, port: int, value: int) -> None:
        """Write 4 bytes to an I/O port."""
        self.command(f"outl {port:#x} {value:#x}")

    # Memory: a value is one access of that width, which is what a device register needs

    def readb(self, address: int) -> int:
        """Read 1 byte at a guest physical address."""
        return self._value(f"readb {address:#x}")

    def readw(self, address: int) -> int:
        """Read 2 bytes at a guest physical address."""
        return self._value(f"readw {address:#x}")

    def readl(self, address: int) -> int:
        """Read 4 bytes at a guest physical address."""
        return self._value(f"readl {address:#x}")

    def readq(self, address: int) -> int:
        """Read 8 bytes at a guest physical address."""
        return self._value(f"readq {address:#x}")

    def writeb(self, address: int, value: int) -> None:
        """Write 1 byte at a guest physical address."""
        self.command(f"writeb {address:#x} {value:#x}")

    def writew(self, address: int, value: int) -> None:
        """Write 2 bytes at a guest physical address."""
        self.command(f"writew {address:#x} {value:#x}")

    def writel(self, address: int, value: int) -> None:
        """Write 4 bytes at a guest physical address."""
        self.command(f"writel {address:#x} {value:#x}")

    def writeq(self, address: int, value: int) -> None:
        """Write 8 bytes at a guest physical address."""
        self.command(f"writeq {address:#x} {value:#x}")

    def read(self, address: int, length: int) -> bytes:
        """Read guest memory, as a guest does: through the mapping, so a hole read becomes resident."""
        data = b""
        for at in range(0, length, MAX_TRANSFER_BYTES):
            size = min(MAX_TRANSFER_BYTES, length - at)
            (digits,) = self.command(f"read {address + at:#x} {size:#x}")
            data += bytes.fromhex(digits.removeprefix("0x"))
        return data

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory."""
        for at in range(0, len(data), MAX_TRANSFER_BYTES):
            piece = data[at : at + MAX_TRANSFER_BYTES]
            self.command(f"write {address + at:#x} {len(piece):#x} 0x{piece.hex()}")

    def memset(self, address: int, length: int, value: int) -> None:
        """Fill guest memory with one byte: how many pages are made resident fast. QEMU holds length bytes meanwhile."""
        if length:
            self.command(f"memset {address:#x} {length:#x} {value:#x}")

    # Time

    def clock_step(self, nanoseconds: int | None = None) -> int:
        """Let the guest's clock run on, by so much or to the next timer. Returns its new time in ns.

        With this accelerator the clock stands still otherwise.
        """
        return self._value("clock_step" if nanoseconds is None else f"clock_step {nanoseconds}")

    def close(self) -> None:
        """Close the connection; QEMU goes on. Safe to call twice."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
