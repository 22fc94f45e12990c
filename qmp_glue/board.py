"""What a machine is built on: its type, its NUMA nodes, its ports for hot-plug, and what a reset does to it.

A value, and nothing of a command line: commandline.py writes it down as a part of a Machine. Experiments and guest tests
choose one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qmp_glue.errors import MachineError

__all__ = ["MAX_NODES", "MAX_ROOT_PORTS", "PLAIN", "RAM_ALIGNMENT_BYTES", "Board", "equal_nodes", "root_port"]

# QEMU rounds -m up to this and then refuses a backend of another size (system/vl.c, set_memory_options, 11.1).
RAM_ALIGNMENT_BYTES = 8192
# Each takes a slot of q35's bus 0, which has 32 and some of its own devices on them; a test needs one or two.
MAX_ROOT_PORTS = 8
# QEMU's own bound (include/system/numa.h, MAX_NODES, 11.1).
MAX_NODES = 128


@dataclass(frozen=True)
class Board:
    """What a machine is built on. Raises MachineError for what QEMU would refuse, or never show to a guest.

    ``nodes``: bytes of each NUMA node, none for a machine without NUMA. ``root_ports``: free PCI Express ports of q35,
    named by root_port(), to plug devices into. ``reboots``: the guest's reset is one, and not the end of QEMU.
    ``force_legacy``: virtio-mmio devices of a microvm speak legacy virtio, without VERSION_1, as is QEMU's default.
    ``huge_pages``: memory is of huge pages of 2 MiB, from the host's pool. ``sealed``: its files cannot be cut short, as is
    QEMU's default for a memfd; a file on tmpfs always can.
    """

    kind: Literal["q35", "microvm"] = "q35"
    nodes: tuple[int, ...] = ()
    root_ports: int = 0
    reboots: bool = False
    force_legacy: bool = True
    huge_pages: bool = False
    sealed: bool = True

    def __post_init__(self) -> None:
        if any(size <= 0 or size % RAM_ALIGNMENT_BYTES for size in self.nodes):
            raise MachineError(
                f"NUMA nodes of {self.nodes} bytes: give multiples of {RAM_ALIGNMENT_BYTES} bytes"
            )
        if len(self.nodes) > MAX_NODES:
            raise MachineError(f"{len(self.nodes)} NUMA nodes: give at most {MAX_NODES}")
        if not 0 <= self.root_ports <= MAX_ROOT_PORTS:
            raise MachineError(f"{self.root_ports} root ports: give 0 to {MAX_ROOT_PORTS}")
        if self.kind == "microvm" and (self.nodes or self.root_ports):
            raise MachineError(
                "a microvm shows its guest neither NUMA nodes nor PCI Express: leave them out, or take a q35"
            )


# A q35 with one piece of memory, whose reset is the end of QEMU.
PLAIN = Board()


def equal_nodes(memory_bytes: int, count: int) -> tuple[int, ...]:
    """Return the sizes of so many NUMA nodes that share memory equally; the last takes what cannot be shared."""
    each = memory_bytes // count // RAM_ALIGNMENT_BYTES * RAM_ALIGNMENT_BYTES
    return (*[each] * (count - 1), memory_bytes - each * (count - 1))


def root_port(number: int) -> str:
    """Return the name of a root port, counted from 0: the bus to plug a device into."""
    return f"port{number}"
