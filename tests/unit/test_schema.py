"""The schema is true: it is whole, it says what is checked, and what is answered is as it says."""

from __future__ import annotations

from typing import Any

import pytest

from hostdev.errors import CommandError
from hostdev.qmp_session import version
from hostdev.qom import qom_list
from hostdev.schema import (
    BUILTINS,
    COMMANDS,
    EVENTS,
    GUEST_EVENTS,
    OBJECTS,
    Place,
    check_arguments,
    query_commands,
    query_qmp_schema,
)
from tests.schema_check import Schema

SCHEMA = Schema(query_qmp_schema())
OF_TYPE: dict[str, Any] = {"str": "x", "int": 1, "bool": True, "any": None, "[str]": ["x"]}


def test_every_type_exists_once_and_is_used() -> None:
    names = [entry["name"] for entry in query_qmp_schema()]
    assert len(names) == len(set(names))
    used = {name for entry in query_qmp_schema() for name in SCHEMA.references(entry)}
    assert used <= set(names)
    types = {name for name in names if name not in COMMANDS and name not in EVENTS}
    assert types == used, "a type that nothing refers to"


def test_it_is_small() -> None:
    """It goes to a client as one answer."""
    assert len(str(query_qmp_schema())) < 16 << 10


def test_it_describes_itself() -> None:
    SCHEMA.validate_return("query-qmp-schema", query_qmp_schema())
    SCHEMA.validate_return("query-commands", query_commands())
    SCHEMA.validate_return("query-version", version())
    for path in ("/", "/machine", "/machine/peripheral", "/machine/peripheral/balloon0"):
        SCHEMA.validate_return("qom-list", qom_list(path))


def test_the_validator_refuses() -> None:
    """Or the tests that rely on it would prove nothing."""
    wrongs: list[object] = [{}, {"actual": "1"}, {"actual": True}, {"actual": 1, "more": 1}, [], None]
    for wrong in wrongs:
        with pytest.raises(AssertionError):
            SCHEMA.validate_return("query-balloon", wrong)
    with pytest.raises(AssertionError):
        SCHEMA.validate_return("query-rings", [{"index": 0}])
    with pytest.raises(AssertionError):
        SCHEMA.validate_event("SHUTDOWN", {"guest": False})
    SCHEMA.validate_return("query-balloon", {"actual": 1})
    SCHEMA.validate_event("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_checked_is_what_is_said(name: str) -> None:
    """Arguments by the published schema are accepted; without one that it demands, or with another, refused."""
    members = SCHEMA.members(SCHEMA.entry(name)["arg-type"])
    whole = {member["name"]: OF_TYPE[member["type"]] for member in members}
    check_arguments(name, whole)
    for member in members:
        key = member["name"]
        less = {other: value for other, value in whole.items() if other != key}
        if "default" in member:
            check_arguments(name, less)
        else:
            with pytest.raises(CommandError, match=f"Parameter '{key}' is missing"):
                check_arguments(name, less)
        if member["type"] != "any":
            with pytest.raises(CommandError, match=f"Invalid parameter type for '{key}', expected: "):
                check_arguments(name, whole | {key: {}})
    with pytest.raises(CommandError, match="Parameter 'another' is unexpected"):
        check_arguments(name, whole | {"another": 1})


@pytest.mark.parametrize(
    ("value", "right"),
    [(0, True), (-(1 << 63), True), ((1 << 63) - 1, True), (1 << 63, False), (True, False), (1.0, False)],
)
def test_an_integer_is_one_of_64_bits(value: object, right: bool) -> None:
    if right:
        check_arguments("balloon", {"value": value})
    else:
        with pytest.raises(CommandError, match="expected: integer"):
            check_arguments("balloon", {"value": value})


def test_every_declaration_is_of_known_types() -> None:
    known = {*BUILTINS, *OBJECTS}
    for members in [
        *OBJECTS.values(),
        *EVENTS.values(),
        *(command.arguments for command in COMMANDS.values()),
    ]:
        assert {kind.strip("[]") for kind in members.values()} <= known
    assert {command.returns.strip("[]") for command in COMMANDS.values()} <= known


def test_who_carries_out_what() -> None:
    places = {
        place: {name for name, command in COMMANDS.items() if command.place is place} for place in Place
    }
    assert places[Place.SESSION] == {"qmp_capabilities"}
    assert places[Place.KEEPER] == {"quit", "guest-add", "guest-remove", "query-guests", "upgrade"}
    assert places[Place.CONTROL] == {"query-version", "query-commands", "query-qmp-schema", "qom-list"}


def test_a_guest_can_be_named_wherever_one_is_meant() -> None:
    about_one = {name for name, command in COMMANDS.items() if command.arguments.get("*guest") == "str"}
    assert about_one == {name for name, command in COMMANDS.items() if command.place is Place.DEVICE}
    assert all(EVENTS[name]["guest"] == "str" for name in GUEST_EVENTS)


def test_what_a_guest_is_to_the_keeper() -> None:
    inherited = {"name": "vm1", "connected": False, "restarts": 0}
    SCHEMA.validate_return("query-guests", [])
    SCHEMA.validate_return("query-guests", [inherited, {**inherited, "socket-path": "/x", "worker": 7}])
    for wrong in ({}, {**inherited, "more": 1}, {**inherited, "restarts": True}):
        with pytest.raises(AssertionError):
            SCHEMA.validate_return("query-guests", [wrong])


# The object tree


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/machine", ["peripheral"]),
        ("/machine/", ["peripheral"]),
        ("//machine//peripheral", ["balloon0"]),
        ("peripheral", ["balloon0"]),
        ("peripheral/balloon0", ["type", "guest-stats", "guest-stats-polling-interval"]),
        ("balloon0", ["type", "guest-stats", "guest-stats-polling-interval"]),
    ],
)
def test_objects(path: str, names: list[str]) -> None:
    assert [each["name"] for each in qom_list(path)] == names


def test_the_balloon_can_be_found_by_its_type() -> None:
    """As scripts do with QEMU: they look through /machine/peripheral for a child of that type."""
    assert qom_list("/machine/peripheral") == [{"name": "balloon0", "type": "child<virtio-balloon>"}]


@pytest.mark.parametrize("path", ["/foo", "foo", "/peripheral", "/machine/balloon0", "/balloon0"])
def test_objects_that_are_none(path: str) -> None:
    with pytest.raises(CommandError, match=f"Device '{path}' not found") as caught:
        qom_list(path)
    assert caught.value.error_class == "DeviceNotFound"
    with pytest.raises(CommandError, match="Path '' is ambiguous"):
        qom_list("")
