"""Checks values against what query-qmp-schema answered, ours or another's of that form. Not a test; used by many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class Schema:
    """The entries of one answer to query-qmp-schema."""

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._entries = {entry["name"]: entry for entry in entries}

    def entry(self, name: str) -> Mapping[str, Any]:
        return self._entries[name]

    def members(self, name: str) -> list[Mapping[str, Any]]:
        """Members of an object type."""
        return list(self._entries[name]["members"])

    @staticmethod
    def references(entry: Mapping[str, Any]) -> Iterator[str]:
        """Names of the types that an entry refers to."""
        for key in ("arg-type", "ret-type", "element-type"):
            if key in entry:
                yield entry[key]
        for member in entry.get("members", ()):
            yield member["type"]

    def validate_return(self, command: str, value: object) -> None:
        """Assert that a command may answer so."""
        self._validate(self._entries[command]["ret-type"], value, command)

    def validate_event(self, event: str, data: object) -> None:
        """Assert that an event may say so."""
        self._validate(self._entries[event]["arg-type"], data, event)

    def _validate(self, kind: str, value: object, where: str) -> None:
        entry = self._entries[kind]
        if entry["meta-type"] == "array":
            assert isinstance(value, list), where
            for index, element in enumerate(value):
                self._validate(entry["element-type"], element, f"{where}[{index}]")
        elif entry["meta-type"] == "object":
            self._validate_object(entry, value, where)
        else:
            assert _is_builtin(entry["json-type"], value), f"{where} is no {kind}: {value!r}"

    def _validate_object(self, entry: Mapping[str, Any], value: object, where: str) -> None:
        assert isinstance(value, dict), where
        members = {member["name"]: member for member in entry["members"]}
        assert value.keys() <= members.keys(), f"{where} has undeclared members"
        for name, member in members.items():
            if name in value:
                self._validate(member["type"], value[name], f"{where}.{name}")
            else:
                assert "default" in member, f"{where} lacks {name}"


def _is_builtin(json_type: str, value: object) -> bool:
    """For Python true and false are integers; for JSON they are not."""
    kinds: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "int": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "value": (object,),
    }
    if isinstance(value, bool):
        return json_type in ("boolean", "value")
    return isinstance(value, kinds[json_type])
