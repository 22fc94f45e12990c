"""Tables as TOML has them -> the structs of scenario.py: types, units and misspelt keys, each error with its path.

Pure, and knows nothing of what the values mean together: scenario_check.py does. Used by scenario_file.py alone. An index
in a path counts from 1, as people count the [[phase]] tables of a file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from balloonlab.durations import parse_duration
from balloonlab.errors import UsageError
from balloonlab.measure.scenario import Phase
from balloonlab.sizes import parse_size

Table = Mapping[str, Any]
AnyStruct = TypeVar("AnyStruct", bound=msgspec.Struct)

PHASES: dict[str, type[Phase]] = {str(kind.__struct_config__.tag): kind for kind in get_args(Phase)}

# Fields that people may write with a unit, and how a value of theirs is described.
_UNITS: dict[str, tuple[Callable[[str], float], str]] = {
    "memory": (parse_size, 'a size, such as "512M", or bytes'),
    "size": (parse_size, 'a size, such as "256M", or bytes'),
    "deadline": (parse_duration, 'a duration, such as "30s", or seconds'),
    "hold": (parse_duration, 'a duration, such as "30s", or seconds'),
}
_KINDS = {str: "a text in quotes", int: "a whole number", bool: "true or false", dict: "a table of texts"}
# What msgspec and JSON can carry: 64 bits with a sign. TOML's hexadecimal numbers may have any length.
_LIMIT = 1 << 63
_SHOWN_CHARACTERS = 60


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ", did you mean ...?" for a known word that is near, and an empty text where none is."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def shown(value: object) -> str:
    """Return a TOML value as an error message shows it: short, on one line, and whatever its size."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "an array"
    if _is_long(value):
        return "a number of more than 64 bits"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def table_of(value: object, path: str) -> Table:
    """Return a value that must be a table. Raises UsageError."""
    if not isinstance(value, dict):
        raise UsageError(f"{path} is {shown(value)}: make it a table, [{path}]")
    return value


def refuse_unknown(table: Table, known: Iterable[str], path: str) -> None:
    """Raise UsageError for the first key that is none of the known ones."""
    choices = list(known)
    for key in table:
        if key not in choices:
            near = did_you_mean(key.replace("-", "_"), choices)
            raise UsageError(
                f"{_join(path, shown(key)[1:-1])} is not known{near or ':'} choose one of {', '.join(choices)}"
            )


def to_struct(table: Table, kind: type[AnyStruct], path: str) -> AnyStruct:
    """Return a table as a struct of this kind. Raises UsageError, which names the path of what is wrong."""
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    refuse_unknown(table, fields, path)
    for name, field in fields.items():
        if field.required and name not in table:
            raise UsageError(f"{_join(path, name)} is missing: give {_wanted(name, field.type)}")
    return kind(**{name: _value(table[name], fields[name].type, _join(path, name)) for name in table})


def to_phase(value: object, path: str) -> Phase:
    """Return one [[phase]] table as a phase; its key "do" says which. Raises UsageError."""
    table = dict(table_of(value, path))
    choices = ", ".join(PHASES)
    if "do" not in table:
        raise UsageError(f"{path}.do is missing: choose one of {choices}")
    do = table.pop("do")
    if not isinstance(do, str) or do not in PHASES:
        near = did_you_mean(do, PHASES) if isinstance(do, str) else ""
        raise UsageError(f"{path}.do is {shown(do)}{near or ':'} choose one of {choices}")
    return to_struct(table, PHASES[do], path)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _value(value: object, wanted: Any, path: str) -> Any:  # noqa: ANN401  (a field's type and a value of it)
    """Return a value as a field of this type has it. Raises UsageError."""
    name = path.rpartition(".")[2]
    if _is_long(value):
        raise _wrong(value, wanted, path)
    try:
        if name in _UNITS and isinstance(value, str):
            value = _UNITS[name][0](value)
        return msgspec.convert(value, wanted)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except msgspec.ValidationError as error:
        raise _wrong(value, wanted, path) from error


def _wrong(value: object, wanted: Any, path: str) -> UsageError:  # noqa: ANN401
    choices = [one for one in get_args(wanted) if isinstance(one, str)]
    near = did_you_mean(value, choices) if isinstance(value, str) else ""
    return UsageError(
        f"{path} is {shown(value)}{near or ':'} give {_wanted(path.rpartition('.')[2], wanted)}"
    )


def _is_long(value: object) -> bool:
    return isinstance(value, int) and not -_LIMIT <= value < _LIMIT


def _wanted(name: str, kind: Any) -> str:  # noqa: ANN401  (a field's type)
    """Say what a field takes."""
    if name in _UNITS:
        return _UNITS[name][1]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    plain = next((one for one in get_args(kind) if one in _KINDS), kind)
    return _KINDS.get(get_origin(kind) or plain, "a number")
