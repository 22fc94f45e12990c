"""The pieces of a command line that other parts depend on, word by word."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from qmp_glue.board import Board, equal_nodes
from qmp_glue.commandline import (
    BuiltInBalloon,
    Machine,
    VhostUserBalloon,
    arguments,
    inherited_fds,
    memory_sizes,
)
from qmp_glue.errors import MachineError

MIB = 1 << 20


def after(words: list[str], option: str) -> list[str]:
    """All values of an option, in order."""
    return [words[position + 1] for position, word in enumerate(words[:-1]) if word == option]


def test_memory_is_one_shared_memfd_of_the_machines_size() -> None:
    words = arguments(Machine(256 * MIB))
    assert after(words, "-machine") == ["q35,memory-backend=mem"]
    assert after(words, "-object") == ["memory-backend-memfd,id=mem,size=268435456,share=on"]
    assert after(words, "-m") == ["268435456B"]


def test_nothing_that_was_not_asked_for() -> None:
    words = arguments(Machine(MIB))
    assert {"-no-user-config", "-nodefaults", "-no-reboot"} <= set(words)
    assert after(words, "-display") == ["none"]
    assert after(words, "-accel") == ["tcg"]
    assert not {"-device", "-chardev", "-kernel", "-append", "-S", "-qmp"} & set(words)


def test_vhost_user_balloon_on_a_descriptor() -> None:
    machine = Machine(MIB, balloon=VhostUserBalloon(7))
    words = arguments(machine)
    assert after(words, "-chardev") == ["socket,id=balloon,fd=7"]
    assert after(words, "-device") == [
        "vhost-user-test-device-pci,chardev=balloon,virtio-id=5,num_vqs=5,config_size=16,vq_size=128"
    ]
    assert inherited_fds(machine) == (7,)


def test_paths_are_connected_to_or_listened_on() -> None:
    machine = Machine(MIB, balloon=VhostUserBalloon(Path("/b,1")), agent=Path("/a"), qmp=Path("/q"))
    assert after(arguments(machine), "-chardev") == [
        "socket,id=balloon,path=/b,,1",
        "socket,id=agent,path=/a,server=on,wait=off",
        "socket,id=qmp,path=/q,server=on,wait=off",
    ]
    assert inherited_fds(machine) == ()


def test_built_in_balloon() -> None:
    for reporting, word in ((True, "on"), (False, "off")):
        words = arguments(Machine(MIB, balloon=BuiltInBalloon(free_page_reporting=reporting)))
        assert after(words, "-device") == [f"virtio-balloon-pci,free-page-reporting={word}"]


def test_agent_console_and_kernel() -> None:
    machine = Machine(
        MIB,
        cpus=2,
        kernel=Path("/vm,linuz"),
        initrd=Path("/initrd"),
        append="console=ttyS0,115200 quiet",
        console=Path("/con,sole"),
        agent=9,
        qmp=8,
        paused=True,
        extra=("-name", "x"),
    )
    words = arguments(machine)
    assert after(words, "-smp") == ["2"]
    assert after(words, "-kernel") == ["/vm,linuz"]
    assert after(words, "-initrd") == ["/initrd"]
    assert after(words, "-append") == ["console=ttyS0,115200 quiet"]
    assert after(words, "-serial") == ["chardev:console"]
    assert after(words, "-qmp") == ["chardev:qmp"]
    assert "file,id=console,path=/con,,sole" in after(words, "-chardev")
    assert after(words, "-device") == [
        "virtio-serial-pci",
        "virtserialport,chardev=agent,name=org.vhost-user-balloon.agent.0",
    ]
    assert words[-3:] == ["-S", "-name", "x"]
    assert inherited_fds(machine) == (9, 8)


def test_numa_nodes_are_a_backend_each() -> None:
    machine = Machine(256 * MIB, board=Board(nodes=(64 * MIB, 192 * MIB)))
    words = arguments(machine)
    assert after(words, "-machine") == ["q35"]
    assert after(words, "-object") == [
        "memory-backend-memfd,id=mem0,size=67108864,share=on",
        "memory-backend-memfd,id=mem1,size=201326592,share=on",
    ]
    assert after(words, "-numa") == ["node,nodeid=0,memdev=mem0", "node,nodeid=1,memdev=mem1"]
    assert memory_sizes(machine) == (64 * MIB, 192 * MIB)


@pytest.mark.parametrize(
    ("accelerator", "cpus"), [("tcg", ["qemu64,+rdrand,+rdseed"]), ("kvm", []), ("qtest", [])]
)
def test_an_emulated_cpu_has_random_numbers(
    accelerator: Literal["tcg", "kvm", "qtest"], cpus: list[str]
) -> None:
    assert after(arguments(Machine(MIB, accelerator=accelerator)), "-cpu") == cpus


def test_equal_nodes_hold_all_of_memory() -> None:
    assert equal_nodes(256 * MIB, 2) == (128 * MIB, 128 * MIB)
    assert equal_nodes(5 * 8192, 2) == (2 * 8192, 3 * 8192)


def test_a_microvm_has_its_devices_on_virtio_mmio() -> None:
    board = Board(kind="microvm")
    words = arguments(Machine(MIB, board=board, balloon=VhostUserBalloon(7), agent=9))
    assert after(words, "-machine") == ["microvm,acpi=on,pcie=off,pic=off,memory-backend=mem"]
    assert after(words, "-global") == []
    assert after(words, "-device") == [
        "vhost-user-test-device,chardev=balloon,virtio-id=5,num_vqs=5,config_size=16,vq_size=128",
        "virtio-serial-device",
        "virtserialport,chardev=agent,name=org.vhost-user-balloon.agent.0",
    ]
    assert after(arguments(Machine(MIB, board=board, balloon=BuiltInBalloon())), "-device") == [
        "virtio-balloon-device,free-page-reporting=on"
    ]


def test_a_modern_microvm_says_so() -> None:
    words = arguments(Machine(MIB, board=Board(kind="microvm", force_legacy=False)))
    assert after(words, "-global") == ["virtio-mmio.force-legacy=false"]


@pytest.mark.parametrize(("accelerator", "found"), [("tcg", ["shift=auto"]), ("kvm", []), ("qtest", [])])
def test_an_emulated_microvm_counts_instructions(
    accelerator: Literal["tcg", "kvm", "qtest"], found: list[str]
) -> None:
    words = arguments(Machine(MIB, board=Board(kind="microvm"), accelerator=accelerator))
    assert after(words, "-icount") == found


def test_a_balloon_to_be_plugged_has_a_connection_and_a_port() -> None:
    machine = Machine(MIB, board=Board(root_ports=2), balloon=VhostUserBalloon(7, plugged=False))
    words = arguments(machine)
    assert after(words, "-chardev") == ["socket,id=balloon,fd=7"]
    assert after(words, "-device") == [
        "pcie-root-port,id=port0,chassis=1",
        "pcie-root-port,id=port1,chassis=2",
    ]
    assert inherited_fds(machine) == (7,)


def test_a_machine_that_reboots_leaves_out_the_option_that_ends_it() -> None:
    assert "-no-reboot" not in arguments(Machine(MIB, board=Board(reboots=True)))


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"nodes": (MIB, 4096)}, "multiples of 8192"),
        ({"nodes": (MIB, 0)}, "multiples of 8192"),
        ({"nodes": (8192,) * 129}, "at most 128"),
        ({"root_ports": 9}, "0 to 8"),
        ({"kind": "microvm", "root_ports": 1}, "take a q35"),
        ({"kind": "microvm", "nodes": (MIB,)}, "take a q35"),
    ],
)
def test_boards_that_cannot_be(wrong: dict[str, object], fix: str) -> None:
    with pytest.raises(MachineError, match=fix):
        Board(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"memory_bytes": 0}, "positive multiple"),
        ({"memory_bytes": MIB + 4096}, "multiple of 8192"),
        ({"memory_bytes": MIB, "cpus": 0}, "one or more"),
        ({"memory_bytes": MIB, "board": Board(nodes=(8192,))}, "make them equal"),
        (
            {
                "memory_bytes": MIB,
                "board": Board(kind="microvm"),
                "balloon": VhostUserBalloon(7, plugged=False),
            },
            "q35",
        ),
        ({"memory_bytes": MIB, "append": "quiet"}, "name a kernel"),
        ({"memory_bytes": MIB, "initrd": Path("/i")}, "name a kernel"),
        ({"memory_bytes": MIB, "kernel": Path("/k\0")}, "NUL"),
    ],
)
def test_machines_that_cannot_be(wrong: dict[str, object], fix: str) -> None:
    with pytest.raises(MachineError, match=fix):
        Machine(**wrong)  # type: ignore[arg-type]
