"""Each thing that makes giving memory back unsafe or useless is found, on a command line and over QMP, with its fix."""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from qmp_glue.errors import CommandDeniedError, CommandFailedError
from qmp_glue.inspect import Finding, filesystem_type, inspect_arguments, inspect_running
from qmp_glue.monitor import DENIED_COMMANDS, deny

GOOD = "-machine q35,memory-backend=mem -object memory-backend-memfd,id=mem,size=1G,share=on -m 1G"
BALLOON = "-chardev socket,id=c,path=/s -device vhost-user-test-device-pci,chardev=c,virtio-id=5"


def rules(findings: list[Finding]) -> list[str]:
    return [finding.rule for finding in findings]


def inspect(line: str) -> list[Finding]:
    kinds = {"/dev/shm": "tmpfs", "/dev/hugepages": "hugetlbfs"}
    return inspect_arguments(shlex.split(line), filesystem=lambda path: kinds.get(path, "ext4"))


@pytest.mark.parametrize(
    "line",
    [
        GOOD,
        f"qemu-system-x86_64 {GOOD} {BALLOON}",
        GOOD.replace(",share=on", ""),  # memfd is shared by itself
        GOOD.replace("-m 1G", "-m 1024"),
        GOOD + " -append -m 2G",
        GOOD.replace("-m 1G", "-m size=1048576k,slots=2,maxmem=4G"),
        GOOD.replace("-machine", "-M").replace("q35", "type=q35"),
        GOOD.replace("memfd", "file").replace("share", "mem-path=/dev/shm,share"),
        (
            "-m 1G -machine q35 -object memory-backend-memfd,id=a,size=512M -object memory-backend-memfd,id=b,size=512M "
            "-numa node,memdev=a -numa node,memdev=b"
        ),
        GOOD + " -object memory-backend-memfd,id=dimm,size=1G -device pc-dimm,memdev=dimm",
        """-machine memory-backend=m -m 1G -object '{"qom-type":"memory-backend-memfd","id":"m","size":1073741824}'""",
        GOOD + " -netdev vhost-user,id=n,chardev=x -object rng-random,id=r",
        GOOD + " -drive file=/disk.img,if=none,id=d -blockdev driver=file,filename=/nvme.img,node-name=f",
        GOOD + " -device nvme,serial=1 -device nvme-ns,drive=d",
        GOOD + " -blockdev driver=nvme-io_uring,path=/dev/ng0n1,node-name=n",
        GOOD + " -global migration.x-postcopy-ram=off -global driver=cfi.pflash01,property=secure,value=on",
        GOOD + " -overcommit mem-lock=off,cpu-pm=on",
        GOOD + " " + BALLOON.replace("virtio-id=5", "virtio-id=4") + " -device virtio-balloon-pci",
    ],
)
def test_good_command_lines(line: str) -> None:
    assert inspect(line) == []


BAD_LINES = [
    ("-m 1G", "memory-anonymous", "add -object memory-backend-memfd,id=mem"),
    (GOOD.replace(",memory-backend=mem", ""), "memory-anonymous", "add memory-backend=mem to -machine"),
    (GOOD.replace("memfd", "ram"), "memory-anonymous", "make it a memory-backend-memfd"),
    (GOOD.replace("share=on", "share=off"), "memory-unshared", "add share=on"),
    (
        GOOD.replace("memfd", "file").replace("share=on", "mem-path=/dev/shm"),
        "memory-unshared",
        "add share=on",
    ),
    (
        GOOD.replace("memfd", "file").replace("share", "mem-path=/var/ram,share"),
        "memory-on-disk",
        "/dev/shm",
    ),
    ("-m 1G -mem-path /dev/hugepages", "memory-hugetlb", "leave out hugetlb"),
    (GOOD.replace("share=on", "hugetlb=on"), "memory-hugetlb", "leave out hugetlb"),
    (GOOD.replace("-m 1G", "-m 2G"), "memory-size", "same size"),
    (GOOD + " -device vfio-pci,host=01:00.0", "vfio", "remove it or the balloon"),
    (GOOD + ' -device \'{"driver":"vfio-pci","host":"01:00.0"}\'', "vfio", "remove it or the balloon"),
    (GOOD + " -netdev vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0", "vdpa", "instead"),
    (GOOD + " -netdev type=vhost-vdpa,id=n", "vdpa", "instead"),
    (GOOD + " -device vhost-vdpa-device-pci", "vdpa", "instead"),
    (GOOD + " -object sev-guest,id=s", "confidential", "remove it"),
    (GOOD + " -object sev-snp-guest,id=s", "confidential", "remove it"),
    (GOOD + " -object tdx-guest,id=t", "confidential", "remove it"),
    (GOOD.replace("q35", "q35,confidential-guest-support=lsec0"), "confidential", "lsec0 encrypts"),
    (GOOD + " -object iommufd,id=i", "iommufd", "remove it"),
    (GOOD + " -device vfio-user-pci,socket=/s", "vfio", "remove it"),
    (GOOD + " -device pvrdma", "rdma", "remove it"),
    (GOOD + " -drive file=nvme://0000:01:00.0/1,if=none", "nvme", "host's driver"),
    (GOOD + " -hda nvme://0000:01:00.0/1", "nvme", "host's driver"),
    (
        GOOD + " -blockdev driver=nvme,device=0000:01:00.0,namespace=1,node-name=n",
        "nvme",
        "host's driver",
    ),
    (GOOD + " -blockdev driver=raw,node-name=n,file.driver=nvme", "nvme", "host's driver"),
    (
        GOOD + """ -blockdev '{"driver":"raw","node-name":"n","file":{"driver":"nvme"}}'""",
        "nvme",
        "host's driver",
    ),
    (
        GOOD + " -blockdev virtio-blk-vhost-vdpa,path=/d,node-name=n,driver=virtio-blk-vhost-vdpa",
        "blkio",
        "may pin",
    ),
    (GOOD + " -incoming tcp:0:4444", "migration", "when it is over"),
    (GOOD + " -incoming defer -global migration.x-postcopy-ram=on", "postcopy", "when it is over"),
    (GOOD + " -incoming rdma:host:4444", "rdma", "when it is over"),
    (GOOD + " -incoming defer -global migration.x-rdma-pin-all=on", "rdma", "when it is over"),
    (GOOD + " -incoming defer -global migration.x-colo=on", "colo", "when it is over"),
    (GOOD + " -global migration.background-snapshot=on", "background-snapshot", "turn it off"),
    (GOOD + " -overcommit mem-lock=on", "mem-lock", "leave out mem-lock"),
    (GOOD + " -overcommit cpu-pm=on,mem-lock=on-fault", "mem-lock", "leave out mem-lock"),
    (f"{GOOD} {BALLOON} -device virtio-balloon-pci", "two-balloons", "all but one"),
    (f"{GOOD} {BALLOON.replace('/s', '/s,reconnect-ms=100')}", "reconnect", "remove reconnect"),
    (f"{GOOD} {BALLOON.replace('/s', '/s,reconnect=1')}", "reconnect", "remove reconnect"),
]


