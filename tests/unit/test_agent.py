"""The agent's own program, on this machine's Python: contents of fills, calls, children, errors.

What only a guest shows (memory that returns to the buddy allocator, the OOM killer) is in tests/guest.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
from array import array
from typing import TYPE_CHECKING

import pytest

from guest_images import agent
from guest_images.agent_client import AgentClient
from guest_images.errors import AgentRefusedError
from guest_images.initramfs import INIT
from tests.unit.agent_process import running_agent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

MIB = 1 << 20


def with_client(work: Callable[[AgentClient], Awaitable[None]]) -> None:
    async def main() -> None:
        with running_agent() as process:
            async with asyncio.timeout(60), AgentClient(process.channel) as client:
                await client.hello(deadline=10)
                await work(client)

    asyncio.run(main())


@pytest.fixture(autouse=True)
def _tmpfs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(agent, "TMPFS", str(tmp_path))


def test_the_pattern_is_the_rotated_block_that_anyone_can_compute() -> None:
    block = hashlib.shake_256(b"7").digest(agent.BLOCK)
    pattern = agent.Pattern(7)
    assert bytes(pattern.piece(0, agent.BLOCK)) == block
    shifted = bytes(pattern.piece(3 * agent.BLOCK, 100))
    assert shifted == block[3 * agent.STEP : 3 * agent.STEP + 100]


def test_pages_of_a_fill_are_all_different_up_to_64_mib() -> None:
    pattern = agent.Pattern(1)
    blocks = 4096 // agent.STEP
    pages = {
        bytes(pattern.piece(offset, size)[at : at + 64])
        for offset, size in agent.blocks(blocks * agent.BLOCK)
        for at in range(0, size, 4096)
    }
    assert len(pages) == blocks * agent.BLOCK // 4096
    assert bytes(pattern.piece(blocks * agent.BLOCK, 64)) in pages


@pytest.mark.parametrize("kind", ["anonymous", "tmpfs"])
def test_a_fill_is_verified_byte_by_byte(kind: str) -> None:
    holder = agent.Holder(kind, 3 * MIB + 5, seed=1)
    holder.fill()
    assert holder.checksum() == {"bytes": 3 * MIB + 5, "mismatched_pages": 0, "first_mismatch": None}
    holder.store.put(2 * MIB + 4096 + 17, memoryview(b"\0" * 9000))
    assert holder.checksum() == {
        "bytes": 3 * MIB + 5,
        "mismatched_pages": 3,
        "first_mismatch": 2 * MIB + 4096 + 17,
    }
    holder.store.close()


def test_a_shortened_file_is_a_mismatch() -> None:
    assert agent.differences(b"ab", b"abc") == (1, 2)


def test_fill_checksum_free() -> None:
    async def work(client: AgentClient) -> None:
        first = await client.fill("anonymous", 2 * MIB, seed=1)
        second = await client.fill("tmpfs", MIB, seed=2)
        assert (await client.checksum(first.handle)).mismatched_pages == 0
        await client.free(first.handle)
        with pytest.raises(AgentRefusedError, match="no fill has the handle"):
            await client.checksum(first.handle)
        assert (await client.checksum(second.handle)).bytes == MIB

    with_client(work)


def test_samples_are_answered_while_a_command_runs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "end")
    end = os.open(tmp_path / "end", os.O_RDWR)

    async def work(client: AgentClient) -> None:
        slow = asyncio.create_task(client.run(f"read line < {tmp_path / 'end'}"))
        for _ in range(3):
            assert (await client.meminfo())["MemTotal"] > MIB
            assert not slow.done()
        os.write(end, b"\n")
        assert (await slow).status == 0

    with_client(work)
    os.close(end)


def test_a_command_that_does_not_end_is_killed_at_its_deadline() -> None:
    async def work(client: AgentClient) -> None:
        with pytest.raises(AgentRefusedError, match=r"did not end within 0\.1 s"):
            await client.run("read line < /dev/zero", deadline=0.1)

    with_client(work)


def test_commands_give_status_and_bounded_output() -> None:
    async def work(client: AgentClient) -> None:
        assert (await client.run(["sh", "-c", "echo out; echo err >&2; exit 3"])).status == 3
        big = await client.run(f"head -c {agent.MAX_OUTPUT + 1} /dev/zero | tr '\\0' x")
        assert big.truncated
        assert len(big.stdout) == agent.MAX_OUTPUT
        killed = await client.run("kill -9 $$")
        assert killed.status == -9
        with pytest.raises(AgentRefusedError, match="FileNotFoundError"):
            await client.run(["/no/such/program"])

    with_client(work)


def test_files_are_read_and_written(tmp_path: Path) -> None:
    target = tmp_path / "knob"
    target.write_text("")

    async def work(client: AgentClient) -> None:
        await client.write(str(target), "42")
        assert await client.read(str(target)) == "42"
        assert any(name.startswith("0/") for name in await client.buddyinfo())
        with pytest.raises(AgentRefusedError, match="No such file"):
            await client.read("/no/such/file")

    with_client(work)


def test_page_flags_are_those_of_the_file_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = array("Q", (number << 32 | number % 7 for number in range(3 * agent.FLAGS_READ // 16)))
    file = tmp_path / "kpageflags"
    file.write_bytes(expected.tobytes())
    monkeypatch.setattr(agent, "PAGE_FLAGS", str(file))

    async def work(client: AgentClient) -> None:
        assert await client.page_flags(5, 1) == expected[5:6]
        assert await client.page_flags(0, agent.FLAGS_READ // 8) == expected[: agent.FLAGS_READ // 8]
        assert await client.page_flags(10, agent.MAX_PAGE_FLAGS) == expected[10:]
        assert list(await client.page_flags(len(expected), 1)) == []

    with_client(work)


def test_an_answer_of_page_flags_fits_whatever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = hashlib.shake_256(b"noise").digest(agent.MAX_PAGE_FLAGS * agent.PAGE_FLAGS_BYTES)
    (tmp_path / "kpageflags").write_bytes(noise)
    monkeypatch.setattr(agent, "PAGE_FLAGS", str(tmp_path / "kpageflags"))

    async def work(client: AgentClient) -> None:
        assert (await client.page_flags(0, agent.MAX_PAGE_FLAGS)).tobytes() == noise

    with_client(work)


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("nothing", {}, "no such call"),
        ("fill", {"kind": "disk", "bytes": 1, "seed": 0}, "fill needs"),
        ("fill", {"kind": "anonymous", "bytes": 0, "seed": 0}, "fill needs"),
        ("fill", {"kind": "anonymous", "bytes": 1 << 60, "seed": 0}, "Error"),
        ("page_flags", {"first": 0, "count": 0}, "page_flags needs"),
        ("page_flags", {"first": -1, "count": 1}, "page_flags needs"),
        ("page_flags", {"first": 0, "count": agent.MAX_PAGE_FLAGS + 1}, "page_flags needs"),
        ("run", {}, "lacks 'line'"),
        ("write", {"path": "/x"}, "lacks 'text'"),
        ("free", {"handle": 99}, "no fill has the handle 99"),
    ],
)
def test_a_bad_request_is_refused_and_the_agent_goes_on(
    call: str, arguments: dict[str, object], message: str
) -> None:
    async def work(client: AgentClient) -> None:
        with pytest.raises(AgentRefusedError, match=message):
            await client.call(call, deadline=30, **arguments)
        assert (await client.ping()).protocol == agent.PROTOCOL

    with_client(work)


def test_lines_that_are_no_requests_are_ignored() -> None:
    with running_agent() as process, process.channel.makefile("rwb") as lines:
        process.channel.settimeout(10)
        assert "hello" in json.loads(lines.readline())
        lines.write(
            b'garbage\n[1]\n{"call": 3}\n{"id": {}, "call": "ping"}\n\xff\xfe\n{"id": 5, "call": "ping"}\n'
        )
        lines.flush()
        assert json.loads(lines.readline())["id"] == 5


def test_a_killed_child_is_an_error_and_not_the_agents_end() -> None:
    async def main() -> None:
        with running_agent() as process:
            async with asyncio.timeout(60), AgentClient(process.channel) as client:
                filled = await client.fill("anonymous", MIB)
                (holder,) = process.children()
                os.kill(holder, signal.SIGSTOP)
                owed = asyncio.create_task(client.checksum(filled.handle))
                await client.ping()  # the agent takes requests in order: it has passed the checksum on
                os.kill(holder, signal.SIGKILL)
                with pytest.raises(AgentRefusedError, match="killed"):
                    await owed
                with pytest.raises(AgentRefusedError, match="no fill has the handle"):
                    await client.free(filled.handle)

    asyncio.run(main())


def test_a_fill_whose_end_was_not_seen_yet_is_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    child = agent.Child(0, ours)
    child.handle = 7
    serving = agent.Agent(-1)
    monkeypatch.setattr(serving, "children", {0: child})
    with ours:
        answer = json.loads(serving.hand_on({"id": 9, "call": "checksum", "handle": 7}))
    assert answer["id"] == 9
    assert "no fill has the handle 7" in answer["error"]
    assert child.outstanding == set()


def test_freeing_leaves_no_process() -> None:
    async def main() -> None:
        with running_agent() as process:
            async with asyncio.timeout(60), AgentClient(process.channel) as client:
                filled = await client.fill("anonymous", MIB)
                assert len(process.children()) == 1
                await client.free(filled.handle)
                assert process.children() == []

    asyncio.run(main())


@pytest.mark.parametrize("call", sorted(agent.ENDINGS))
def test_an_ending_is_answered_and_then_told_to_init(call: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        theirs.setblocking(False)
        ours.sendall(json.dumps({"id": 1, "call": call}).encode() + b"\n")
        assert agent.Agent(theirs.fileno()).loop() == agent.ENDINGS[call]
        theirs.close()
        said = [json.loads(line) for line in ours.makefile("rb")]
    assert [line.get("id") for line in said] == [None, 1]


def test_init_knows_how_the_agent_asks_for_a_reboot() -> None:
    assert f"if [ $status -eq {agent.ENDINGS['reboot']} ]" in INIT.read_text()
