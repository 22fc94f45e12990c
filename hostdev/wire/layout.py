"""One layout, declared once: a construct declaration tied to the frozen dataclass that it decodes into.

Not a parser of its own: construct decodes. Where that is too slow for the work beside it (a descriptor costs 11 us
interpreted and 0.2 us with struct), lower() turns the same declaration into a struct.Struct at import; a property test
proves both equal. construct's own compile() is not used: its documentation calls it unsafe for untrusted data.

Used by the declarations in this folder and by nothing else.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any, Generic, TypeVar

import construct

from hostdev.errors import BalloonError

Value = TypeVar("Value")


class LayoutError(BalloonError):
    """Bytes that do not hold the declared layout: too short, too long, or out of the declared bounds."""


class Layout(Generic[Value]):
    """A construct declaration and the dataclass of its values. The field names of both are the same."""

    def __init__(self, declaration: construct.Construct[Any, Any], value: type[Value]) -> None:
        self.declaration = declaration
        self._exact = construct.Struct("value" / declaration, "end" / construct.Terminated)
        self._value = value

    def decode(self, data: bytes) -> Value:
        """Decode data, which must hold exactly one value. Raises LayoutError."""
        try:
            parsed = self._exact.parse(data)["value"]
        except construct.ConstructError as error:
            raise LayoutError(f"{self._value.__name__}: {error}") from error
        return self.build_value(parsed)

    def encode(self, value: Value) -> bytes:
        """Encode one value. Raises LayoutError if a field does not fit its declared width."""
        try:
            return bytes(self.declaration.build(_plain(value)))
        except construct.ConstructError as error:
            raise LayoutError(f"{self._value.__name__}: {error}") from error

    def build_value(self, parsed: dict[str, Any]) -> Value:
        """Turn construct's container into the dataclass."""
        return self._value(**{key: item for key, item in parsed.items() if not key.startswith("_")})


def _plain(value: Any) -> Any:  # noqa: ANN401  (any dataclass of this folder)
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def lower(declaration: construct.Construct[Any, Any]) -> struct.Struct:
    """Lower a declaration of fixed-width little-endian integers to a struct.Struct of the same fields, in order.

    Raises TypeError for anything else: a lowered layout never silently drops a field.
    """
    return struct.Struct("<" + _codes(declaration))


def _codes(declaration: construct.Construct[Any, Any]) -> str:
    if isinstance(declaration, construct.Renamed):
        return _codes(declaration.subcon)
    if isinstance(declaration, construct.Struct):
        return "".join(_codes(part) for part in declaration.subcons)
    if isinstance(declaration, construct.FormatField) and declaration.fmtstr.startswith("<"):
        return str(declaration.fmtstr[1:])
    raise TypeError(
        f"cannot lower {declaration!r} to struct: only little-endian integers and structs of them"
    )
