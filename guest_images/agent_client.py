"""The host's side of the agent: calls over one connected socket, several in flight, each with a deadline.

It is the counterpart of `guest_images.agent` and knows nothing of QEMU: whoever starts the guest hands over the socket
behind its virtio-serial port. `balloonlab` and tests use it:

    client = AgentClient(host_end)
    await client.hello(deadline=60)
    before = await client.meminfo()
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import secrets
import socket
import sys
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import msgspec

from guest_images.errors import (
    AgentError,
    AgentGarbageError,
    AgentGoneError,
    AgentRefusedError,
    AgentTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

# One answer: two streams of agent.MAX_OUTPUT bytes, each byte escaped to six characters at worst, and some framing.
MAX_LINE = 4 << 20
# Numbers start at random below this: far from each other, and exact in any JSON reader (2**53).
ID_START = 1 << 48
# Lines that are no answer of ours: a guest that is reset may cut one, a console misdirected here sends thousands.
MAX_GARBAGE = 64
# An answer to a quick call comes within milliseconds; an emulated guest on a busy machine has been seen to need 2 s.
CALL_DEADLINE_S = 15.0
# A guest's boot under TCG takes 4 to 8 s on an idle machine.
HELLO_DEADLINE_S = 120.0
# A fill writes some 500 MB/s under TCG; on a machine that is ten times slower 8 GiB still end in time.
FILL_DEADLINE_S = 180.0
RUN_DEADLINE_S = 60.0
# Flags of 512 MiB's page frames take an emulated guest half a second.
PAGE_FLAGS_DEADLINE_S = 60.0

Answer = TypeVar("Answer")
# What decoding raises, for a guest may send anything: brackets in brackets without end as well.
_NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# A guest that writes longer numbers is broken: nobody can reckon with them.
Number = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
FillKind = Literal["anonymous", "tmpfs"]


@dataclass(frozen=True)
class Hello:
    """Who answers: the guest's kernel and Python, the protocol's version, the guest's uptime in seconds."""

    kernel: str
    python: str
    protocol: int
    uptime: float


@dataclass(frozen=True)
class Ran:
    """A command's end: `status` is its exit status, negative for a signal. Texts are cut at agent.MAX_OUTPUT bytes."""

    status: Number
    stdout: str
    stderr: str
    truncated: bool


@dataclass(frozen=True)
class Filled:
    """Memory that the guest holds: its handle, its size in bytes, the seconds it took to write."""

    handle: Number
    bytes: Number
    seconds: float


@dataclass(frozen=True)
class Checked:
    """A comparison of held memory with what was written: `first_mismatch` is a byte offset, None where all is well."""

    bytes: Number
    mismatched_pages: Number
    first_mismatch: Number | None


@dataclass(frozen=True)
class _PageFlags:
    """Flags of page frames as they travel: deflated, in base64."""

    count: Number
    flags: str


class _Line(msgspec.Struct):
    """What the agent sends: an answer, or its greeting."""

    id: int | None = None
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str | None = None
    hello: str | None = None


def unpack_page_flags(text: str, count: int) -> array[int]:
    """Return the flags of count page frames out of an answer. Raises AgentGarbageError if it has not so many."""
    flags = array("Q")
    try:
        unpacker = zlib.decompressobj()
        flags.frombytes(unpacker.decompress(binascii.a2b_base64(text), count * flags.itemsize + 1))
    except (ValueError, zlib.error) as error:  # binascii.Error is a ValueError
        raise AgentGarbageError(f"page flags are malformed ({error}): rebuild the guest") from error
    if len(flags) != count:
        raise AgentGarbageError(f"flags of {len(flags)} pages where {count} were said: rebuild the guest")
    if sys.byteorder == "big":
        flags.byteswap()
    return flags


