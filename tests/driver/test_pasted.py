"""What people paste, judged by those who read it: a real QEMU starts with the words, libvirt's schema knows the XML."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lxml import etree

from qmp_glue import debian
from qmp_glue.errors import QmpGlueError
from qmp_glue.find import Qemu, find_qemu
from qmp_glue.inspect import inspect_running
from qmp_glue.monitor import open_monitor
from qmp_glue.paste import MACHINES, QEMU_NAMESPACE, MachineType, libvirt_domain, libvirt_fragments
from qmp_glue.running_setup import entries
from tests.device_on_path import device_on_path
from tests.device_program import listens, wait_for

MIB = 1 << 20
WAIT_SECONDS = 30.0
IN_CI = os.environ.get("CI") == "true"
# Suite and package that has libvirt's schemas, oldest first.
SCHEMAS = [("bookworm", "libvirt0"), ("trixie", "libvirt-common")]
SCHEMA_FILE = "usr/share/libvirt/schemas/domain.rng"


@pytest.fixture
def qemu(unmet: Callable[[str], None]) -> Qemu:
    try:
        return find_qemu(fetch=IN_CI)
    except QmpGlueError as error:
        unmet(str(error))
        raise


@contextlib.contextmanager
def started(words: list[str], environment: dict[str, str], socket: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that listens on a socket, ended afterwards."""
    process = subprocess.Popen(words, env=os.environ | environment, stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: process.poll() is not None or listens(socket), "listening")
        assert process.poll() is None
        yield process
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


def lab(*words: str) -> str:
    command = [sys.executable, "-m", "balloonlab.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=True).stdout


@pytest.mark.parametrize(
    ("machine", "transport"),
    [(machine, transport) for machine in MACHINES for transport in MACHINES[machine]],
)
def test_qemu_starts_with_the_words(qemu: Qemu, tmp_path: Path, machine: MachineType, transport: str) -> None:
    qmp = tmp_path / "qmp"
    ours = (
        "-accel",
        "tcg",
        "-nodefaults",
        "-display",
        "none",
        "-S",
        "-qmp",
        f"unix:{qmp},server=on,wait=off",
    )

    async def look() -> None:
        async with open_monitor(qmp, seconds=WAIT_SECONDS) as monitor:
            answer = entries(await monitor.execute("x-query-virtio"))
            assert [entry["name"] for entry in answer] == ["virtio-balloon"]
            assert await inspect_running(monitor) == []
            memory = entries(await monitor.execute("query-memdev"))
            assert [(entry["size"], entry["share"]) for entry in memory] == [(64 * MIB, True)]
            await monitor.execute("quit")

    with device_on_path(tmp_path) as device:
        options = (f"--socket-path={device.path}", f"--machine={machine}", f"--transport={transport}")
        words = json.loads(lab("qemu-args", *options, "--memory=64M", "--json"))
        with started([*qemu.argv, *words, *ours], dict(qemu.env), qmp) as process:
            asyncio.run(asyncio.wait_for(look(), WAIT_SECONDS))
            assert process.wait(WAIT_SECONDS) == 0


@pytest.fixture(params=SCHEMAS, ids=lambda value: value[0])
def schema(request: pytest.FixtureRequest, tmp_path: Path, unmet: Callable[[str], None]) -> etree.RelaxNG:
    """Libvirt's schema, out of Debian's package: fetched in CI, the system's own elsewhere if it has one."""
    suite, package = request.param
    root = Path("/")
    if IN_CI:
        archive = debian.Archive(suite)
        wanted = [pair for pair in archive.closure(package) if pair[0] == package]
        root = tmp_path / "libvirt"
        debian.unpack(archive.download(wanted), root)
    if not (root / SCHEMA_FILE).exists():
        unmet(f"/{SCHEMA_FILE} is not there: install {package}, or let CI=true fetch it")
    return etree.RelaxNG(etree.parse(root / SCHEMA_FILE))


BARE = """
<domain type="kvm">
  <name>theirs</name>
  <memory>1048576</memory>
  <os><type arch="x86_64" machine="q35">hvm</type></os>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices>
</domain>
"""


def errors(schema: etree.RelaxNG, domain: etree._Element) -> str:
    schema.validate(domain)
    return str(schema.error_log)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", ["/tmp/balloon.sock", "/a & b/<x>,'\"ü"])
def test_libvirt_knows_the_xml(schema: etree.RelaxNG, path: str) -> None:
    domain = etree.fromstring(libvirt_domain(Path(path), 512 * MIB))
    assert errors(schema, domain) == ""
    pasted = etree.fromstring(BARE)
    assert errors(schema, pasted) == ""
    for element in etree.fromstring(f"<pasted>{libvirt_fragments(Path(path))}</pasted>"):
        if element.tag == "devices":
            pasted.find("devices").extend(element)
        else:
            pasted.append(element)
    assert errors(schema, pasted) == ""
    for found in (domain, pasted):
        arguments = [element.get("value") for element in found.iter(f"{{{QEMU_NAMESPACE}}}arg")]
        assert arguments[::2] == ["-chardev", "-device"]
        assert arguments[1] == f"socket,id=balloon,path={path.replace(',', ',,')}"
        assert found.xpath("string(//memballoon/@model)") == "none"
        assert found.xpath("string(memoryBacking/access/@mode)") == "shared"


@pytest.mark.timeout(900)
def test_the_schema_can_say_no(schema: etree.RelaxNG) -> None:
    """Or the test above would prove nothing."""
    text = libvirt_domain(Path("/s"), 512 * MIB)
    for good, wrong in (
        ('mode="shared"', 'mode="public"'),
        ("libvirt.org/schemas/domain/qemu", "example.org"),
    ):
        assert good in text
        assert errors(schema, etree.fromstring(text.replace(good, wrong))) != ""
