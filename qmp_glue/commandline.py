"""A machine as a value, and the QEMU command line that makes it.

Pure: nothing is opened, started or looked up. Guest RAM is always shared memfds, one or one a NUMA node, because a device
outside QEMU can give back only memory that it can map, and because their blocks then measure the guest's footprint
whichever balloon the machine has. vm.py runs the result; people print it to copy from.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeAlias

from qmp_glue.board import PLAIN, RAM_ALIGNMENT_BYTES, Board, root_port
from qmp_glue.device_words import Transport, device_option, escaped
from qmp_glue.errors import MachineError

__all__ = [
    "AGENT_PORT",
    "BALLOON_CHARDEV",
    "BuiltInBalloon",
    "Channel",
    "Machine",
    "VhostUserBalloon",
    "arguments",
    "escaped",
    "inherited_fds",
    "memory_sizes",
]

AGENT_PORT = "org.vhost-user-balloon.agent.0"
BALLOON_CHARDEV = "balloon"
MEMORY_ID = "mem"

# QEMU's default of x86-64, and instructions for random numbers: without them Linux measures the jitter of a loop until it
# has enough for the first program that asks (drivers/char/random.c, try_to_generate_entropy, 6.12), which is Python. A
# sixth of a boot's CPU time under emulation; on hardware it is nothing.
EMULATED_CPU = "qemu64,+rdrand,+rdseed"

# The path of a UNIX socket, or the number of a connected one that QEMU inherits: no path, nothing to clean up.
Channel: TypeAlias = Path | int


@dataclass(frozen=True)
class VhostUserBalloon:
    """A balloon outside QEMU: a backend that listens on a path, or the other end of an inherited socket.

    Unless ``plugged``, QEMU starts with the connection and without the device, which device_add brings later:
    hotplug.plug_balloon().
    """

    channel: Channel
    plugged: bool = True


@dataclass(frozen=True)
class BuiltInBalloon:
    """QEMU's own virtio-balloon-pci, to compare with."""

    free_page_reporting: bool = True


@dataclass(frozen=True)
class Machine:
    """An x86-64 machine. Raises MachineError when it is made of what QEMU would refuse.

    ``agent``, ``qmp`` and ``qtest`` given as paths are listened on by QEMU; a balloon's path is connected to.
    ``extra`` stands last on the command line, word by word.
    """

    memory_bytes: int
    board: Board = PLAIN
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
        if self.board.nodes and sum(self.board.nodes) != self.memory_bytes:
            raise MachineError(
                f"NUMA nodes of {sum(self.board.nodes)} bytes in all, memory of {self.memory_bytes}: make them equal"
            )
        unplugged = isinstance(self.balloon, VhostUserBalloon) and not self.balloon.plugged
        if unplugged and not self.board.root_ports:
            raise MachineError("a balloon to be plugged later, and no port for it: give a q35 root ports")
        if self.cpus < 1:
            raise MachineError(f"{self.cpus} CPUs: give one or more")
        if self.kernel is None and (self.initrd is not None or self.append):
            raise MachineError("an initrd or a kernel command line without a kernel: name a kernel as well")
        for field in fields(self):
            if "\0" in str(getattr(self, field.name)):
                raise MachineError(f"{field.name} holds a NUL byte, which no command line can: remove it")


def memory_sizes(machine: Machine) -> tuple[int, ...]:
    """Return the bytes of each memory backend, in the order in which QEMU makes them."""
    return machine.board.nodes or (machine.memory_bytes,)


def inherited_fds(machine: Machine) -> tuple[int, ...]:
    """Return the descriptors that QEMU must inherit for this machine."""
    balloon = machine.balloon.channel if isinstance(machine.balloon, VhostUserBalloon) else None
    channels = (balloon, machine.agent, machine.qmp, machine.qtest)
    return tuple(channel for channel in channels if isinstance(channel, int))


