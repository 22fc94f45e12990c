"""The commands, events and types of the control socket, declared once.

Written as QAPI writes them (docs/devel/qapi-code-gen): a member is a name and a type, a name with a star is optional,
"[type]" is an array. Checking arguments, query-commands and query-qmp-schema are all derived from these tables, so none
of them can promise what another does not keep. The texts of errors are QEMU's. Pure; used by qmp_session.py and control.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

from hostdev.errors import CommandError
from hostdev.wire.balloon import STATISTIC_NAMES

Members: TypeAlias = Mapping[str, str]


# What every command about a guest has: it may be left out where one guest alone is served.
_GUEST: Members = {"*guest": "str"}


class Place(Enum):
    """Who carries a command out."""

    SESSION = "the client's session"
    CONTROL = "the control process"
    KEEPER = "the keeper"
    DEVICE = "the worker"


@dataclass(frozen=True, slots=True)
class Command:
    """arguments: by name. returns: a type. place: who carries it out."""

    arguments: Members = field(default_factory=dict)
    returns: str = "Nothing"
    place: Place = Place.DEVICE


# Introspect: json-type of each builtin, and the word of QEMU's errors for it.
BUILTINS: Mapping[str, tuple[str, str]] = {
    "str": ("string", "string"),
    "int": ("int", "integer"),
    "number": ("number", "number"),
    "bool": ("boolean", "boolean"),
    "any": ("value", "value"),
}

OBJECTS: Mapping[str, Members] = {
    "Nothing": {},
    "VersionTriple": {"major": "int", "minor": "int", "micro": "int"},
    "VersionInfo": {"qemu": "VersionTriple", "package": "str"},
    "CommandInfo": {"name": "str"},
    "ObjectPropertyInfo": {"name": "str", "type": "str"},
    "SchemaMember": {"name": "str", "type": "str", "*default": "any"},
    # QEMU's is a union over meta-type; here one object has what any of its branches has.
    "SchemaInfo": {
        "name": "str",
        "meta-type": "str",
        "*json-type": "str",
        "*element-type": "str",
        "*members": "[SchemaMember]",
        "*arg-type": "str",
        "*ret-type": "str",
    },
    # worker: process id, while a front end is connected. restarts: how many workers were replaced under a front end.
    "GuestInfo": {
        "name": "str",
        "*socket-path": "str",
        "connected": "bool",
        "*worker": "int",
        "restarts": "int",
    },
    "BalloonInfo": {"actual": "int"},
    "StatusInfo": {
        "connected": "bool",
        "*running": "bool",
        "*target": "int",
        "*actual": "int",
        "*memory": "int",
        "*inhibited": "bool",
        "*inert": "bool",
        "*reason": "str",
        "*features": "[str]",
        "*negotiated": "[str]",
        "*poison-value": "int",
        "*hinting": "str",
        "*worker": "int",
        "*released": "int",
        "*sandbox": "str",
    },
    "MemoryRegionInfo": {
        "guest-address": "int",
        "size": "int",
        "page-size": "int",
        "backing": "str",
        "method": "str",
        "*footprint": "int",
        "released-report": "int",
        "released-inflate": "int",
        "withheld": "int",
    },
    "RingInfo": {
        "index": "int",
        "*role": "str",
        "size": "int",
        "enabled": "bool",
        "started": "bool",
        "next-available": "int",
        "used": "int",
        "outstanding": "int",
        "chains": "int",
    },
    "GuestStatistics": dict.fromkeys(STATISTIC_NAMES, "int"),
    "UnknownStatistic": {"tag": "int", "value": "int"},
    "GuestStatisticsInfo": {
        "stats": "GuestStatistics",
        "last-update": "int",
        "*unknown": "[UnknownStatistic]",
    },
    "FreeEstimate": {"bytes": "int", "blocks": "int", "seconds": "number", "complete": "bool"},
}

COMMANDS: Mapping[str, Command] = {
    "qmp_capabilities": Command({"*enable": "[str]"}, place=Place.SESSION),
    "query-version": Command(returns="VersionInfo", place=Place.CONTROL),
    "query-commands": Command(returns="[CommandInfo]", place=Place.CONTROL),
    "query-qmp-schema": Command(returns="[SchemaInfo]", place=Place.CONTROL),
    "qom-list": Command({"path": "str"}, "[ObjectPropertyInfo]", Place.CONTROL),
    "quit": Command({"*force": "bool"}, place=Place.KEEPER),
    "guest-add": Command({"socket-path": "str"}, place=Place.KEEPER),
    "guest-remove": Command({"guest": "str"}, place=Place.KEEPER),
    "query-guests": Command(returns="[GuestInfo]", place=Place.KEEPER),
    "upgrade": Command(place=Place.KEEPER),
    "balloon": Command({"value": "int", **_GUEST}),
    "query-balloon": Command(_GUEST, "BalloonInfo"),
    "set-target": Command({"*size": "int", "*percent": "int", **_GUEST}),
    "qom-get": Command({"path": "str", "property": "str", **_GUEST}, "any"),
    "qom-set": Command({"path": "str", "property": "str", "value": "any", **_GUEST}),
    "query-balloon-stats": Command({"*refresh": "bool", **_GUEST}, "GuestStatisticsInfo"),
    "query-status": Command(_GUEST, "StatusInfo"),
    "query-memory": Command(_GUEST, "[MemoryRegionInfo]"),
    "query-rings": Command(_GUEST, "[RingInfo]"),
    "inhibit": Command(_GUEST),
    "allow": Command(_GUEST),
    "estimate-free": Command(_GUEST, "FreeEstimate"),
}

EVENTS: Mapping[str, Members] = {
    "BALLOON_CHANGE": {"actual": "int", "guest": "str"},
    # QEMU's own "guest", which says whether the guest asked for it.
    "SHUTDOWN": {"guest": "bool", "reason": "str"},
}
# Those that a worker may tell. Which guest it is about the control process knows and the worker does not.
GUEST_EVENTS = frozenset({"BALLOON_CHANGE"})


# Arguments


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Check a command's arguments. Raises CommandError with QEMU's text for the first that is wrong.

    Declared ones first, in the order of their declaration, then those that are not declared; as QEMU's visitors do.
    """
    if name not in COMMANDS:
        raise CommandError(f"The command {name} has not been found", "CommandNotFound")
    members = COMMANDS[name].arguments
    for member, kind in members.items():
        key = member.removeprefix("*")
        if key in arguments:
            _check(key, kind, arguments[key])
        elif key == member:
            raise CommandError(f"Parameter '{key}' is missing")
    known = {member.removeprefix("*") for member in members}
    for key in arguments:
        if key not in known:
            raise CommandError(f"Parameter '{key}' is unexpected")


