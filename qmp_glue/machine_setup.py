"""What a machine is made of, as far as giving memory back depends on it; and reading that from a command line.

It judges nothing: inspect.py has the rules. running_setup.py reads the same from a QEMU that runs. Options in files
(-readconfig) are not followed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qmp_glue.device_words import PROPERTIES
from qmp_glue.option_text import is_on, parse_option, parse_size

__all__ = ["Backend", "Setup", "block_drivers", "is_balloon", "setup_of"]

_BALLOON = re.compile(r"virtio-balloon(-pci|-ccw|-device)?(-non-transitional|-transitional)?")
_VHOST_USER_GENERIC = re.compile(r"vhost-user-(test-)?device(-pci)?")
# Capabilities can be set as properties of the class "migration"; some have an x- there that they lack in QMP.
_CAPABILITY = re.compile(r"migration\.(?:x-)?([a-z-]+)=(\w+)")
_BLOCK_OPTIONS = frozenset({"blockdev", "drive", "hda", "hdb", "hdc", "hdd", "cdrom"})


@dataclass(frozen=True)
class Backend:
    """A memory backend: properties as QEMU names them."""

    kind: str
    name: str
    shared: bool
    size_bytes: int | None = None
    hugetlb: bool = False
    path: str = ""


@dataclass(frozen=True)
class Setup:
    """What the rules look at, wherever it was read.

    ``ram`` holds the backends that are guest RAM; ``memory_bytes`` is what -m asks for, ``backend_bytes`` what the
    backends of the machine or its NUMA nodes hold, plugged modules not counted. None is unknown. ``objects`` and
    ``devices`` are types. ``incoming`` is where an incoming migration is awaited from, ``migration`` the state of one
    that is under way, both empty if there is none; ``capabilities`` are the migration capabilities that are on.
    """

    memory_bytes: int | None = None
    backend_bytes: int | None = None
    ram: tuple[Backend, ...] = ()
    unused: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    confidential: str = ""
    balloons: int = 0
    vdpa_netdev: bool = False
    block_drivers: tuple[str, ...] = ()
    reconnecting: tuple[str, ...] = ()
    memory_locked: bool = False
    incoming: str = ""
    migration: str = ""
    capabilities: frozenset[str] = frozenset()


def setup_of(argv: Sequence[str]) -> Setup:
    """Read a command line. What is not understood is passed over: QEMU itself says what is malformed."""
    reader = _ArgumentReader()
    words = list(argv)
    for position, word in enumerate(words[:-1]):
        is_guests_word = words[position - 1] == "-append"
        if word.startswith("-") and not is_guests_word:
            reader.option(word.lstrip("-"), words[position + 1])
    return reader.setup()


@dataclass
class _ArgumentReader:
    """Gathers options, since they may stand in any order."""

    memory: str = ""
    mem_path: str = ""
    used: set[str] = field(default_factory=set)
    plugged: set[str] = field(default_factory=set)
    backends: list[dict[str, str]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    devices: list[dict[str, str]] = field(default_factory=list)
    chardevs: list[dict[str, str]] = field(default_factory=list)
    drivers: list[str] = field(default_factory=list)
    capabilities: dict[str, bool] = field(default_factory=dict)
    confidential: str = ""
    incoming: str = ""
    locked: bool = False
    vdpa: bool = False

    def option(self, name: str, value: str) -> None:
        """Take one option and its value."""
        match name:
            case "m":
                self.memory = parse_option(value, "size").get("size", self.memory)
            case "mem-path":
                self.mem_path = value
            case "machine" | "M":
                self._machine(parse_option(value, "type"))
            case "numa":
                self.used.add(parse_option(value, "type").get("memdev", ""))
            case "object":
                self._object(parse_option(value, "qom-type"))
            case "device":
                self.devices.append(parse_option(value, "driver"))
                self.plugged.add(self.devices[-1].get("memdev", ""))
            case "netdev" | "nic":
                self.vdpa |= parse_option(value, "type").get("type") == "vhost-vdpa"
            case "chardev":
                self.chardevs.append(parse_option(value, "backend"))
            case _:
                self._rarer_option(name, value)

    def _rarer_option(self, name: str, value: str) -> None:
        if name in _BLOCK_OPTIONS:
            self.drivers += block_drivers(parse_option(value, "filename"))
        elif name == "overcommit":
            self.locked |= parse_option(value, "mem-lock").get("mem-lock", "off") != "off"
        elif name == "incoming":
            self.incoming = value
        elif name == "global" and (matched := _CAPABILITY.fullmatch(value)):
            self.capabilities[matched[1]] = is_on(matched[2])

    def _machine(self, options: dict[str, str]) -> None:
        self.used.add(options.get("memory-backend", ""))
        self.confidential = options.get("confidential-guest-support", self.confidential)

    def _object(self, options: dict[str, str]) -> None:
        kind = options.get("qom-type", "")
        if kind.startswith("memory-backend-"):
            self.backends.append(options)
        else:
            self.others.append(kind)

    def setup(self) -> Setup:
        """Put together what was read."""
        main = [_backend(options) for options in self.backends if options.get("id") in self.used]
        plugged = [_backend(options) for options in self.backends if options.get("id") in self.plugged]
        if self.mem_path and not main:
            main = [Backend("memory-backend-file", "-mem-path", shared=False, path=self.mem_path)]
        names = [options.get("id", "") for options in self.backends]
        sizes = [backend.size_bytes for backend in main if backend.size_bytes is not None]
        balloons = [options for options in self.devices if is_balloon(options)]
        return Setup(
            memory_bytes=parse_size(self.memory, default_unit="m") if self.memory else None,
            backend_bytes=sum(sizes) if main and len(sizes) == len(main) else None,
            ram=(*main, *plugged),
            unused=tuple(name for name in names if name not in self.used | self.plugged),
            devices=tuple(options.get("driver", "") for options in self.devices),
            objects=tuple(self.others),
            confidential=self.confidential,
            balloons=len(balloons),
            vdpa_netdev=self.vdpa,
            block_drivers=tuple(self.drivers),
            reconnecting=self._reconnecting({options.get("chardev", "") for options in balloons}),
            memory_locked=self.locked,
            incoming=self.incoming,
            capabilities=frozenset(name for name, on in self.capabilities.items() if on),
        )

    def _reconnecting(self, fronted: set[str]) -> tuple[str, ...]:
        """Name the chardevs of balloons that reconnect."""
        reconnecting = [
            options
            for options in self.chardevs
            if any(options.get(name, "0") != "0" for name in ("reconnect", "reconnect-ms"))
        ]
        return tuple(options["id"] for options in reconnecting if options.get("id") in fronted)


def is_balloon(options: Mapping[str, str]) -> bool:
    """Return whether this is a balloon to the guest, whoever serves it."""
    driver = options.get("driver", "")
    if _VHOST_USER_GENERIC.fullmatch(driver):
        return options.get("virtio-id") == str(PROPERTIES["virtio-id"])
    return _BALLOON.fullmatch(driver) is not None


def block_drivers(options: Mapping[str, str]) -> list[str]:
    """Name the drivers of a block device's nodes; nvme://HOST-ADDRESS/N is a file name that means the driver nvme."""
    named = [value for key, value in options.items() if key.rpartition(".")[2] == "driver"]
    return [*named, *("nvme" for value in options.values() if value.startswith("nvme://"))]


def _backend(options: Mapping[str, str]) -> Backend:
    """memory-backend-memfd and -shm are shared unless told otherwise, the others are not (backends/hostmem-*.c, 11.1)."""
    kind = options["qom-type"]
    default = "on" if kind in {"memory-backend-memfd", "memory-backend-shm"} else "off"
    return Backend(
        kind=kind,
        name=options.get("id", ""),
        shared=is_on(options.get("share", default)),
        size_bytes=parse_size(options.get("size", "")),
        hugetlb=is_on(options.get("hugetlb", "off")),
        path=options.get("mem-path", ""),
    )
