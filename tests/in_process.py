"""The device without its processes: the front end's messages go straight into a session, its kicks into the model.

For tests that look inside, or that must stop the device between two steps. Not a test; used by many of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

from hostdev import fds
from hostdev.balloon import Balloon
from hostdev.commands import Commands
from hostdev.config_teller import ConfigTeller
from hostdev.discard import AUTO, Discarder
from hostdev.driver import FrontendError, GuestMemory
from hostdev.errors import RingError
from hostdev.frontend import Frontend
from hostdev.memory import Region
from hostdev.metrics import Metrics
from hostdev.rings import Step
from hostdev.session import Session
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import DEFAULT_FEATURES, Feature
from hostdev.wire.control import Envelope, Kind

PAGE = 4096
MIB = 1 << 20


class RecordingDiscarder(Discarder):
    """Gives back for real, and remembers what, in the order it happened."""

    def __init__(self, request: str = AUTO) -> None:
        super().__init__(request)
        self.released: list[tuple[int, int]] = []
        self.error: Exception | None = None

    def release(self, region: Region, offset: int, length: int) -> None:
        if self.error is not None:
            raise self.error
        super().release(region, offset, length)
        self.released.append((region.guest_address + offset, length))


class InProcess(Frontend):
    """A Frontend whose back end is a Session and a Balloon in this process."""

    def __init__(
        self,
        memory: GuestMemory | None = None,
        *,
        features: Feature = DEFAULT_FEATURES,
        offered: Feature = DEFAULT_FEATURES,
        discard: str = AUTO,
        ring_size: int = 128,
        rings_at: int = 0x10000,
    ) -> None:
        self._pair = socket.socketpair()
        super().__init__(
            self._pair[0], memory=memory, features=features, ring_size=ring_size, rings_at=rings_at
        )
        self._offered = offered
        self.discarder = RecordingDiscarder(discard)
        self.now = 100.0
        self._make_device()
        self._replies: list[bytes] = []
        self._told = b""

    def _make_device(self) -> None:
        """Make a device that has served nobody yet, for this front end and with this host."""
        self.metrics = Metrics()
        self.balloon = Balloon(
            self._offered,
            self.discarder,
            self.metrics,
            clock=lambda: self.now,
            wall_clock=lambda: 1_000_000 + self.now,
        )
        self.session = Session(self.balloon, self.metrics)
        self.commands = Commands(self.balloon, self.session, clock=lambda: self.now)
        self.teller = ConfigTeller(self.balloon, self.session, clock=lambda: self.now)

    def send_raw(self, data: bytes, descriptors: Sequence[fds.Fd] = ()) -> None:
        header = wire.HEADER.decode(data[: wire.HEADER_SIZE])
        copies = [fds.Fd(os.dup(fd.fileno())) for fd in descriptors]
        reply = self.session.handle(header, data[wire.HEADER_SIZE :], copies)
        if reply:
            self._replies.append(reply)

    def receive(self, deadline: float = 0) -> tuple[wire.Header, bytes]:
        if not self._replies:
            raise FrontendError("no reply")
        reply = self._replies.pop(0)
        return wire.HEADER.decode(reply[: wire.HEADER_SIZE]), reply[wire.HEADER_SIZE :]

    def status(self, request: wire.Request, value: object, descriptors: Sequence[fds.Fd] = ()) -> int:
        """Send a request that has no reply of its own and return its status."""
        return int(self.request(request, value, descriptors, need_reply=True))

    def step(self, index: int) -> Step:
        """One step of one ring."""
        return self.balloon.service(index)

    def run(self, index: int) -> int:
        """Serve one ring until it is idle or broken. Returns the number of steps."""
        steps = 0
        try:
            while self.step(index).more:
                steps += 1
        except RingError:
            pass
        return steps

    def tick(self, seconds: float = 0.0) -> set[int]:
        """Let time pass, on a clock that stands still otherwise. Returns the rings to signal."""
        self.now += seconds
        signalled = self.balloon.tick(
            [ring.index for ring in self.rings if self.session.rings[ring.index].started]
        )
        self.commands.tick()
        return signalled

    def told(self) -> list[int]:
        """Take the back end's steps to tell of config space, and read what arrives. Returns the requests that did."""
        for _ in range(3):
            self.teller.tell(lambda: False)
            with contextlib.suppress(BlockingIOError):
                self._told += self.backend_channel.recv(1 << 16, socket.MSG_DONTWAIT)
        requests = []
        while len(self._told) >= wire.HEADER_SIZE:
            requests.append(wire.HEADER.decode(self._told[: wire.HEADER_SIZE]).request)
            self._told = self._told[wire.HEADER_SIZE :]
        return requests

    def ask(self, number: int, name: str, /, **arguments: object) -> None:
        """Send a command of the control socket; answers() has what comes of it."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        text = json.dumps({"execute": name, "arguments": words}).encode()
        self.commands.handle(Envelope(Kind.COMMAND, number, text))

    def answers(self) -> list[tuple[Kind, int, Any]]:
        """Take what the commands have answered so far."""
        taken = [(Kind(each.kind), each.id, json.loads(each.text)) for each in self.commands.outgoing]
        self.commands.outgoing.clear()
        return taken

    def command(self, name: str, /, **arguments: object) -> Any:  # noqa: ANN401
        """Execute a command that is answered at once. Returns the value, or "class: text" of an error."""
        self.ask(1, name, **arguments)
        ((kind, number, value),) = self.answers()
        assert number == 1
        return value if kind is Kind.RETURN else f"{value['class']}: {value['desc']}"

    def __enter__(self) -> InProcess:
        return self

    def close(self) -> None:
        self.session.close()
        super().close()
        self._pair[1].close()
