"""What a scenario's guest becomes, as far as nothing boots: arms, knobs, and guests that could not come up."""

from __future__ import annotations

from pathlib import Path

import pytest

from balloonlab.errors import UsageError
from balloonlab.measure import guest_setup
from balloonlab.measure.guest_setup import for_arm, knob_words, prepare
from balloonlab.measure.scenario import DeviceSpec, GuestSpec
from guest_images.build import GuestImage
from qmp_glue.board import Board
from qmp_glue.commandline import BuiltInBalloon, Machine, arguments
from qmp_glue.find import Qemu

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The initramfs of a guest whose kernel has only virtio_pci."""
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(16 * MIB))

    def find_guest(_kernel: str, **_options: object) -> GuestImage:
        lacks = ("virtio_balloon", "virtio_mmio")
        return GuestImage("own", "6.99", Path("/vmlinux"), initrd, pvh=True, lacks=lacks)

    monkeypatch.setattr(guest_setup, "find_qemu", lambda **_: Qemu(("qemu",)))
    monkeypatch.setattr(guest_setup, "find_guest", find_guest)
    return initrd


def told(_: str) -> None:
    pass


@pytest.mark.usefixtures("image")
def test_all_of_a_scenarios_guest_is_in_its_setup() -> None:
    spec = GuestSpec(
        memory=256 * MIB,
        cpus=2,
        accelerator="tcg",
        command_line="init_on_free=1  a=b",
        page_reporting_order=5,
    )
    setup = prepare(spec, DeviceSpec(discard="remove", features="-page_poison"), progress=told)
    assert (setup.memory_bytes, setup.cpus, setup.accelerator) == (256 * MIB, 2, "tcg")
    assert (setup.discard, setup.features, setup.trace) == ("remove", "-page_poison", True)
    assert setup.append == ("init_on_free=1", "a=b", "page_reporting.page_reporting_order=5")
    assert setup.board == Board()


@pytest.mark.usefixtures("image")
def test_arms_differ_in_their_balloon_alone() -> None:
    setup = prepare(GuestSpec(accelerator="tcg"), DeviceSpec(), progress=told)
    arms = [for_arm(setup, arm) for arm in ("ours", "qemu", "off")]
    assert [(arm.balloon, arm.trace) for arm in arms] == [
        ("vhost-user", True),
        ("built-in", False),
        ("none", False),
    ]
    assert len({(arm.image, arm.memory_bytes, arm.board, arm.append) for arm in arms}) == 1


def test_qemus_own_balloon_reports_and_has_the_same_memory() -> None:
    own, none = (arguments(Machine(256 * MIB, balloon=balloon)) for balloon in (BuiltInBalloon(), None))
    assert [word for word in own if word not in none] == [
        "-device",
        "virtio-balloon-pci,free-page-reporting=on",
    ]
    assert f"memory-backend-memfd,id=mem,size={256 * MIB},share=on" in none


def test_knobs_are_words_of_the_command_line() -> None:
    assert knob_words(GuestSpec()) == ()
    assert knob_words(GuestSpec(page_reporting_order=0, page_reporting_delay_ms=100)) == (
        "page_reporting.page_reporting_order=0",
        "page_reporting.page_reporting_delay_ms=100",
    )


@pytest.mark.usefixtures("image")
def test_a_kernel_without_the_machines_bus_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Linux 6\.99 has no virtio_mmio, the bus of .* microvm: take q35"):
        prepare(GuestSpec(machine="microvm"), DeviceSpec(), progress=told)


def test_files_that_a_guest_has_no_room_for_are_refused(image: Path) -> None:
    spec = GuestSpec(memory=160 * MIB, files={"/data": "/data"})
    assert prepare(spec, DeviceSpec(), progress=told).memory_bytes == 160 * MIB
    image.write_bytes(bytes(20 * MIB))
    with pytest.raises(
        UsageError, match=r"guest\.memory is 160 MiB, and its files come to 20 MiB.*give it 168 MiB"
    ):
        prepare(spec, DeviceSpec(), progress=told)
