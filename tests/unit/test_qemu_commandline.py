"""The pieces of a command line that other parts depend on, word by word."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmp_glue.commandline import BuiltInBalloon, Machine, VhostUserBalloon, arguments, inherited_fds
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


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"memory_bytes": 0}, "positive multiple"),
        ({"memory_bytes": MIB + 4096}, "multiple of 8192"),
        ({"memory_bytes": MIB, "cpus": 0}, "one or more"),
        ({"memory_bytes": MIB, "append": "quiet"}, "name a kernel"),
        ({"memory_bytes": MIB, "initrd": Path("/i")}, "name a kernel"),
        ({"memory_bytes": MIB, "kernel": Path("/k\0")}, "NUL"),
    ],
)
def test_machines_that_cannot_be(wrong: dict[str, object], fix: str) -> None:
    with pytest.raises(MachineError, match=fix):
        Machine(**wrong)  # type: ignore[arg-type]