class AgentClient:
    """Calls to one guest's agent. Errors: AgentRefusedError, AgentTimeoutError, AgentGoneError, AgentGarbageError."""

    def __init__(self, channel: socket.socket | Path) -> None:
        """Take a connected socket, which then belongs to the client, or the path of one that QEMU listens on."""
        self._channel = channel
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._end: AgentError | None = None
        # Answers to an earlier client, and handles it left, must not be taken for this one's.
        self._last_id = secrets.randbelow(ID_START)

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> None:
        """Begin to read. Called by the first call if it was not before. Raises AgentGoneError."""
        if self._reading is not None:
            return
        try:
            if isinstance(self._channel, socket.socket):
                streams = await asyncio.open_connection(sock=self._channel, limit=MAX_LINE)
            else:
                streams = await asyncio.open_unix_connection(self._channel, limit=MAX_LINE)
        except OSError as error:
            raise AgentGoneError(
                f"cannot connect to the agent's port ({error}): start the guest first"
            ) from error
        self._writer = streams[1]
        self._reading = asyncio.create_task(self._read(streams[0]))
        # Ends what an earlier client may have left half-written in the port.
        self._writer.write(b"\n")

    @property
    def is_gone(self) -> bool:
        """Whether the connection is closed, by us or at its other end: QEMU's, for a guest cannot close it."""
        return isinstance(self._end, AgentGoneError)

    async def close(self) -> None:
        """Close the connection; calls under way fail with AgentGoneError."""
        if self._reading is None or self._writer is None:
            if isinstance(self._channel, socket.socket):
                self._channel.close()
            return
        self._reading.cancel()
        await asyncio.wait([self._reading])
        self._fail(AgentGoneError("the connection to the agent was closed on this side: make a new client"))
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    # --- reading ---

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Deliver answers until the connection ends; then fail what is still waiting."""
        try:
            self._fail(await self._deliver_all(reader))
        except ValueError:  # readline's, for a line beyond its limit
            self._fail(
                AgentGarbageError(f"a line on the agent's port exceeds {MAX_LINE} bytes: is it a console?")
            )
        except OSError as error:
            self._fail(AgentGoneError(f"the agent's port broke ({error}): QEMU died, see what it wrote"))

    async def _deliver_all(self, reader: asyncio.StreamReader) -> AgentError:
        """Deliver lines; return why there are no more."""
        garbage = 0
        while line := await reader.readline():
            garbage += not self._deliver(line)
            if garbage > MAX_GARBAGE:
                return AgentGarbageError(
                    f"{garbage} lines on the agent's port are no answers: {line[:80]!r}: is it a console?"
                )
        return AgentGoneError("the guest closed the agent's port: it died or powered off, see its console")

    def _deliver(self, text: bytes) -> bool:
        """Hand one line on; return whether it was the agent's."""
        try:
            line = msgspec.json.decode(text, type=_Line)
        except _NO_JSON:
            return False
        if line.hello is not None:
            return True
        waiting = self._waiting.pop(line.id, None) if line.id is not None else None
        if waiting is None or waiting.done():
            # The answer to a call that was given up, or to another client's before a reconnection.
            return line.id is not None
        if line.error is not None:
            waiting.set_exception(AgentRefusedError(f"the agent refused: {line.error}"))
        else:
            waiting.set_result(line.result)
        return True

    def _fail(self, error: AgentError) -> None:
        self._end = self._end or error
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)
        self._waiting.clear()

    # --- calling ---

    async def call(self, name: str, *, deadline: float = CALL_DEADLINE_S, **arguments: object) -> object:
        """Make one call and return its result as plain Python values; `deadline` is in seconds."""
        return await self._call(name, object, deadline, arguments)

    async def _call(
        self, name: str, kind: type[Answer], deadline: float, arguments: dict[str, object]
    ) -> Answer:
        await self.connect()
        if self._end is not None:
            raise self._end
        self._last_id += 1
        number = self._last_id
        answer = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(deadline):
                await self._send({"id": number, "call": name, **arguments})
                raw = await answer
            return msgspec.json.decode(raw, type=kind)
        except TimeoutError as error:
            text = (
                f"no answer to {name!r} within {deadline} s: raise the deadline, or see the guest's console"
            )
            raise AgentTimeoutError(text) from error
        except _NO_JSON as error:
            raise AgentGarbageError(
                f"the answer to {name!r} is malformed ({error}): rebuild the guest"
            ) from error
        finally:
            self._waiting.pop(number, None)

    async def _send(self, request: dict[str, object]) -> None:
        assert self._writer is not None  # connect() has returned
        try:
            self._writer.write(msgspec.json.encode(request) + b"\n")
            await self._writer.drain()
        except OSError as error:
            raise AgentGoneError(f"the agent's port broke ({error}): QEMU died, see what it wrote") from error

    async def hello(self, *, deadline: float = HELLO_DEADLINE_S) -> Hello:
        """Wait until the agent answers and return who it is.

        It asks rather than waits for the greeting: QEMU keeps the question until the guest opens the port, and a guest
        does not notice a host that reconnects quickly, so it would not greet again.
        """
        try:
            return await self.ping(deadline=deadline)
        except AgentTimeoutError as error:
            text = (
                f"the agent did not answer within {deadline} s: see the guest's console for what init reports"
            )
            raise AgentTimeoutError(text) from error

    async def ping(self, *, deadline: float = CALL_DEADLINE_S) -> Hello:
        """Return who answers."""
        return await self._call("ping", Hello, deadline, {})

    async def meminfo(self, *, deadline: float = CALL_DEADLINE_S) -> dict[str, int]:
        """Return the guest's /proc/meminfo, sizes in bytes."""
        return await self._call("meminfo", dict[str, Number], deadline, {})

    async def buddyinfo(self, *, deadline: float = CALL_DEADLINE_S) -> dict[str, list[int]]:
        """Return the free blocks by order of each "node/zone"."""
        return await self._call("buddyinfo", dict[str, list[Number]], deadline, {})

    async def read(self, path: str, *, deadline: float = CALL_DEADLINE_S) -> str:
        """Return the first agent.MAX_OUTPUT bytes of a /proc or /sys file."""
        return await self._call("read", str, deadline, {"path": path})

    async def write(self, path: str, text: str, *, deadline: float = CALL_DEADLINE_S) -> None:
        """Write a /proc or /sys file."""
        await self._call("write", object, deadline, {"path": path, "text": text})

    async def page_flags(
        self, first: int, count: int, *, deadline: float = PAGE_FLAGS_DEADLINE_S
    ) -> array[int]:
        """Return what /proc/kpageflags says of count page frames from number first on; fewer where that file ends.

        The bits are those of Linux' uapi/linux/kernel-page-flags.h. count: agent.MAX_PAGE_FLAGS at most.
        """
        packed = await self._call("page_flags", _PageFlags, deadline, {"first": first, "count": count})
        return unpack_page_flags(packed.flags, packed.count)

    async def run(self, command: str | Sequence[str], *, deadline: float = RUN_DEADLINE_S) -> Ran:
        """Run a shell line, or a program with its arguments; the agent kills it at the deadline."""
        words: dict[str, object] = {"line": command} if isinstance(command, str) else {"argv": list(command)}
        return await self._call("run", Ran, deadline + CALL_DEADLINE_S, {**words, "deadline": deadline})

    async def fill(
        self, kind: FillKind, size: int, *, seed: int = 0, deadline: float = FILL_DEADLINE_S
    ) -> Filled:
        """Have the guest hold `size` bytes that do not compress; a guest without room refuses."""
        return await self._call("fill", Filled, deadline, {"kind": kind, "bytes": size, "seed": seed})

    async def checksum(self, handle: int, *, deadline: float = FILL_DEADLINE_S) -> Checked:
        """Compare every byte that a fill holds with what it wrote."""
        return await self._call("checksum", Checked, deadline, {"handle": handle})

    async def free(self, handle: int, *, deadline: float = FILL_DEADLINE_S) -> None:
        """Give a fill's memory back to the guest's page allocator; it is free when this returns."""
        await self._call("free", object, deadline, {"handle": handle})

    async def drop_caches(self, *, deadline: float = RUN_DEADLINE_S) -> None:
        """Have the guest drop its page cache, dentries and inodes."""
        await self._call("drop_caches", object, deadline, {})

    async def dmesg(self, *, deadline: float = RUN_DEADLINE_S) -> str:
        """Return the guest's kernel log, its first agent.MAX_OUTPUT bytes."""
        return await self._call("dmesg", str, deadline, {})

    async def reboot(self, *, deadline: float = CALL_DEADLINE_S) -> None:
        """Have the guest reset the machine; where that is no reason for QEMU to end, the agent comes again.

        Ask it anything only after QEMU's event RESET: until then the question may go to the agent that ends.
        """
        await self._call("reboot", object, deadline, {})

    async def poweroff(self, *, deadline: float = CALL_DEADLINE_S) -> None:
        """Have the guest power off; QEMU then ends by itself."""
        await self._call("poweroff", object, deadline, {})
