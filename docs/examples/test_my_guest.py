"""A test suite of your own: what a guest costs the host. ``pytest --balloon-kernel=trixie-backports test_my_guest.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from balloonlab.pytest_plugin import Factory
    from balloonlab.testing.device import BalloonDevice
    from balloonlab.testing.vm import BalloonVm

MIB = 1 << 20


def test_freed_memory_comes_back(balloon_vm: BalloonVm) -> None:
    floor = balloon_vm.settle()
    held = balloon_vm.fill("200M")
    assert balloon_vm.footprint() > floor + 150 * MIB
    assert balloon_vm.checksum(held).mismatched_pages == 0
    balloon_vm.free(held)
    balloon_vm.wait_for(lambda: balloon_vm.footprint() < floor + 48 * MIB, seconds=45)
    assert balloon_vm.released_bytes > 150 * MIB


# A guest that several tests share, and that is none of the defaults.


@pytest.fixture(scope="module")
def small_vm(balloon_vm_factory: Factory) -> Iterator[BalloonVm]:
    with balloon_vm_factory(memory="256M", command_line="nokaslr loglevel=7") as vm:
        yield vm


def test_the_driver_is_loaded(small_vm: BalloonVm) -> None:
    ran = small_vm.run("test -d /sys/bus/virtio/drivers/virtio_balloon")
    assert ran.status == 0, small_vm.console_text()
    assert "nokaslr" in small_vm.run("cat /proc/cmdline").stdout


def test_a_pause_costs_nothing(small_vm: BalloonVm) -> None:
    small_vm.qmp("stop")
    held = small_vm.footprint()
    small_vm.qmp("cont")
    assert held <= 256 * MIB
    assert small_vm.meminfo()["MemFree"] > 64 * MIB


# The device alone, for a front end of your own.


@pytest.mark.balloon(features="-stats_vq")
def test_the_device_waits_for_a_front_end(balloon_device: BalloonDevice) -> None:
    assert balloon_device.socket_path.is_socket()
    assert balloon_device.counters().reports == 0