@pytest.mark.parametrize(("line", "rule", "fix"), BAD_LINES)
def test_bad_command_lines(line: str, rule: str, fix: str) -> None:
    findings = inspect(line)
    assert rule in rules(findings)
    assert any(fix in finding.message for finding in findings if finding.rule == rule)


def test_the_guide_explains_each_rule() -> None:
    guide = (Path(__file__).parents[2] / "docs/guide.md").read_text()
    table = guide.partition("| rule | why |\n|---|---|\n")[2].partition("\n\n")[0]
    explained = {name for row in table.splitlines() for name in re.findall(r"`([a-z-]+)`", row.split("|")[1])}
    assert explained == {rule for _, rule, _ in BAD_LINES}


SEVERITIES = {
    GOOD.replace("share=on", "share=off"): ("error", "useless"),
    GOOD.replace("-m 1G", "-m 2G"): ("error", "fatal"),
    GOOD + " -overcommit mem-lock=on": ("warning", "useless"),
    GOOD + " -device vfio-pci": ("error", "unsafe"),
    GOOD + " -incoming defer": ("error", "unsafe"),
    GOOD + " -global migration.x-postcopy-ram=on": ("warning", "unsafe"),
    GOOD.replace("share=on", "hugetlb=on"): ("error", "unsafe"),
    f"{GOOD} {BALLOON} -device virtio-balloon-pci": ("error", "useless"),
    f"{GOOD} {BALLOON.replace('/s', '/s,reconnect=1')}": ("error", "fatal"),
}


@pytest.mark.parametrize("line", SEVERITIES)
def test_what_a_finding_forbids(line: str) -> None:
    assert [(finding.severity, finding.effect) for finding in inspect(line)] == [SEVERITIES[line]]


def test_each_fault_is_one_finding() -> None:
    assert rules(inspect(GOOD + " -incoming defer -global migration.x-postcopy-ram=on")) == ["postcopy"]
    assert rules(inspect(GOOD.replace("share=on", "share=off"))) == ["memory-unshared"]
    assert rules(inspect("-m 1G")) == ["memory-anonymous"]


def test_filesystem_type_is_the_kernels() -> None:
    assert filesystem_type("/proc/self/status") == "proc"


class FakeQemu:
    """Answers from a table: a command's name, or "qom-get PATH PROPERTY"."""

    def __init__(self, answers: Mapping[str, object]) -> None:
        self.answers = {
            "qom-list /objects": [{"name": "mem", "type": "child<memory-backend-memfd>"}],
            "qom-list /machine/peripheral": [{"name": "type", "type": "string"}],
            "qom-list /machine/peripheral-anon": [],
            "query-memdev": [{"id": "mem", "share": True, "size": 1 << 30}],
            "qom-get /objects/mem hugetlb": False,
            "human-monitor-command info network": "n0: index=0,type=user\r\n",
            "x-query-virtio": [],
            "query-named-block-nodes True": [{"drv": "file"}, {"drv": "raw"}],
            "query-status": {"status": "running", "running": True},
            "query-migrate": {},
            "query-migrate-capabilities": [{"capability": "xbzrle", "state": False}],
        } | dict(answers)
        self.asked: list[str] = []

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        deny(command, arguments)
        key = " ".join([command, *map(str, (arguments or {}).values())])
        self.asked.append(command)
        if key not in self.answers:
            raise CommandFailedError(command, "GenericError", "no such thing")
        return self.answers[key]