def _check(where: str, kind: str, value: object) -> None:
    if kind.startswith("["):
        if not isinstance(value, list):
            raise CommandError(f"Invalid parameter type for '{where}', expected: array")
        for index, element in enumerate(value):
            _check(f"{where}[{index}]", kind[1:-1], element)
    elif not _MATCHES[kind](value):
        raise CommandError(f"Invalid parameter type for '{where}', expected: {BUILTINS[kind][1]}")


def _is_int(value: object) -> bool:
    """An integer of QAPI's type int, which is signed and has 64 bits; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


_MATCHES: Mapping[str, Callable[[object], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": _is_int,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "bool": lambda value: isinstance(value, bool),
    "any": lambda _value: True,
}


# Introspection


def query_commands() -> list[dict[str, str]]:
    """Answer query-commands."""
    return [{"name": name} for name in COMMANDS]


def query_qmp_schema() -> list[dict[str, Any]]:
    """Answer query-qmp-schema, in the form of QEMU's. Arguments of a command make an object type of their own."""
    return [
        *_command_entries(),
        *_event_entries(),
        *_object_entries(),
        *_array_entries(),
        *_builtin_entries(),
    ]


def _command_entries() -> Iterator[dict[str, Any]]:
    for name, command in COMMANDS.items():
        argument_type = f"{name}-arg" if command.arguments else "Nothing"
        yield {"name": name, "meta-type": "command", "arg-type": argument_type, "ret-type": command.returns}


def _event_entries() -> Iterator[dict[str, Any]]:
    for name in EVENTS:
        yield {"name": name, "meta-type": "event", "arg-type": f"{name}-arg"}


def _all_objects() -> dict[str, Members]:
    commands = {f"{name}-arg": command.arguments for name, command in COMMANDS.items() if command.arguments}
    return {**OBJECTS, **commands, **{f"{name}-arg": members for name, members in EVENTS.items()}}


def _object_entries() -> Iterator[dict[str, Any]]:
    for name, members in _all_objects().items():
        yield {
            "name": name,
            "meta-type": "object",
            "members": [_member(member, kind) for member, kind in members.items()],
        }


def _member(member: str, kind: str) -> dict[str, Any]:
    """An optional member is one that has a default, which is null, as QEMU has it."""
    optional = {"default": None} if member.startswith("*") else {}
    return {"name": member.removeprefix("*"), "type": kind, **optional}


def _array_entries() -> Iterator[dict[str, Any]]:
    members = [kind for each in _all_objects().values() for kind in each.values()]
    returned = [command.returns for command in COMMANDS.values()]
    for kind in dict.fromkeys([*members, *returned]):
        if kind.startswith("["):
            yield {"name": kind, "meta-type": "array", "element-type": kind[1:-1]}


def _builtin_entries() -> Iterator[dict[str, Any]]:
    for name, (json_type, _word) in BUILTINS.items():
        yield {"name": name, "meta-type": "builtin", "json-type": json_type}
