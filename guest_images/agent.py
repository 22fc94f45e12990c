"""The program inside the guest: answers line-delimited JSON on a virtio-serial port.

It samples the guest's memory while workloads run, and it is the workload: it holds memory with known contents,
verifies them byte by byte and gives them back. It runs on the guest's Python (3.11 to 3.14), standard library only,
as one file. It is not a general management agent. `guest_images.initramfs` packs it; `guest_images.agent_client`
talks to it.

Why not qemu-guest-agent: one sample is one round trip here against three guest-file calls and base64 there; holding,
verifying and freeing memory needs a program inside anyway; and it would bring the closure of glib into the image.

One process, one loop, no threads. Whatever may take long runs in a forked child, so that sampling goes on. Memory of a
fill lives in a child of its own: `free` unmaps or closes it and the child exits, which returns every page to the buddy
allocator; and when the guest runs out of memory its OOM killer takes that child, never the agent.

A request is `{"id": N, "call": NAME, ...}`; its answer is `{"id": N, "result": ...}` or `{"id": N, "error": TEXT}`.
Answers come in the order in which they are ready. `{"hello": ...}` is sent each time a host connects.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
import zlib

# Type checkers take this name as true; importing it from `typing` would cost every boot of a guest that module.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Message = dict[str, Any]

PORT_NAME = "org.vhost-user-balloon.agent.0"
PROTOCOL = 1
# A request names paths, a command line and numbers; longer means that the two sides have lost step.
MAX_REQUEST = 1 << 20
# Output kept of one stream of a command, and of one file read: a log's worth, and no threat to a small guest.
MAX_OUTPUT = 256 << 10
# Children at once: each costs a small guest about one MiB of its own.
MAX_CHILDREN = 64
# Answers waiting for a host that does not read; beyond it requests are left in the port.
MAX_BACKLOG = 4 << 20
# The pattern of a fill. No two pages of one fill are equal up to a page / STEP blocks, 64 MiB; beyond, page k of block i
# is page k + 1 of the block that is so many before it.
BLOCK = 1 << 20
STEP = 64
# Page frames whose flags one answer has: 1 MiB of them, which are 1.4 MB of an answer where they do not compress at all.
MAX_PAGE_FLAGS = 1 << 17
PAGE_FLAGS = "/proc/kpageflags"
PAGE_FLAGS_BYTES = 8
# Read at once; a multiple of PAGE_FLAGS_BYTES. The more, the more of the memory that is looked at is used by looking.
FLAGS_READ = 1 << 16
PORT_DEADLINE_S = 30.0
RUN_DEADLINE_S = 60.0
# The interval at which a port without a host is looked at: poll() reports its hang-up without end.
RECONNECT_POLL_MS = 50
TMPFS = "/mnt"
# How a call ends the agent, and with which exit status: init does the rest, once the answer is on its way.
ENDINGS = {"poweroff": 0, "reboot": 64}


class AgentError(Exception):
    """A request that cannot be served; its text becomes the answer's "error"."""


# --- contents of a fill -------------------------------------------------------------------------------------------


class Pattern:
    """Seeded bytes that do not compress, made from one block: block i is the block rotated by i * STEP bytes.

    The block is SHAKE-256 of the seed's decimal digits, so that anyone can compute what a page must hold.
    """

    def __init__(self, seed: int) -> None:
        block = hashlib.shake_256(str(seed).encode()).digest(BLOCK)
        self.twice = block + block

    def piece(self, offset: int, size: int) -> memoryview:
        """Return `size` bytes of block number offset / BLOCK; offset is a multiple of BLOCK, size at most BLOCK."""
        shift = offset // BLOCK * STEP % BLOCK
        return memoryview(self.twice)[shift : shift + size]


class Anonymous:
    """Private anonymous memory, every page touched."""

    def __init__(self, size: int) -> None:
        self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def put(self, offset: int, piece: memoryview) -> None:
        """Write one piece."""
        self.map[offset : offset + len(piece)] = piece

    def get(self, offset: int, size: int) -> bytes:
        """Read one piece back."""
        return self.map[offset : offset + size]

    def close(self) -> None:
        """Give the memory back."""
        self.map.close()


