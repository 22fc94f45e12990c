"""A machine as a value, and the QEMU command line that makes it.

Pure: nothing is opened, started or looked up. Guest RAM is always one shared memfd, because a device outside QEMU can
give back only memory that it can map, and because its blocks then measure the guest's footprint whichever balloon the
machine has. vm.py runs the result; people print it to copy from.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeAlias

from qmp_glue.device_words import device_option, escaped
from qmp_glue.errors import MachineError

__all__ = [
    "AGENT_PORT",
    "BuiltInBalloon",
    "Channel",
    "Machine",
    "VhostUserBalloon",
    "arguments",
    "escaped",
    "inherited_fds",
]

AGENT_PORT = "org.vhost-user-balloon.agent.0"
MEMORY_ID = "mem"
# QEMU rounds -m up to this and then refuses a backend of another size (system/vl.c, set_memory_options, 11.1).
RAM_ALIGNMENT_BYTES = 8192

# The path of a UNIX socket, or the number of a connected one that QEMU inherits: no path, nothing to clean up.
Channel: TypeAlias = Path | int


@dataclass(frozen=True)
class VhostUserBalloon:
    """A balloon outside QEMU: a backend that listens on a path, or the other end of an inherited socket."""

    channel: Channel


@dataclass(frozen=True)
class BuiltInBalloon:
    """QEMU's own virtio-balloon-pci, to compare with."""

    free_page_reporting: bool = True


@dataclass(frozen=True)
class Machine:
    """An x86-64 q35 machine. Raises MachineError when it is made of what QEMU would refuse.

    ``agent``, ``qmp`` and ``qtest`` given as paths are listened on by QEMU; a balloon's path is connected to.
    ``extra`` stands last on the command line, word by word.
    """

    memory_bytes: int
    cpus: int = 1
    accelerator: Literal["kvm", "tcg", "qtest"] = "tcg"
    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""
    balloon: VhostUserBalloon | BuiltInBalloon | None = None
    console: Path | None = None
    agent: Channel | None = None
    qmp: Channel | None = None
    qtest: Channel | None = None
    paused: bool = False
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.memory_bytes <= 0 or self.memory_bytes % RAM_ALIGNMENT_BYTES:
            raise MachineError(
                f"memory of {self.memory_bytes} bytes: give a positive multiple of {RAM_ALIGNMENT_BYTES} bytes"
            )
        if self.cpus < 1:
            raise MachineError(f"{self.cpus} CPUs: give one or more")
        if self.kernel is None and (self.initrd is not None or self.append):
            raise MachineError("an initrd or a kernel command line without a kernel: name a kernel as well")
        for field in fields(self):
            if "\0" in str(getattr(self, field.name)):
                raise MachineError(f"{field.name} holds a NUL byte, which no command line can: remove it")


def inherited_fds(machine: Machine) -> tuple[int, ...]:
    """Return the descriptors that QEMU must inherit for this machine."""
    balloon = machine.balloon.channel if isinstance(machine.balloon, VhostUserBalloon) else None
    channels = (balloon, machine.agent, machine.qmp, machine.qtest)
    return tuple(channel for channel in channels if isinstance(channel, int))


def arguments(machine: Machine) -> list[str]:
    """Return the words after QEMU's own, as qmp_glue.find.Qemu.argv has it."""
    return [
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
        *_memory(machine),
        *("-accel", machine.accelerator, "-smp", str(machine.cpus)),
        *_boot(machine),
        *_console(machine),
        *_balloon(machine.balloon),
        *_agent(machine.agent),
        *_qmp(machine.qmp),
        *_qtest(machine.qtest),
        *(["-S"] if machine.paused else []),
        *machine.extra,
    ]


def _memory(machine: Machine) -> list[str]:
    size = machine.memory_bytes
    backend = f"memory-backend-memfd,id={MEMORY_ID},size={size},share=on"
    return ["-machine", f"q35,memory-backend={MEMORY_ID}", "-object", backend, "-m", f"{size}B"]


def _boot(machine: Machine) -> list[str]:
    """-kernel, -initrd and -append take their word whole: no commas are doubled."""
    words = [("-kernel", machine.kernel), ("-initrd", machine.initrd), ("-append", machine.append or None)]
    return [word for option, value in words if value is not None for word in (option, str(value))]


def _console(machine: Machine) -> list[str]:
    if machine.console is None:
        return []
    return ["-chardev", f"file,id=console,path={escaped(machine.console)}", "-serial", "chardev:console"]


def _balloon(balloon: VhostUserBalloon | BuiltInBalloon | None) -> list[str]:
    match balloon:
        case None:
            return []
        case BuiltInBalloon(free_page_reporting=reporting):
            return ["-device", f"virtio-balloon-pci,free-page-reporting={'on' if reporting else 'off'}"]
    chardev = _socket("balloon", balloon.channel, listen=False)
    return ["-chardev", chardev, "-device", device_option("balloon")]


def _agent(channel: Channel | None) -> list[str]:
    if channel is None:
        return []
    port = f"virtserialport,chardev=agent,name={AGENT_PORT}"
    return [
        "-device",
        "virtio-serial-pci",
        "-chardev",
        _socket("agent", channel, listen=True),
        "-device",
        port,
    ]


def _qmp(channel: Channel | None) -> list[str]:
    """-qmp rather than -mon, which 11.1 calls deprecated, or -object monitor-qmp, which older ones do not know."""
    if channel is None:
        return []
    return ["-chardev", _socket("qmp", channel, listen=True), "-qmp", "chardev:qmp"]


def _qtest(channel: Channel | None) -> list[str]:
    """Without a log of its own, every command would go to standard error."""
    if channel is None:
        return []
    chardev = _socket("qtest", channel, listen=True)
    return ["-chardev", chardev, "-qtest", "chardev:qtest", "-qtest-log", "none"]


def _socket(name: str, channel: Channel, *, listen: bool) -> str:
    if isinstance(channel, int):
        return f"socket,id={name},fd={channel}"
    return f"socket,id={name},path={escaped(channel)}" + (",server=on,wait=off" if listen else "")