def arguments(machine: Machine) -> list[str]:
    """Return the words after QEMU's own, as qmp_glue.find.Qemu.argv has it."""
    return [
        *("-no-user-config", "-nodefaults", "-display", "none"),
        *([] if machine.board.reboots else ["-no-reboot"]),
        *_board(machine),
        *_memory(machine),
        *("-accel", machine.accelerator, "-smp", str(machine.cpus)),
        *(("-cpu", EMULATED_CPU) if machine.accelerator == "tcg" else ()),
        *_boot(machine),
        *_console(machine),
        *_balloon(machine),
        *_agent(machine),
        *_qmp(machine.qmp),
        *_qtest(machine.qtest),
        *(["-S"] if machine.paused else []),
        *machine.extra,
    ]


def _board(machine: Machine) -> list[str]:
    board = machine.board
    if board.kind == "microvm":
        return _microvm(machine)
    ports = [
        f"pcie-root-port,id={root_port(number)},chassis={number + 1}" for number in range(board.root_ports)
    ]
    return [
        "-machine",
        "q35" if board.nodes else f"q35,memory-backend={MEMORY_ID}",
        *(word for port in ports for word in ("-device", port)),
    ]


def _microvm(machine: Machine) -> list[str]:
    """ACPI shows the virtio-mmio devices to the guest, and brings power-off and reset.

    Linux takes ACPI without old hardware for a machine without a PIC, and does not mask one: the first timer tick would
    end it by a division error. And it has only the PIT to learn its clock from, which fails beside other load, unless
    both are counted in instructions. Seen with 6.1 to 7.3 under TCG, in every third boot.
    """
    words = ["-machine", f"microvm,acpi=on,pcie=off,pic=off,memory-backend={MEMORY_ID}"]
    if machine.accelerator == "tcg":
        words += ["-icount", "shift=auto"]
    return words if machine.board.force_legacy else [*words, "-global", "virtio-mmio.force-legacy=false"]


def _memory(machine: Machine) -> list[str]:
    """One backend is the machine's, which names it; several are each a NUMA node's."""
    words = ["-m", f"{machine.memory_bytes}B"]
    kind = ",hugetlb=on,hugetlbsize=2M" if machine.board.huge_pages else ""
    kind += "" if machine.board.sealed else ",seal=off"
    for number, size in enumerate(memory_sizes(machine)):
        name = f"{MEMORY_ID}{number}" if machine.board.nodes else MEMORY_ID
        words += ["-object", f"memory-backend-memfd,id={name},size={size},share=on{kind}"]
        if machine.board.nodes:
            words += ["-numa", f"node,nodeid={number},memdev={name}"]
    return words


def _boot(machine: Machine) -> list[str]:
    """-kernel, -initrd and -append take their word whole: no commas are doubled."""
    words = [("-kernel", machine.kernel), ("-initrd", machine.initrd), ("-append", machine.append or None)]
    return [word for option, value in words if value is not None for word in (option, str(value))]


def _console(machine: Machine) -> list[str]:
    if machine.console is None:
        return []
    return ["-chardev", f"file,id=console,path={escaped(machine.console)}", "-serial", "chardev:console"]


def _driver(name: str, board: Board) -> str:
    """Return what one of QEMU's own virtio devices is called on the board's bus."""
    return f"{name}-pci" if board.kind == "q35" else f"{name}-device"


def _balloon(machine: Machine) -> list[str]:
    match machine.balloon:
        case None:
            return []
        case BuiltInBalloon(free_page_reporting=reporting):
            driver = _driver("virtio-balloon", machine.board)
            return ["-device", f"{driver},free-page-reporting={'on' if reporting else 'off'}"]
    chardev = ["-chardev", _socket(BALLOON_CHARDEV, machine.balloon.channel, listen=False)]
    if not machine.balloon.plugged:
        return chardev
    transport: Transport = "pci" if machine.board.kind == "q35" else "mmio"
    return [*chardev, "-device", device_option(BALLOON_CHARDEV, transport=transport)]


def _agent(machine: Machine) -> list[str]:
    if machine.agent is None:
        return []
    port = f"virtserialport,chardev=agent,name={AGENT_PORT}"
    chardev = _socket("agent", machine.agent, listen=True)
    return ["-device", _driver("virtio-serial", machine.board), "-chardev", chardev, "-device", port]


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