class TmpfsFile:
    """An unnamed file of a tmpfs: it goes with its last descriptor, also when the OOM killer closes that."""

    def __init__(self, size: int) -> None:
        del size  # a tmpfs file grows as it is written
        self.file = os.open(TMPFS, os.O_TMPFILE | os.O_RDWR, 0o600)

    def put(self, offset: int, piece: memoryview) -> None:
        """Write one piece."""
        while piece:
            written = os.pwrite(self.file, piece, offset)
            offset += written
            piece = piece[written:]

    def get(self, offset: int, size: int) -> bytes:
        """Read one piece back."""
        return os.pread(self.file, size, offset)

    def close(self) -> None:
        """Give the memory back."""
        os.close(self.file)


STORES: dict[str, Callable[[int], Anonymous | TmpfsFile]] = {"anonymous": Anonymous, "tmpfs": TmpfsFile}


def blocks(total: int) -> list[tuple[int, int]]:
    """Return the (offset, size) of the blocks of `total` bytes."""
    return [(offset, min(BLOCK, total - offset)) for offset in range(0, total, BLOCK)]


class Holder:
    """The memory of one fill, living in a child process."""

    def __init__(self, kind: str, total: int, seed: int) -> None:
        self.total = total
        self.pattern = Pattern(seed)
        self.store = STORES[kind](total)

    def fill(self) -> None:
        """Write every byte."""
        for offset, size in blocks(self.total):
            self.store.put(offset, self.pattern.piece(offset, size))

    def checksum(self) -> Message:
        """Compare every byte with what was written; pages count as 4096 bytes."""
        bad_pages, first = 0, None
        for offset, size in blocks(self.total):
            found, expected = self.store.get(offset, size), bytes(self.pattern.piece(offset, size))
            if found != expected:
                pages, at = differences(found, expected)
                bad_pages += pages
                first = offset + at if first is None else first
        return {"bytes": self.total, "mismatched_pages": bad_pages, "first_mismatch": first}


def differences(found: bytes, expected: bytes) -> tuple[int, int]:
    """Return how many pages of two unequal blocks differ, and the offset of the first byte that does."""
    starts = range(0, len(expected), mmap.PAGESIZE)
    bad = [s for s in starts if found[s : s + mmap.PAGESIZE] != expected[s : s + mmap.PAGESIZE]]
    page = slice(bad[0], bad[0] + mmap.PAGESIZE)
    pairs = zip(found[page], expected[page], strict=False)
    # A short read differs where it ends.
    return len(bad), bad[0] + next((i for i, (a, b) in enumerate(pairs) if a != b), len(found[page]))


# --- calls ------------------------------------------------------------------------------------------------------


def read_file(path: str, limit: int = MAX_OUTPUT) -> str:
    """Return at most `limit` bytes of a /proc or /sys file as text."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        parts, room = [], limit
        while room > 0 and (part := os.read(descriptor, min(room, 1 << 16))):
            parts.append(part)
            room -= len(part)
    finally:
        os.close(descriptor)
    return b"".join(parts).decode(errors="replace")


def write_file(path: str, text: str) -> None:
    """Write a /proc or /sys file in one write."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def identity() -> Message:
    """Return who answers: the kernel, the Python, and the seconds since boot."""
    return {
        "hello": PORT_NAME,
        "protocol": PROTOCOL,
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "uptime": time.clock_gettime(time.CLOCK_BOOTTIME),
    }


def meminfo(_: Message) -> dict[str, int]:
    """Return /proc/meminfo in bytes (lines in kB are multiplied, counters are not)."""
    lines = [line.split() for line in read_file("/proc/meminfo").splitlines()]
    return {words[0].rstrip(":"): int(words[1]) * (1024 if len(words) > 2 else 1) for words in lines}


def buddyinfo(_: Message) -> dict[str, list[int]]:
    """Return the free blocks of each zone by order, named "node/zone"."""
    lines = [line.split() for line in read_file("/proc/buddyinfo").splitlines()]
    return {f"{w[1].rstrip(',')}/{w[3]}": [int(count) for count in w[4:]] for w in lines}


def drop_caches(_: Message) -> Message:
    """Write dirty pages out and drop the page cache, dentries and inodes."""
    os.sync()
    write_file("/proc/sys/vm/drop_caches", "3")
    return {}


def write(request: Message) -> Message:
    """Write a /proc or /sys file."""
    write_file(str(request["path"]), str(request["text"]))
    return {}


