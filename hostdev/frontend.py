"""The other side: a vhost-user front end in plain Python, with the guest memory and driver rings of driver.py.

For tests, benches and modelled guests; the device never imports it. It sends what QEMU 11.1's generic vhost-user device
sends, in that order, and can be told to send anything else with request() and send_raw().

    with start_device() as device, Frontend(device.connect()) as frontend:
        frontend.start()
        head = frontend.rings[Role.REPORTING].offer([Buffer(0x200000, 0x200000, writable=True)])
        frontend.rings[Role.REPORTING].wait_used(head)
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import select
import signal
import socket
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from hostdev import fds
from hostdev.driver import DEADLINE, DriverRing, FrontendError, GuestMemory
from hostdev.keeper import Keeper
from hostdev.options import Options
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import CONFIG, CONFIG_SIZE, DEFAULT_FEATURES, QUEUE_COUNT, Config, Feature
from hostdev.wire.vhost_user import FLAG_NEED_REPLY, ProtocolFeature, Request

# What QEMU 11.1 acknowledges of what this back end offers.
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


class Frontend:
    """A connection to a back end, with guest memory and one driver ring for each virtqueue."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        memory: GuestMemory | None = None,
        features: Feature = DEFAULT_FEATURES,
        ring_size: int = 128,
        rings_at: int = 0x10000,
    ) -> None:
        """rings_at: guest physical address of the first ring; each gets 256 KiB. memory: 64 MiB unless given."""
        self.connection = connection
        self.memory = memory or GuestMemory(64 << 20)
        self.features = features
        self.rings = [
            DriverRing(self.memory, index, ring_size, rings_at + index * 0x40000)
            for index in range(QUEUE_COUNT)
        ]
        self.backend_channel, self._theirs = socket.socketpair()

    # Messages

    def send_raw(self, data: bytes, descriptors: Sequence[fds.Fd] = ()) -> None:
        """Send bytes as they are."""
        fds.send(self.connection, data, descriptors)

    def request(
        self,
        request: Request,
        value: Any = None,  # noqa: ANN401  (each request has its own payload)
        descriptors: Sequence[fds.Fd] = (),
        *,
        need_reply: bool = False,
    ) -> Any:  # noqa: ANN401
        """Send one request. Returns the decoded reply of those that have one; with need_reply the status."""
        shape = wire.MESSAGES[request]
        payload = shape.payload.encode(wire.Nothing() if value is None else value)
        flags = FLAG_NEED_REPLY if need_reply else 0
        self.send_raw(wire.message(request, flags, payload), descriptors)
        if not (shape.has_reply or need_reply):
            return None
        header, reply = self.receive()
        if header.request != request:
            raise FrontendError(f"reply to {header.request} where {request.name} was asked")
        layout = shape.payload if shape.has_reply and shape.payload is not wire.NOTHING else wire.U64_PAYLOAD
        decoded = layout.decode(reply)
        return decoded.value if isinstance(decoded, wire.U64) else decoded

    def receive(self, deadline: float = DEADLINE) -> tuple[wire.Header, bytes]:
        """Receive one whole reply. Raises FrontendError if the back end closes or does not answer."""
        header = wire.HEADER.decode(self._exactly(wire.HEADER_SIZE, deadline))
        return header, self._exactly(header.size, deadline)

    def _exactly(self, size: int, deadline: float) -> bytes:
        data = b""
        self.connection.settimeout(deadline)
        while len(data) < size:
            try:
                piece = self.connection.recv(size - len(data))
            except TimeoutError:
                raise FrontendError(f"no answer within {deadline} s") from None
            if not piece:
                raise FrontendError("the back end closed the connection")
            data += piece
        return data

    # QEMU's order

    def negotiate(self) -> None:
        """What QEMU does when the device is realized."""
        self.request(Request.GET_FEATURES)
        self.request(Request.GET_PROTOCOL_FEATURES)
        self.request(Request.SET_PROTOCOL_FEATURES, wire.U64(PROTOCOL_FEATURES))
        self.request(Request.GET_QUEUE_NUM)
        self.request(Request.GET_MAX_MEM_SLOTS)
        with fds.Fd(os.dup(self._theirs.fileno())) as theirs:
            self.request(Request.SET_BACKEND_REQ_FD, None, [theirs], need_reply=True)
        self.request(Request.SET_OWNER)
        self.request(Request.GET_FEATURES)
        for ring in self.rings:
            self.request(Request.SET_VRING_CALL, wire.U64(ring.index), [ring.call], need_reply=True)

    def add_memory(self) -> None:
        """Give the back end the guest's memory, a region a message."""
        for region in self.memory.regions:
            self.request(Request.ADD_MEM_REG, wire.SingleRegion(0, region), [self.memory.fd], need_reply=True)

    def start_ring(self, ring: DriverRing, base: int = 0) -> int:
        """Set one ring up and start it. Returns the back end's status of the start."""
        address = self.memory.user_address
        self.request(Request.SET_VRING_NUM, wire.VringState(ring.index, ring.size))
        self.request(Request.SET_VRING_BASE, wire.VringState(ring.index, base))
        addresses = wire.VringAddress(
            ring.index, 0, address(ring.descriptors), address(ring.used), address(ring.available), 0
        )
        self.request(Request.SET_VRING_ADDR, addresses)
        status = self.request(Request.SET_VRING_KICK, wire.U64(ring.index), [ring.kick], need_reply=True)
        self.request(Request.SET_VRING_CALL, wire.U64(ring.index), [ring.call], need_reply=True)
        return int(status)

    def enable(self, *, enabled: bool = True) -> None:
        """Enable or disable all rings, those not set up included, as QEMU does."""
        for ring in self.rings:
            state = wire.VringState(ring.index, int(enabled))
            self.request(Request.SET_VRING_ENABLE, state, need_reply=True)

    def start(self, indices: Sequence[int] | None = None) -> None:
        """What QEMU does until the guest's driver is up: negotiate, memory, rings. indices: the rings to set up."""
        self.negotiate()
        self.resume(indices, first=True)

    def resume(
        self,
        indices: Sequence[int] | None = None,
        bases: dict[int, int] | None = None,
        *,
        first: bool = False,
    ) -> None:
        """What QEMU does at DRIVER_OK, and at "cont" without sending the memory again."""
        self.request(Request.SET_FEATURES, wire.U64(self.features | wire.F_PROTOCOL_FEATURES))
        if first:
            self.add_memory()
        for ring in self.rings:
            if indices is None or ring.index in indices:
                self.start_ring(ring, (bases or {}).get(ring.index, 0))
        self.enable()

    def stop(self, indices: Sequence[int] | None = None) -> dict[int, int]:
        """What QEMU does at "stop", reset and power-off, which look the same. Returns the bases."""
        self.enable(enabled=False)
        chosen = [ring.index for ring in self.rings if indices is None or ring.index in indices]
        return {
            index: self.request(Request.GET_VRING_BASE, wire.VringState(index, 0)).num for index in chosen
        }

    def read_config(self) -> Config:
        """Read all of config space, as QEMU does."""
        ask = wire.ConfigAccess(0, CONFIG_SIZE, 0, bytes(CONFIG_SIZE))
        return CONFIG.decode(self.request(Request.GET_CONFIG, ask).data)

    def write_config(self, config: Config) -> None:
        """Write all of config space, as QEMU does for a write to any field."""
        data = CONFIG.encode(config)
        ask = wire.ConfigAccess(0, len(data), 0, data)
        self.request(Request.SET_CONFIG, ask, need_reply=True)

    def close(self) -> None:
        """Close the connection and give the memory up."""
        self.connection.close()
        self.backend_channel.close()
        self._theirs.close()
        for ring in self.rings:
            ring.close()
        self.memory.close()

    def __enter__(self) -> Frontend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DeviceProcess:
    """A keeper in a forked process, and a way to connect to it."""

    def __init__(self, pid: int, path: socket.socket) -> None:
        self.pid = pid
        self._connection: socket.socket | None = path
        self.status: int | None = None

    def connect(self) -> socket.socket:
        """Return the front end's end of the connection, once."""
        assert self._connection is not None
        connection, self._connection = self._connection, None
        return connection

    def workers(self) -> list[int]:
        """Process ids of the keeper's children."""
        with open(f"/proc/{self.pid}/task/{self.pid}/children") as file:  # noqa: PTH123
            return [int(word) for word in file.read().split()]

    def wait(self, deadline: float = DEADLINE) -> int:
        """Wait for the keeper's end and return its exit status. Raises FrontendError if it does not end."""
        if self.status is None:
            with fds.Fd(os.pidfd_open(self.pid)) as pidfd:
                poll = select.poll()
                poll.register(pidfd.fileno(), select.POLLIN)
                if not poll.poll(deadline * 1000):
                    raise FrontendError(f"process {self.pid} does not end")
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status


def forget_files() -> None:
    """Write to nothing that is open in the process that was forked.

    A worker closes all descriptors and is sent others: what a logger of pytest's took for its file is then, maybe, the guest's
    memory. (Loggers that are the device's own, below the root, stay.)
    """
    logging.getLogger().handlers = [logging.NullHandler()]
    faulthandler.disable()


@contextlib.contextmanager
def start_device(options: Options | None = None) -> Iterator[DeviceProcess]:
    """Fork a keeper that serves one connection. It is ended, and its end awaited, when the context is left."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            ours.close()
            forget_files()
            status = Keeper(lambda _name: options or Options(), once=True, term_seconds=0).run(theirs)
        finally:
            os._exit(status)
    theirs.close()
    device = DeviceProcess(pid, ours)
    try:
        yield device
    finally:
        ours.close()
        try:
            device.wait()
        except FrontendError:
            os.kill(pid, signal.SIGKILL)
            device.wait()
            raise
