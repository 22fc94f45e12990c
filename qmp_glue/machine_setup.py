"""What a machine is made of, as far as giving memory back depends on it: read from a command line, or over QMP.

It reads and judges nothing: inspect.py has the rules. Over QMP it sends only queries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from qmp_glue.errors import CommandFailedError

if TYPE_CHECKING:
    from collections.abc import Awaitable

__all__ = ["Backend", "Executes", "Setup", "running_setup", "setup_of"]

# qapi/common: the suffixes of a size; -m alone takes MiB where there is none.
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_BALLOON = re.compile(r"virtio-balloon(-pci|-ccw|-device)?(-non-transitional|-transitional)?")
_VHOST_USER_GENERIC = re.compile(r"vhost-user-(test-)?device(-pci)?")
_BALLOON_DEVICE_ID = "5"  # virtio 1.2, 5.5


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
    backends of the machine or its NUMA nodes hold, plugged modules not counted. None is unknown.
    """

    memory_bytes: int | None = None
    backend_bytes: int | None = None
    ram: tuple[Backend, ...] = ()
    unused: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    balloons: int = 0
    vdpa_netdev: bool = False
    reconnecting: tuple[str, ...] = ()


class Executes(Protocol):
    """What can ask a QEMU: a Monitor or a VirtualMachine."""

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Awaitable[object]:
        """Send a command and return its answer."""


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
    vdpa: bool = False

    def option(self, name: str, value: str) -> None:
        """Take one option and its value."""
        match name:
            case "m":
                self.memory = _parse_option(value, "size").get("size", self.memory)
            case "mem-path":
                self.mem_path = value
            case "machine" | "M":
                self.used.add(_parse_option(value, "type").get("memory-backend", ""))
            case "numa":
                self.used.add(_parse_option(value, "type").get("memdev", ""))
            case "object":
                self._object(_parse_option(value, "qom-type"))
            case "device":
                self.devices.append(_parse_option(value, "driver"))
                self.plugged.add(self.devices[-1].get("memdev", ""))
            case "netdev" | "nic":
                self.vdpa |= _parse_option(value, "type").get("type") == "vhost-vdpa"
            case "chardev":
                self.chardevs.append(_parse_option(value, "backend"))

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
        balloons = [options for options in self.devices if _is_balloon(options)]
        fronted = {options.get("chardev") for options in balloons}
        return Setup(
            memory_bytes=_size(self.memory, default_unit="m") if self.memory else None,
            backend_bytes=sum(sizes) if main and len(sizes) == len(main) else None,
            ram=(*main, *plugged),
            unused=tuple(name for name in names if name not in self.used | self.plugged),
            devices=tuple(options.get("driver", "") for options in self.devices),
            objects=tuple(self.others),
            balloons=len(balloons),
            vdpa_netdev=self.vdpa,
            reconnecting=tuple(
                options.get("id", "")
                for options in self.chardevs
                if options.get("id") in fronted and _reconnects(options)
            ),
        )


def _reconnects(options: Mapping[str, str]) -> bool:
    return any(options.get(name, "0") != "0" for name in ("reconnect", "reconnect-ms"))


def _is_balloon(options: Mapping[str, str]) -> bool:
    driver = options.get("driver", "")
    if _VHOST_USER_GENERIC.fullmatch(driver):
        return options.get("virtio-id") == _BALLOON_DEVICE_ID
    return _BALLOON.fullmatch(driver) is not None


def _backend(options: Mapping[str, str]) -> Backend:
    """memory-backend-memfd is shared unless told otherwise, the others are not (backends/hostmem-memfd.c, 11.1)."""
    kind = options["qom-type"]
    default = "on" if kind == "memory-backend-memfd" else "off"
    return Backend(
        kind=kind,
        name=options.get("id", ""),
        shared=options.get("share", default) in {"on", "true", "yes", "y"},
        size_bytes=_size(options.get("size", ""), default_unit=""),
        hugetlb=options.get("hugetlb", "off") in {"on", "true", "yes", "y"},
        path=options.get("mem-path", ""),
    )