def read(request: Message) -> str:
    """Read a /proc or /sys file."""
    return read_file(str(request["path"]))


def page_flags(request: Message) -> Message:
    """Return what /proc/kpageflags says of `count` page frames from `first` on; fewer where the file ends.

    Eight bytes each, little-endian, deflated and in base64. Compressed as it is read: the pages that this uses itself
    are few.
    """
    first, count = int(request["first"]), int(request["count"])
    if first < 0 or not 0 < count <= MAX_PAGE_FLAGS:
        raise AgentError(f"page_flags needs first >= 0 and count from 1 to {MAX_PAGE_FLAGS}")
    packer, packed = zlib.compressobj(1), []
    descriptor = os.open(PAGE_FLAGS, os.O_RDONLY)
    try:
        at, end = first * PAGE_FLAGS_BYTES, (first + count) * PAGE_FLAGS_BYTES
        while at < end and (part := os.pread(descriptor, min(FLAGS_READ, end - at), at)):
            packed.append(packer.compress(part))
            at += len(part)
    finally:
        os.close(descriptor)
    packed.append(packer.flush())
    return {
        "count": at // PAGE_FLAGS_BYTES - first,
        "flags": binascii.b2a_base64(b"".join(packed), newline=False).decode(),
    }


def run(request: Message) -> Message:
    """Run `argv` or a shell `line`; the whole process group ends at `deadline` seconds."""
    argv = [str(word) for word in request.get("argv") or ["/bin/sh", "-c", request["line"]]]
    pipes = [os.pipe(), os.pipe()]
    actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
    spawn_actions: list[Any] = actions + [
        (os.POSIX_SPAWN_DUP2, pipe[1], n) for n, pipe in enumerate(pipes, 1)
    ]
    pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=spawn_actions, setpgroup=0)
    for pipe in pipes:
        os.close(pipe[1])
    outputs = collect([pipe[0] for pipe in pipes], pid, float(request.get("deadline", RUN_DEADLINE_S)))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    stdout, stderr = (bytes(output[:MAX_OUTPUT]).decode(errors="replace") for output in outputs)
    truncated = any(len(output) > MAX_OUTPUT for output in outputs)
    return {"status": status, "stdout": stdout, "stderr": stderr, "truncated": truncated}


def collect(pipes: list[int], group: int, deadline: float) -> list[bytearray]:
    """Read pipes to their ends, keeping one byte more than MAX_OUTPUT of each; kill the group at the deadline."""
    outputs = {pipe: bytearray() for pipe in pipes}
    poller, end = select.poll(), time.monotonic() + deadline
    for pipe in pipes:
        poller.register(pipe, select.POLLIN)
    waiting = set(pipes)
    while waiting:
        ready = poller.poll(max(0.0, end - time.monotonic()) * 1000)
        if not ready:
            os.killpg(group, signal.SIGKILL)
            raise AgentError(
                f"the command did not end within {deadline} s and was killed: raise its deadline"
            )
        for pipe, _ in ready:
            part = os.read(pipe, 1 << 16)
            outputs[pipe] += part[: MAX_OUTPUT + 1 - len(outputs[pipe])]
            if not part:
                poller.unregister(pipe)
                waiting.discard(pipe)
    return list(outputs.values())


# Answered in the loop: they cost less than a fork and never wait.
INLINE: dict[str, Callable[[Message], Any]] = {
    "ping": lambda _: identity(),
    "meminfo": meminfo,
    "buddyinfo": buddyinfo,
    "read": read,
}
# Answered by a forked child.
FORKED: dict[str, Callable[[Message], Any]] = {
    "run": run,
    "write": write,
    "drop_caches": drop_caches,
    "page_flags": page_flags,
    "dmesg": lambda request: run({**request, "argv": ["dmesg"]})["stdout"],
}


def answer(request: Message, serve: Callable[[Message], Any]) -> bytes:
    """Serve one request; the guest's refusals become an error answer."""
    try:
        reply = {"id": request["id"], "result": serve(request)}
    except KeyError as error:
        reply = {"id": request["id"], "error": f"the request lacks {error}"}
    except (AgentError, OSError, ValueError, TypeError, MemoryError, OverflowError) as error:
        reply = {"id": request["id"], "error": f"{type(error).__name__}: {error}"}
    return json.dumps(reply).encode() + b"\n"


