"""Devices and front ends for the catalogue of hostile inputs. No process, descriptor or file outlives a test."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostdev.driver import GuestMemory
from hostdev.frontend import DeviceProcess, Frontend, start_device
from tests.device_program import Program, children, descriptors, program
from tests.in_process import MIB, InProcess


@pytest.fixture(autouse=True)
def none_is_late(patience: None) -> None:
    """Of the workers here none is to hang."""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(children(os.getpid())), len(descriptors(os.getpid()))
    yield
    # Fewer: what other tests had left to the collector.
    assert set(children(os.getpid())) <= before[0]
    if len(descriptors(os.getpid())) > before[1]:
        gc.collect()
        assert len(descriptors(os.getpid())) <= before[1]


@pytest.fixture
def device() -> Iterator[DeviceProcess]:
    """Keeper and worker, for one front end."""
    with start_device() as device:
        yield device


@pytest.fixture
def fresh(device: DeviceProcess) -> Iterator[Frontend]:
    """A front end of that which has said nothing yet."""
    with Frontend(device.connect()) as fresh:
        yield fresh


@pytest.fixture
def guest(fresh: Frontend) -> Frontend:
    """The same with its guest's driver up."""
    fresh.start()
    return fresh


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Program]:
    """The command, listening at a path. It must end well, without a traceback, and leave no file."""
    with program(tmp_path / "balloon.sock") as device:
        yield device
        status, said = device.end()
        assert (status, "Traceback" in said) == (0, False), said
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def local() -> Iterator[InProcess]:
    """Session and model in this process, with 16 MiB and the driver up."""
    with InProcess(GuestMemory(16 * MIB)) as local:
        local.start()
        yield local
