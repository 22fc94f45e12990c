"""The device without its processes: the front end's messages go straight into a session, its kicks into the model.

For tests that look inside, or that must stop the device between two steps. Not a test; used by many of them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from hostdev import fds
from hostdev.balloon import Balloon, Step
from hostdev.discard import AUTO, Discarder
from hostdev.driver import FrontendError, GuestMemory
from hostdev.errors import RingError
from hostdev.frontend import Frontend
from hostdev.memory import Region
from hostdev.metrics import Metrics
from hostdev.session import Session
from hostdev.wire import vhost_user as wire
from hostdev.wire.balloon import DEFAULT_FEATURES, Feature

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
        self.metrics = Metrics()
        self.discarder = RecordingDiscarder(discard)
        self.balloon = Balloon(offered, self.discarder, self.metrics)
        self.session = Session(self.balloon, self.metrics)
        self._replies: list[bytes] = []

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

    def __enter__(self) -> InProcess:
        return self

    def close(self) -> None:
        self.session.close()
        super().close()
        self._pair[1].close()