# --- children ---------------------------------------------------------------------------------------------------


class Child:
    """A forked process that answers requests over a socket pair; it serves one, or holds the memory of a fill."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel
        self.buffer = b""
        self.outstanding: set[Any] = set()
        self.handle: int | None = None
        self.freeing: int | None = None

    def take_lines(self) -> tuple[list[bytes], bool]:
        """Read what the child has said; return whole answers, and whether it has ended."""
        try:
            part = self.channel.recv(1 << 20)
        except ConnectionResetError:  # it was killed with requests unread
            part = b""
        *lines, self.buffer = (self.buffer + part).split(b"\n")
        for line in lines:
            self.outstanding.discard(json.loads(line)["id"])
        return lines, not part

    def reap(self) -> list[bytes]:
        """Collect the ended child; all of its memory is free now. Every request it still owed becomes an answer."""
        self.channel.close()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        cause = (
            "killed, most likely by the guest's OOM killer: ask for less"
            if status == -signal.SIGKILL
            else "lost"
        )
        lost: Message = {"error": f"the process serving this request was {cause} (status {status})"}
        freed: Message = {"result": {}} if status == 0 else lost
        answers = [{"id": owed, **(freed if owed == self.freeing else lost)} for owed in self.outstanding]
        return [json.dumps(reply).encode() for reply in answers]


def serve_once(channel: socket.socket, request: Message) -> None:
    """Be the child of one request."""
    channel.sendall(answer(request, FORKED[request["call"]]))


def serve_fill(channel: socket.socket, request: Message) -> None:
    """Be the child that holds one fill, until it is told to free it or the agent goes."""
    holders: list[Holder] = []
    channel.sendall(answer(request, lambda wanted: filled(wanted, holders)))
    if not holders:
        return
    with channel.makefile("rb") as lines:
        for line in lines:
            order = json.loads(line)
            if order["call"] == "free":
                holders.pop().store.close()
                return  # the agent answers once this process has gone, with all that it held
            channel.sendall(answer(order, lambda _: holders[0].checksum()))


def filled(request: Message, holders: list[Holder]) -> Message:
    """Make and fill the holder that a request asks for."""
    total, seconds = int(request["bytes"]), time.monotonic()
    if total <= 0 or request["kind"] not in STORES:
        raise AgentError(f"fill needs bytes > 0 and kind one of {sorted(STORES)}")
    holder = Holder(request["kind"], total, int(request["seed"]))
    holder.fill()
    holders.append(holder)
    return {"handle": request["id"], "bytes": total, "seconds": time.monotonic() - seconds}


# --- the loop ---------------------------------------------------------------------------------------------------


class Agent:
    """The loop over one port and the children."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connected = False
        self.received = b""
        self.unsent = b""
        self.children: dict[int, Child] = {}
        self.ending: int | None = None

    def loop(self) -> int:
        """Serve until one of ENDINGS has been answered; return its exit status."""
        while self.ending is None or self.unsent:
            poller = select.poll()
            wanted = select.POLLIN if len(self.unsent) < MAX_BACKLOG else 0
            # Without a host there is always something to say: the greeting, as soon as one connects.
            poller.register(self.port, wanted | (select.POLLOUT if self.unsent or not self.connected else 0))
            for descriptor in self.children:
                poller.register(descriptor, select.POLLIN)
            for descriptor, events in poller.poll():
                if descriptor == self.port:
                    self.port_ready(events)
                else:
                    self.child_ready(self.children[descriptor])
        return self.ending

    def port_ready(self, events: int) -> None:
        """Follow the host: connect, disconnect, requests, room for answers."""
        if events & select.POLLHUP:
            self.connected = False
            self.received = self.unsent = b""
            time.sleep(RECONNECT_POLL_MS / 1000)
            return
        if not self.connected:
            self.connected = True
            self.unsent = json.dumps(identity()).encode() + b"\n"
        if events & select.POLLIN:
            self.receive()
        self.send()

    def receive(self) -> None:
        """Take what the port holds and serve whole lines; a line beyond the bound is dropped."""
        try:
            self.received += os.read(self.port, 1 << 16)
        except BlockingIOError:
            return
        *lines, self.received = self.received.split(b"\n")
        for line in lines:
            self.serve(line)
        if len(self.received) > MAX_REQUEST:
            self.received = b""

    def send(self) -> None:
        """Write what the port takes."""
        if not self.unsent:
            return
        try:
            self.unsent = self.unsent[os.write(self.port, self.unsent) :]
        except BlockingIOError:
            return

    def serve(self, line: bytes) -> None:
        """Serve or hand on one request; a line that is no request is ignored: it has no id to answer."""
        try:
            request = json.loads(line)
            call = request["call"]
            request["id"] = int(request["id"])
        except (ValueError, KeyError, TypeError):
            return
        if call in ENDINGS:
            self.ending = ENDINGS[call]
            self.unsent += answer(request, lambda _: {})
        elif call in INLINE:
            self.unsent += answer(request, INLINE[call])
        else:
            self.unsent += self.hand_on(request)

    def hand_on(self, request: Message) -> bytes:
        """Give a request to a child; return an error answer if that cannot be."""
        try:
            if request["call"] in ("checksum", "free"):
                self.to_holder(request)
            elif request["call"] == "fill":
                self.fork(request, serve_fill).handle = request["id"]
            elif request["call"] in FORKED:
                self.fork(request, serve_once)
            else:
                refuse(f"no such call: {request['call']}")
        except (AgentError, OSError) as error:
            reason = str(error)
            return answer(request, lambda _: refuse(reason))
        return b""

    def to_holder(self, request: Message) -> None:
        """Pass a request on to the child that holds its handle; it is served after the fill has ended."""
        handle = request.get("handle")
        child = next((c for c in self.children.values() if c.handle is not None and c.handle == handle), None)
        gone = f"no fill has the handle {handle}: it was freed, or its process was killed"
        if child is None:
            raise AgentError(gone)
        try:
            child.channel.sendall(json.dumps(request).encode() + b"\n")
        except BrokenPipeError as error:  # its end has not been seen yet
            raise AgentError(gone) from error
        child.outstanding.add(request["id"])
        if request["call"] == "free":
            child.handle, child.freeing = None, request["id"]

    def fork(self, request: Message, be: Callable[[socket.socket, Message], None]) -> Child:
        """Fork a child for a request. The OOM killer prefers it to anything else."""
        if len(self.children) >= MAX_CHILDREN:
            raise AgentError(f"{MAX_CHILDREN} requests and fills are under way: wait or free some")
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            child_main(theirs, request, be, [self.port, *self.children])
        theirs.close()
        child = Child(pid, ours)
        child.outstanding.add(request["id"])
        self.children[ours.fileno()] = child
        return child

    def child_ready(self, child: Child) -> None:
        """Forward a child's answers; reap it when it has ended."""
        descriptor = child.channel.fileno()
        lines, ended = child.take_lines()
        if ended:
            del self.children[descriptor]
            lines += child.reap()
        self.unsent += b"".join(line + b"\n" for line in lines)