MEM = [{"name": "mem", "type": "child<memory-backend-memfd>"}]
CAPABILITIES = "query-migrate-capabilities"


def on(capability: str) -> list[dict[str, object]]:
    return [{"capability": capability, "state": True}]


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ({}, []),
        ({"query-memdev": [{"id": "mem", "share": False}]}, ["memory-unshared"]),
        ({"qom-list /objects": [{"name": "mem", "type": "child<memory-backend-ram>"}]}, ["memory-anonymous"]),
        (
            {
                "qom-list /objects": [{"name": "mem", "type": "child<memory-backend-file>"}],
                "qom-get /objects/mem mem-path": "/var/ram",
            },
            ["memory-on-disk"],
        ),
        ({"qom-get /objects/mem hugetlb": True}, ["memory-hugetlb"]),
        ({"qom-list /machine/peripheral": [{"name": "h", "type": "child<vfio-pci>"}]}, ["vfio"]),
        ({"human-monitor-command info network": "n: index=0,type=vhost-vdpa,vhostdev=/d\r\n"}, ["vdpa"]),
        (
            {
                "qom-list /objects": [
                    {"name": "mem", "type": "child<memory-backend-memfd>"},
                    {"name": "s", "type": "child<sev-guest>"},
                ]
            },
            ["confidential"],
        ),
        ({"qom-get /machine confidential-guest-support": "/objects/x"}, ["confidential"]),
        ({"qom-get /machine confidential-guest-support": ""}, []),
        ({"qom-list /objects": [*MEM, {"name": "i", "type": "child<iommufd>"}]}, ["iommufd"]),
        ({"query-named-block-nodes True": [{"drv": "nvme"}]}, ["nvme"]),
        ({"query-named-block-nodes True": [{"drv": "virtio-blk-vfio-pci"}]}, ["blkio"]),
        ({"query-status": {"status": "inmigrate"}}, ["migration"]),
        ({"query-status": {"status": "inmigrate"}, CAPABILITIES: on("postcopy-ram")}, ["postcopy"]),
        ({"query-migrate": {"status": "completed"}}, []),
        ({"query-migrate": {"status": "setup"}}, ["migration"]),
        ({"query-migrate": {"status": "postcopy-paused"}}, ["postcopy"]),
        (
            {"query-migrate": {"status": "active"}, CAPABILITIES: on("background-snapshot")},
            ["background-snapshot"],
        ),
        ({"query-migrate": {"status": "active"}, CAPABILITIES: on("rdma-pin-all")}, ["rdma"]),
        ({"query-migrate": {"status": "colo"}}, ["colo"]),
        ({CAPABILITIES: on("x-colo")}, ["colo"]),
        ({"x-query-virtio": [{"name": "virtio-balloon", "path": "/a"}]}, []),
        ({"x-query-virtio": [{"name": "virtio-balloon", "path": path} for path in "ab"]}, ["two-balloons"]),
    ],
)
def test_running_qemu(answers: Mapping[str, object], found: list[str]) -> None:
    assert rules(asyncio.run(inspect_running(FakeQemu(answers), filesystem=lambda _path: "ext4"))) == found


def test_a_running_qemu_is_only_asked() -> None:
    qemu = FakeQemu({})
    asyncio.run(inspect_running(qemu))
    assert len(qemu.asked) > 5
    harmless = {"qom-list", "qom-get", "human-monitor-command"}
    assert all(command in harmless or "query-" in command for command in qemu.asked)


@pytest.mark.parametrize(("there", "found"), [(0, []), (1, ["two-balloons"]), (2, ["two-balloons"])])
def test_one_more_balloon(there: int, found: list[str]) -> None:
    qemu = FakeQemu({"x-query-virtio": [{"name": "virtio-balloon"}] * there})
    assert rules(asyncio.run(inspect_running(qemu, adding=1))) == found


@pytest.mark.parametrize("command", sorted(DENIED_COMMANDS))
def test_crashing_commands_are_denied(command: str) -> None:
    with pytest.raises(CommandDeniedError, match="crashes QEMU"):
        deny(command, {"path": "/x"})
    with pytest.raises(CommandDeniedError, match="crashes QEMU"):
        deny("human-monitor-command", {"command-line": f"info  {command.removeprefix('x-query-')} /x"})


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("x-query-virtio", None),
        ("query-status", {}),
        ("human-monitor-command", {"command-line": "info virtio"}),
    ],
)
def test_harmless_commands_are_not_denied(command: str, arguments: dict[str, object] | None) -> None:
    try:
        deny(command, arguments)
    except CommandDeniedError:
        pytest.fail(f"{command} was denied")
