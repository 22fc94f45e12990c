"""Which chains a worker's death is counted against: those that it had in hand, and no others, however many die."""

from __future__ import annotations

import os
import signal

import pytest

from hostdev.balloon import MAX_DEATHS
from hostdev.driver import Buffer
from hostdev.frontend import DeviceProcess, Frontend, start_device
from hostdev.wire.balloon import Role
from tests.device_program import works
from tests.in_process import PAGE

MIB = 1 << 20


# No worker dies but those that are killed here.
pytestmark = pytest.mark.usefixtures("patience")


def kill(device: DeviceProcess, frontend: Frontend) -> None:
    """Kill the worker, and have its successor answer."""
    (worker,) = device.workers()
    os.kill(worker, signal.SIGKILL)
    frontend.read_config()


def test_a_statistics_buffer_that_is_only_held() -> None:
    with start_device() as device, Frontend(device.connect()) as frontend:
        frontend.start()
        ring = frontend.rings[Role.STATISTICS]
        frontend.memory.write(3 * MIB, bytes(10))
        ring.offer([Buffer(3 * MIB, 10)])
        for _ in range(MAX_DEATHS + 1):
            kill(device, frontend)
            works(frontend)
        assert ring.used_index == 0


def test_a_chain_of_a_ring_that_was_begun_anew() -> None:
    """It is at the index of one that a worker took up before; the workers died with nothing in hand."""
    with start_device() as device, Frontend(device.connect()) as frontend:
        frontend.start()
        ring = frontend.rings[Role.REPORTING]
        frontend.memory.write(8 * MIB, b"\xaa" * PAGE)
        ring.wait_used(ring.offer([Buffer(8 * MIB, PAGE, writable=True)]))
        frontend.stop()
        frontend.memory.write(ring.available, bytes(4))
        frontend.memory.write(ring.used, bytes(4))
        ring.next_available = ring._seen = 0
        frontend.resume()
        for _ in range(MAX_DEATHS + 1):
            kill(device, frontend)
        works(frontend)
        assert ring.used_index == 1