def refuse(reason: str) -> Message:
    """Turn a reason into an error answer."""
    raise AgentError(reason)


def child_main(
    channel: socket.socket,
    request: Message,
    be: Callable[[socket.socket, Message], None],
    foreign: list[int],
) -> None:
    """Be a child to the end; never return into the agent's loop."""
    status = 1
    try:
        for descriptor in foreign:
            os.close(descriptor)
        write_file("/proc/self/oom_score_adj", "1000")
        be(channel, request)
        status = 0
    finally:
        os._exit(status)


def find_port(name: str) -> str:
    """Return the device of the named virtio-serial port, waiting for its driver to bring it up."""
    end = time.monotonic() + PORT_DEADLINE_S
    base = "/sys/class/virtio-ports"
    while time.monotonic() < end:
        ports = os.listdir(base) if os.path.isdir(base) else []  # noqa: PTH112, PTH208 - pathlib costs start-up time
        for port in ports:
            if read_file(f"{base}/{port}/name").strip() == name:
                return f"/dev/{port}"
        time.sleep(RECONNECT_POLL_MS / 1000)
    raise AgentError(
        f"no virtio-serial port {name} within {PORT_DEADLINE_S} s: give QEMU a virtserialport of that name"
    )


def main() -> int:
    """Run on the port named in PORT_NAME; return what init is to do, by ENDINGS."""
    write_file("/proc/self/oom_score_adj", "-1000")
    return Agent(os.open(find_port(PORT_NAME), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)).loop()


if __name__ == "__main__":
    sys.exit(main())
