"""A control process, a fake worker and a client, for the tests of the control socket; what those of the sandbox ask for."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostdev import sandbox
from tests.control_process import ControlProcess, FakeWorker, QmpSocket, control_process
from tests.device_program import children, descriptors


@pytest.fixture
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No child of this process, no descriptor and no file in tmp_path outlives a test."""
    gc.collect()  # what other tests have left to it goes now, and not in between
    before = set(children(os.getpid())), len(descriptors(os.getpid()))
    yield
    assert (set(children(os.getpid())), len(descriptors(os.getpid()))) == before
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ControlProcess]:
    with control_process(tmp_path / "balloon.qmp") as process:
        yield process


@pytest.fixture
def worker(process: ControlProcess) -> Iterator[FakeWorker]:
    worker = FakeWorker()
    process.announce(worker)
    yield worker
    worker.close()


@pytest.fixture
def other(process: ControlProcess, worker: FakeWorker) -> Iterator[FakeWorker]:
    """The worker of a second guest, vm2."""
    assert worker.commands == []
    other = FakeWorker()
    process.announce(other, "vm2")
    yield other
    other.close()


@pytest.fixture
def client(process: ControlProcess) -> Iterator[QmpSocket]:
    with process.connect() as client:
        yield client


@pytest.fixture
def filters(unmet: Callable[[str], None]) -> None:
    """A kernel with seccomp. What needs Landlock as well says so itself."""
    if not sandbox._has_filters():
        unmet("a kernel with seccomp filters")
