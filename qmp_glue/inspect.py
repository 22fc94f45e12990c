"""What in somebody's QEMU would make giving memory back unsafe or useless, said before it hurts.

Two looks with the same rules: at a command line before it runs, and at a running QEMU over QMP. Each finding names its
fix. It changes nothing and sends only queries. The device's users call it on their own command lines; doctor prints it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from qmp_glue.errors import CommandFailedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

__all__ = [
    "Executes",
    "Finding",
    "Setup",
    "filesystem_type",
    "inspect_arguments",
    "inspect_running",
    "judge",
    "setup_of",
]

# qapi/common: the suffixes of a size; -m alone takes MiB where there is none.
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "hugetlbfs", "ramfs"})
# Objects that encrypt or measure guest memory: the host cannot take pages out from under them.
_CONFIDENTIAL = re.compile(r"(sev|tdx)(-snp)?-guest")
_BALLOON = re.compile(r"virtio-balloon(-pci|-ccw|-device)?(-non-transitional|-transitional)?")
_VHOST_USER_GENERIC = re.compile(r"vhost-user-(test-)?device(-pci)?")
_BALLOON_DEVICE_ID = "5"  # virtio 1.2, 5.5


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``rule`` is its stable name, ``message`` says what and how to put it right."""

    severity: Literal["error", "warning"]
    rule: str
    message: str


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


def inspect_arguments(
    argv: Sequence[str], *, filesystem: Callable[[str], str] | None = None
) -> list[Finding]:
    """Judge a QEMU command line, given with or without the program's name. ``filesystem`` tells the type under a path."""
    return judge(setup_of(argv), filesystem=filesystem or filesystem_type)


async def inspect_running(qemu: Executes, *, filesystem: Callable[[str], str] | None = None) -> list[Finding]:
    """Judge a running QEMU. Raises what its execute() raises."""
    return judge(await _running_setup(qemu), filesystem=filesystem or filesystem_type)


def judge(setup: Setup, *, filesystem: Callable[[str], str]) -> list[Finding]:
    """Apply all rules."""
    return [*_memory_findings(setup, filesystem), *_device_findings(setup)]


def _memory_findings(setup: Setup, filesystem: Callable[[str], str]) -> Iterator[Finding]:
    if not setup.ram:
        hint = (
            f"add memory-backend={setup.unused[0]} to -machine"
            if setup.unused
            else (
                "add -object memory-backend-memfd,id=mem,size=SIZE,share=on and -machine memory-backend=mem"
            )
        )
        yield Finding("error", "memory-anonymous", f"guest RAM is anonymous memory of QEMU alone: {hint}")
    for backend in setup.ram:
        yield from _backend_findings(backend, filesystem)
    if None not in (setup.memory_bytes, setup.backend_bytes) and setup.memory_bytes != setup.backend_bytes:
        yield Finding(
            "error",
            "memory-size",
            f"memory backends hold {setup.backend_bytes} bytes, -m asks for {setup.memory_bytes}: give both the same size",
        )


def _backend_findings(backend: Backend, filesystem: Callable[[str], str]) -> Iterator[Finding]:
    name = f"memory backend {backend.name!r}"
    if backend.kind == "memory-backend-ram":
        message = (
            f"{name} is anonymous memory, which no other process can map: make it a memory-backend-memfd"
        )
        yield Finding("error", "memory-anonymous", message)
    elif not backend.shared:
        yield Finding("error", "memory-unshared", f"{name} is not shared: add share=on")
    kind = filesystem(backend.path) if backend.path else "tmpfs"
    if kind not in _MEMORY_FILE_SYSTEMS:
        message = (
            f"{name} is a file on {kind}: a hole frees disk, not memory; use memory-backend-memfd or /dev/shm"
        )
        yield Finding("error", "memory-on-disk", message)
    if backend.hugetlb or kind == "hugetlbfs":
        message = (
            f"{name} is of huge pages: one that is given back may be taken by another process, and the guest's next "
            "touch then kills QEMU; leave out hugetlb and use transparent huge pages"
        )
        yield Finding("error", "memory-hugetlb", message)


def _device_findings(setup: Setup) -> Iterator[Finding]:
    for device in setup.devices:
        if device.startswith("vfio-"):
            message = (
                f"{device} lets hardware write into pages that were given back: remove it or the balloon"
            )
            yield Finding("error", "vfio", message)
    if setup.vdpa_netdev or any(device.startswith("vhost-vdpa") for device in setup.devices):
        message = "vhost-vdpa pins guest memory for hardware: use a vhost or vhost-user device instead"
        yield Finding("error", "vdpa", message)
    for kind in filter(_CONFIDENTIAL.fullmatch, setup.objects):
        message = (
            f"{kind} encrypts guest memory, which the host then cannot take back: remove it or the balloon"
        )
        yield Finding("error", "confidential", message)
    if setup.balloons > 1:
        message = f"there are {setup.balloons} balloons, and a guest's driver serves one: remove all but one"
        yield Finding("error", "two-balloons", message)
    for name in setup.reconnecting:
        message = (
            f"chardev {name!r} reconnects, and QEMU aborts when the device's does: remove reconnect from it"
        )
        yield Finding("error", "reconnect", message)


def setup_of(argv: Sequence[str]) -> Setup:
    """Read a command line. What is not understood is passed over: QEMU itself says what is malformed."""
    reader = _ArgumentReader()
    words = list(argv)
    for position, word in enumerate(words[:-1]):
        if word.startswith("-"):
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


def filesystem_type(path: str) -> str:
    """Return the type of the file system that holds this path, by the longest mount point above it (proc(5))."""
    resolved = Path(path).resolve()
    best, kind = -1, "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, found, *_ = line.split()
        mount = Path(point.replace("\\040", " "))
        if resolved.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), found
    return kind


async def _running_setup(qemu: Executes) -> Setup:
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