def _parse_option(text: str, implied: str) -> dict[str, str]:
    """Parse ``first,key=value,flag`` with doubled commas, or the JSON that -object and -device take as well."""
    if text.startswith("{"):
        return _parse_json(text)
    parsed = {}
    for position, part in enumerate(re.split(r",(?!,)", text.replace(",,", "\0"))):
        key, equals, value = part.replace("\0", ",").partition("=")
        if equals:
            parsed[key] = value
        elif position == 0:
            parsed[implied] = key
        else:
            parsed[key] = "on"
    return parsed


def _parse_json(text: str) -> dict[str, str]:
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    words = {"True": "on", "False": "off"}
    return {key: words.get(str(value), str(value)) for key, value in values.items()}


def _size(text: str, *, default_unit: str) -> int | None:
    """Return bytes, or None for what is no size."""
    matched = re.fullmatch(r"(0x[0-9a-f]+|\d+(?:\.\d+)?)([bkmgt]?)i?b?", text.lower())
    if matched is None:
        return None
    number = int(matched[1], 16) if matched[1].startswith("0x") else float(matched[1])
    return int(number * _UNITS[matched[2] or default_unit])


async def running_setup(qemu: Executes) -> Setup:
    """Ask for what the rules need. Sizes are left out: QEMU does not start when they differ."""
    objects = dict(await _children(qemu, "/objects"))
    devices = [
        kind
        for folder in ("/machine/peripheral", "/machine/peripheral-anon")
        for _, kind in await _children(qemu, folder)
    ]
    network = await qemu.execute("human-monitor-command", {"command-line": "info network"})
    return Setup(
        ram=tuple(await _running_backends(qemu, objects)),
        devices=tuple(devices),
        objects=tuple(objects.values()),
        balloons=await _running_balloons(qemu),
        vdpa_netdev="type=vhost-vdpa" in str(network),
    )


async def _running_balloons(qemu: Executes) -> int:
    """Count what is a balloon to the guest, whoever serves it. QEMU calls having no virtio device at all an error."""
    try:
        answer = await qemu.execute("x-query-virtio")
    except CommandFailedError:
        return 0
    return sum(entry["name"] == "virtio-balloon" for entry in _entries(answer))


async def _running_backends(qemu: Executes, objects: Mapping[str, str]) -> list[Backend]:
    """List guest RAM's backends; that of a plain -m has the machine's own name for it, such as pc.ram."""
    found = []
    for entry in _entries(await qemu.execute("query-memdev")):
        name = str(entry.get("id", ""))
        kind, path = objects.get(name, ""), f"/objects/{name}"
        found.append(
            Backend(
                kind=kind,
                name=name,
                shared=bool(entry["share"]),
                hugetlb=kind == "memory-backend-memfd" and bool(await _property(qemu, path, "hugetlb")),
                path=str(await _property(qemu, path, "mem-path") or "")
                if kind == "memory-backend-file"
                else "",
            )
        )
    return found


async def _property(qemu: Executes, path: str, name: str) -> object:
    """Return a QOM property, or None where this object has none of that name."""
    try:
        return await qemu.execute("qom-get", {"path": path, "property": name})
    except CommandFailedError:
        return None


async def _children(qemu: Executes, path: str) -> list[tuple[str, str]]:
    """Return (name, type) of an object's children: QEMU writes their types as child<TYPE>."""
    answer = await qemu.execute("qom-list", {"path": path})
    matched = (
        (str(entry["name"]), re.fullmatch(r"child<(.*)>", str(entry["type"]))) for entry in _entries(answer)
    )
    return [(name, kind[1]) for name, kind in matched if kind is not None]


def _entries(answer: object) -> list[dict[str, object]]:
    """Narrow an answer that QEMU's schema defines as an array of objects."""
    return [entry for entry in answer if isinstance(entry, dict)] if isinstance(answer, list) else []
