"""One real guest out of package files, with files of its own and a knob turned: what was asked for is what came up."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from balloonlab.errors import GuestEndedError, GuestSetupError
from balloonlab.measure.guest_setup import check_knobs, for_arm, prepare
from balloonlab.measure.scenario import DeviceSpec, GuestSpec
from guest_images.kernel import debian_kernel
from qmp_glue.debian import cache_root
from tests.guest.guests import MIB, booted

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SUITE = "bookworm-backports"


def test_a_guest_is_what_its_scenario_says(tmp_path: Path) -> None:
    kernel = debian_kernel(SUITE)
    [package] = (cache_root() / "debs").glob(f"linux-image-{kernel.version}_*.deb")
    (tmp_path / "tool").write_text("#!/bin/sh\necho from the outside: $1\n")
    (tmp_path / "tool").chmod(0o750)
    data = bytes(range(256)) * 20000
    (tmp_path / "data/deep").mkdir(parents=True)
    (tmp_path / "data/deep/file").write_bytes(data)
    (tmp_path / "data/link").symlink_to("deep/file")
    files = {"/bin/tool": str(tmp_path / "tool"), "/srv/data": str(tmp_path / "data")}
    spec = GuestSpec(kernel=str(package), memory=256 * MIB, files=files, page_reporting_order=8)
    setup = for_arm(prepare(spec, DeviceSpec(), progress=print), "off")
    assert setup.image.kernel_version == kernel.version
    with booted(setup, tmp_path) as guest:
        assert guest.shell("uname -r").strip() == kernel.version
        assert guest.shell("tool well; stat -c '%a %u' /usr/bin/tool") == "from the outside: well\n750 0\n"
        digest = hashlib.sha256(data).hexdigest()
        assert (
            guest.shell("sha256sum </srv/data/link; readlink /srv/data/link") == f"{digest}  -\ndeep/file\n"
        )
        assert guest.shell("readlink /bin").strip() == "usr/bin"
        assert "virtio_balloon" in guest.shell("cat /proc/modules")
        assert "failed:" not in guest.rig.vm.console_text()
        assert " rdrand " in guest.shell("grep -m 1 ^flags /proc/cpuinfo")
        guest.wait(check_knobs(guest.rig.agent, spec))
        asked = GuestSpec(page_reporting_order=7)
        with pytest.raises(
            GuestSetupError, match=r"took 8 for page_reporting_order, not 7: give guest\.page"
        ):
            guest.wait(check_knobs(guest.rig.agent, asked))
        asked = GuestSpec(page_reporting_delay_ms=100)
        with pytest.raises(
            GuestSetupError,
            match=rf"Linux {kernel.version.replace('+', '.')} has no page_reporting_delay_ms \(",
        ):
            guest.wait(check_knobs(guest.rig.agent, asked))


@pytest.mark.full
def test_a_kernel_by_itself_that_lacks_its_bus_ends_soon_and_says_so(tmp_path: Path) -> None:
    """Debian's 6.1 has virtio_pci as a module, and nobody can tell from an image alone."""
    image = shutil.copy(debian_kernel("bookworm").image, tmp_path / "vmlinux")
    setup = prepare(GuestSpec(kernel=str(image), memory=256 * MIB), DeviceSpec(), progress=print)
    said = "no virtio-serial port for the agent: this kernel does not have the bus of its machine"
    with pytest.raises(GuestEndedError, match=said), booted(for_arm(setup, "off"), tmp_path):
        pytest.fail("its agent answered")
