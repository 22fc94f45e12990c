"""The host's side against a scripted peer: garbage, silence, death, answers out of order."""

from __future__ import annotations

import asyncio
import binascii
import json
import socket
import zlib
from typing import TYPE_CHECKING

import pytest

from guest_images.agent_client import MAX_GARBAGE, MAX_LINE, AgentClient, unpack_page_flags
from guest_images.errors import AgentGarbageError, AgentGoneError, AgentRefusedError, AgentTimeoutError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    Work = Callable[[AgentClient], Awaitable[None]]


def against(peer: Peer, work: Work) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=theirs)
        async with asyncio.timeout(30), AgentClient(ours) as client:
            playing = asyncio.ensure_future(peer(reader, writer))
            await work(client)
            playing.cancel()
            await asyncio.wait([playing])
        writer.close()
        await writer.wait_closed()

    asyncio.run(main())


async def requests(reader: asyncio.StreamReader, count: int) -> list[int]:
    """Return the numbers of the next requests; the client begins with an empty line."""
    numbers: list[int] = []
    while len(numbers) < count:
        line = await reader.readline()
        numbers += [json.loads(line)["id"]] if line.strip() else []
    return numbers


def test_answers_may_come_in_any_order() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for place, number in reversed(list(enumerate(await requests(reader, 3)))):
            writer.write(json.dumps({"id": number, "result": {"MemFree": place}}).encode() + b"\n")

    async def work(client: AgentClient) -> None:
        answers = await asyncio.gather(*(client.meminfo() for _ in range(3)))
        assert [answer["MemFree"] for answer in answers] == [0, 1, 2]

    against(peer, work)


def test_silence_ends_at_the_deadline_and_a_late_answer_is_dropped() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        late, second = await requests(reader, 2)
        writer.write(json.dumps({"id": late, "result": 1}).encode() + b"\n")
        writer.write(json.dumps({"id": second, "result": "second"}).encode() + b"\n")

    async def work(client: AgentClient) -> None:
        with pytest.raises(AgentTimeoutError, match=r"'read' within 0\.05 s"):
            await client.read("/x", deadline=0.05)
        assert await client.read("/y") == "second"

    against(peer, work)


def test_the_peers_end_fails_all_calls_under_way_and_later_ones() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await requests(reader, 2)
        writer.close()

    async def work(client: AgentClient) -> None:
        ended = await asyncio.gather(client.meminfo(), client.ping(), return_exceptions=True)
        assert [type(error) for error in ended] == [AgentGoneError, AgentGoneError]
        with pytest.raises(AgentGoneError, match="died or powered off"):
            await client.meminfo()
        with pytest.raises(AgentGoneError):
            await client.hello()
        assert client.is_gone

    against(peer, work)


@pytest.mark.parametrize("count", [MAX_GARBAGE, MAX_GARBAGE + 1])
def test_garbage_is_tolerated_up_to_its_bound(count: int) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (number,) = await requests(reader, 1)
        writer.write(b"[   1.0] \xff a console line\n" * count)
        writer.write(json.dumps({"id": number, "result": "fine"}).encode() + b"\n")

    async def work(client: AgentClient) -> None:
        if count <= MAX_GARBAGE:
            assert await client.read("/x") == "fine"
        else:
            with pytest.raises(AgentGarbageError, match="no answers"):
                await client.read("/x")
            assert not client.is_gone

    against(peer, work)


def test_an_endless_line_is_garbage() -> None:
    async def peer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(MAX_LINE // 65536 + 2):
            writer.write(b"x" * 65536)
            await writer.drain()

    async def work(client: AgentClient) -> None:
        with pytest.raises(AgentGarbageError, match="exceeds"):
            await client.read("/x")

    against(peer, work)


def test_refusals_and_malformed_results_are_typed() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, second = await requests(reader, 2)
        writer.write(json.dumps({"id": first, "error": "no room"}).encode() + b"\n")
        writer.write(json.dumps({"id": second, "result": ["not", "meminfo"]}).encode() + b"\n")

    async def work(client: AgentClient) -> None:
        refused, malformed = await asyncio.gather(client.ping(), client.meminfo(), return_exceptions=True)
        assert isinstance(refused, AgentRefusedError)
        assert "no room" in str(refused)
        assert isinstance(malformed, AgentGarbageError)

    against(peer, work)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("no base64", 1),
        (binascii.b2a_base64(b"no deflate").decode(), 1),
        (binascii.b2a_base64(zlib.compress(bytes(16))).decode(), 1),
        (binascii.b2a_base64(zlib.compress(bytes(16))).decode(), 3),
        (binascii.b2a_base64(zlib.compress(bytes(12))).decode(), 2),
        (binascii.b2a_base64(zlib.compress(bytes(1 << 24))).decode(), 8),
    ],
    ids=["no base64", "no deflate", "too many", "too few", "half a page", "a bomb"],
)
def test_page_flags_that_are_none_are_garbage(text: str, count: int) -> None:
    with pytest.raises(AgentGarbageError, match="rebuild the guest"):
        unpack_page_flags(text, count)


def test_no_agent_is_a_timeout() -> None:
    async def peer(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        return

    async def work(client: AgentClient) -> None:
        with pytest.raises(AgentTimeoutError, match="the agent did not answer"):
            await client.hello(deadline=0.05)

    against(peer, work)


def test_a_path_that_nobody_listens_on_is_gone(tmp_path: Path) -> None:
    async def main() -> None:
        async with AgentClient(tmp_path / "agent"):
            pass

    with pytest.raises(AgentGoneError, match="cannot connect"):
        asyncio.run(main())


@pytest.mark.parametrize(
    "result",
    [b'{"MemFree": 1' + b"0" * 400 + b"}", b'{"MemFree": "\xff"}', b'{"\xff": 1}', b"[]", b"1e999"],
)  # fmt: skip
def test_an_answer_that_cannot_be_is_garbage(result: bytes) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (number,) = await requests(reader, 1)
        writer.write(b'{"id": %d, "result": %s}\n' % (number, result))

    async def work(client: AgentClient) -> None:
        with pytest.raises(AgentGarbageError, match="the answer to 'meminfo' is malformed"):
            await client.meminfo()

    against(peer, work)


@pytest.mark.parametrize("handle", [1 << 63, -(1 << 63) - 1, 10**400])
def test_a_handle_that_cannot_be_sent_back_is_garbage(handle: int) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (number,) = await requests(reader, 1)
        result = {"handle": handle, "bytes": 1, "seconds": 0.1}
        writer.write(json.dumps({"id": number, "result": result}).encode() + b"\n")

    async def work(client: AgentClient) -> None:
        with pytest.raises(AgentGarbageError, match="the answer to 'fill' is malformed"):
            await client.fill("tmpfs", 1)

    against(peer, work)


def test_brackets_without_end_are_a_line_of_garbage() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (number,) = await requests(reader, 1)
        writer.write(b'{"id": %d, "result": %s%s}\n' % (number, b"[" * 100_000, b"]" * 100_000))
        writer.write(b'{"id": %d, "result": {"MemFree": 1}}\n' % number)

    async def work(client: AgentClient) -> None:
        assert await client.meminfo() == {"MemFree": 1}

    against(peer, work)
